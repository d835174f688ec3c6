"""FLOPs, time and memory of programs small enough to be priced on paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from propagate.programs import (
    ACTIVATIONS,
    BATCH,
    EMBED,
    LAYERS,
    MLP,
    SEQ,
    mlp_step,
    shape,
    stacked_step,
)

from autoshard.cost import Pricer, estimate, model_flops
from autoshard.cost.constants import Constants
from autoshard.cost.kernels import HBM_EFFICIENCY
from autoshard.cost.work import analyse
from autoshard.ir.annotate import annotate
from autoshard.ir.errors import InputError
from autoshard.ir.mesh import AXES
from autoshard.ir.trace import trace
from autoshard.ir.train_step import train_step
from autoshard.plan.cluster import cluster
from autoshard.plan.sharded import Layout
from autoshard.propagate import find_classes, propagate

H100 = cluster("h100:8")
# Figures of the catalogue: f32 runs as TF32.
HBM = 3.35e12 * HBM_EFFICIENCY
C = Constants.shipped()


def rate(peak, smallest):
    """FLOP/s of a product by its smallest dim, as the constants' meanings say."""
    share = C["matmul.hopper"] * C["matmul.training"]
    return peak * share * smallest / (smallest + C["matmul.half_dim"] * peak / 1e15)


def pricer(fn, args, rules=(), sizes=None, **storage):
    traced = trace(fn, args)
    classes = find_classes(traced)
    layout = Layout(rules=tuple(dict(rules).items()), sizes=sizes or {}, **storage)
    return Pricer(propagate(traced, classes, layout), analyse(traced, classes))


def prices(found, chips=H100, cuts=1.0, **sizes):
    row = np.array([[sizes.get(axis, 1) for axis in AXES]])
    return found.price(chips, row, np.array([cuts]))


def memory(found, chips=H100, **sizes):
    """The table of what is alive at the peak, in bytes."""
    flops = model_flops(found.work, found.sharded.classes)
    return estimate(found, chips, sizes, flops).memory


def flops(fn, *args):
    found = pricer(fn, args)
    return model_flops(found.work, found.sharded.classes)


# -- FLOPs -----------------------------------------------------------------------


def test_a_product_is_two_m_n_k():
    assert flops(lambda w, x: x @ w, shape(5, 7), shape(3, 5)) == 2 * 3 * 5 * 7


def test_a_batched_product_of_several_summed_dims():
    got = flops(
        lambda w, x: jnp.einsum("bshd,hde->bse", x, w),
        shape(4, 5, 6),
        shape(2, 3, 4, 5),
    )
    assert got == 2 * (2 * 3) * (4 * 5) * 6


def test_a_loop_multiplies_by_its_length():
    def fn(w, x):
        return jax.lax.fori_loop(
            0,
            10,
            lambda _, x: jax.lax.scan(lambda x, _: (x @ w, None), x, None, 3)[0],
            x,
        )

    assert flops(fn, shape(4, 4), shape(8, 4)) == 30 * 2 * 8 * 4 * 4


def test_a_convolution_and_a_depthwise_one():
    def conv(groups):
        return lambda w, x: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", feature_group_count=groups
        )

    # [2, 6, 8, 8] by [4, 6, 3, 3]: every output point reads 6 x 3 x 3.
    full = flops(conv(1), shape(4, 6, 3, 3), shape(2, 6, 8, 8))
    assert full == 2 * (2 * 4 * 8 * 8) * (6 * 3 * 3)
    depthwise = flops(conv(6), shape(6, 1, 3, 3), shape(2, 6, 8, 8))
    assert depthwise == 2 * (2 * 6 * 8 * 8) * (3 * 3)


def test_training_takes_three_times_the_forward_pass():
    """But for the gradient of the data, which nobody asks for."""
    product = 2 * BATCH * SEQ * EMBED * MLP
    assert flops(mlp_step(), ACTIVATIONS) == (3 * 2 - 1) * product
    # In a loop the first layer's operand is carried like the others'.
    assert flops(stacked_step(), ACTIVATIONS) == LAYERS * 3 * 2 * product


# -- time ------------------------------------------------------------------------


def test_a_large_product_runs_at_the_chips_rate():
    n = 8192
    found = prices(pricer(lambda w, x: x @ w, [shape(n, n), shape(n, n)]))
    assert found.matmul_s[0] == pytest.approx(2 * n**3 / rate(494.7e12, n))
    assert found.other_s[0] == found.collective_s[0] == 0.0


def test_a_thin_product_runs_at_the_memorys_rate():
    n = 8192
    found = prices(pricer(lambda w, x: x @ w, [shape(n, n), shape(1, n)]))
    assert found.matmul_s[0] == pytest.approx((n * n + 2 * n) * 4 / HBM)


def test_a_product_in_bf16_takes_that_peak():
    half = shape(8192, 8192, dtype=jnp.bfloat16)
    found = prices(pricer(lambda w, x: x @ w, [half, half]))
    assert found.matmul_s[0] == pytest.approx(2 * 8192**3 / rate(989.4e12, 8192))


def test_a_dtype_without_a_peak_is_an_error():
    whole = shape(64, 64, dtype=jnp.complex64)
    found = pricer(lambda w, x: x @ w, [whole, whole])
    with pytest.raises(InputError, match="no peak FLOP/s for the dtype 'complex64'"):
        prices(found)


def test_a_product_of_integers_costs_what_float32_does():
    whole, real = shape(64, 64, dtype=jnp.int32), shape(64, 64)
    integers = prices(pricer(lambda w, x: x @ w, [whole, whole]))
    mixed = prices(pricer(lambda w, x: x @ w, [whole, real]))
    floats = prices(pricer(lambda w, x: x @ w, [real, real]))
    assert integers.matmul_s[0] == mixed.matmul_s[0] == floats.matmul_s[0] > 0


def test_a_sharded_product_is_divided_among_its_chips():
    n = 8192
    rules = {"batch": ("data",)}
    found = pricer(lambda w, x: x @ w, [shape(n, n), shape(n, n)], rules)
    cut = prices(found, data=8)
    assert cut.matmul_s[0] == pytest.approx(2 * n**3 / 8 / rate(494.7e12, n / 8))


def test_fused_ops_read_once_and_write_once():
    n = 1 << 20
    found = prices(
        pricer(lambda w, x: jnp.tanh(jnp.sin(x) + 1.0) * 2.0, [1.0, shape(n)])
    )
    assert found.other_s[0] == pytest.approx(2 * 4 * n / HBM)
    assert found.matmul_s[0] == 0.0


def test_a_lookup_moves_rows_and_not_the_table():
    table, ids = shape(1 << 20, 64), shape(128, dtype=jnp.int32)
    found = prices(
        pricer(lambda t, i: t.at[i].get(mode="promise_in_bounds"), [table, ids])
    )
    assert found.other_s[0] < 3 * 2 * 128 * 64 * 4 / HBM
    assert found.other_s[0] >= 2 * 128 * 64 * 4 / HBM


def test_an_all_reduce_of_a_tensor_parallel_product():
    m, k, n = 512, 1024, 256
    rules = {"inner": ("tensor",)}

    def fn(w, x):
        return annotate(x, None, "inner") @ w

    found = prices(pricer(fn, [shape(k, n), shape(m, k)], rules), tensor=8)
    # Half a megabyte, of which each chip takes an eighth: the ramp is near its foot.
    bytes_ = m * n * 4
    ramp = 1 + 2.7e6 / (bytes_ / 8 + 2.7e6)
    in_switch = bytes_ * 9 / 8 / (450e9 * 0.684) * ramp
    assert found.collective_s[0] == pytest.approx(12e-6 + 14 * 1.9e-6 + in_switch)


def test_on_one_chip_nothing_is_communicated():
    rules = {"batch": ("data",), "mlp": ("tensor",), "seq.residual": ("tensor",)}
    found = pricer(mlp_step(), [ACTIVATIONS], rules, optimizer=("data",))
    assert found.moved.moves
    assert prices(found).collective_s[0] == 0.0
    assert prices(found, data=2, tensor=2).collective_s[0] > 0.0


def test_step_time_is_the_sum_of_its_parts():
    found = prices(pricer(stacked_step(), [ACTIVATIONS], {"batch": ("data",)}), data=8)
    parts = found.matmul_s + found.other_s + found.collective_s
    np.testing.assert_array_equal(found.step_s, parts)
    assert (found.matmul_s > 0) & (found.other_s > 0) & (found.collective_s > 0)


def test_mfu_and_tokens():
    found = pricer(stacked_step(), [ACTIVATIONS], {"batch": ("data",)})
    product = 2 * BATCH * SEQ * EMBED * MLP
    got = estimate(found, H100, {"data": 8}, LAYERS * 6 * product)
    assert got.step_s == pytest.approx(prices(found, data=8).step_s[0])
    assert got.mfu == pytest.approx(LAYERS * 6 * product / (got.step_s * 494.7e12 * 8))
    # Of float data only the leading dim counts.
    assert got.tokens_per_s == pytest.approx(BATCH / got.step_s)


def test_tokens_of_integer_data_are_batch_times_sequence():
    def fn(table, batch):
        return table[batch["tokens"]].sum()

    tokens = {"tokens": shape(4, 32, dtype=jnp.int32)}
    found = pricer(fn, [shape(100, 8), tokens])
    got = estimate(found, H100, {}, 1.0)
    assert got.tokens_per_s == pytest.approx(4 * 32 / got.step_s)


def test_every_collective_is_listed_with_its_bytes():
    rules = {"batch": ("fsdp",)}
    fsdp = dict.fromkeys(("params", "gradients", "optimizer"), ("fsdp",))
    found = pricer(stacked_step(), [ACTIVATIONS], rules, sizes={"fsdp": 8}, **fsdp)
    got = estimate(found, H100, {"fsdp": 8}, 1.0)
    weights = [c for c in got.collectives if c.kind in ("all_gather", "reduce_scatter")]
    # One layer of one weight at a time: two gathers forward, two backward, and two
    # gradients, each once a layer.
    assert [(c.bytes_, c.count) for c in weights] == [(EMBED * MLP * 4, LAYERS)] * 6
    spent = sum(c.time_s for c in got.collectives)
    assert spent == pytest.approx(got.collective_s + got.hidden_s)
    assert {c.value for c in weights if c.kind == "all_gather"} == {
        "params/up",
        "params/down",
    }


# -- memory ----------------------------------------------------------------------

ROWS, IN, OUT = 64, 32, 16


def linear_step(optimizer):
    return train_step(
        lambda w, x: ((x @ w) ** 2).mean(),
        optimizer,
        model=lambda key: jnp.ones((IN, OUT)),
    )


WEIGHT, DATA, HIDDEN = IN * OUT * 4, ROWS * IN * 4, ROWS * OUT * 4


def test_memory_of_one_product_in_training():
    """The peak is where the gradient is made, next to the cotangent of the result."""
    got = memory(pricer(linear_step(optax.sgd(0.1)), [shape(ROWS, IN)]))
    assert got.params == WEIGHT
    assert got.gradients == WEIGHT
    assert got.optimizer == 0
    assert got.activations == HIDDEN + 4  # and the loss, known by then
    assert got.other == DATA + 4  # the batch, and the step count
    assert got.total == 2 * WEIGHT + (HIDDEN + 4) + (DATA + 4)


def test_memory_of_adam_is_two_moments_and_a_count():
    got = memory(pricer(linear_step(optax.adam(0.1)), [shape(ROWS, IN)]))
    assert got.optimizer == 2 * WEIGHT + 4


def test_memory_divides_as_its_state_is_stored():
    rules = {"batch": ("fsdp",)}
    fsdp = dict.fromkeys(("params", "gradients", "optimizer"), ("fsdp",))
    found = pricer(
        linear_step(optax.adam(0.1)), [shape(ROWS, IN)], rules, {"fsdp": 4}, **fsdp
    )
    got = memory(found, cluster("h100:4"), fsdp=4)
    assert got.params == WEIGHT / 4
    assert got.optimizer == 2 * WEIGHT / 4 + 4
    assert got.other == DATA / 4 + 4
    # The peak is where the gradient is made: each device has a partial sum of all of
    # it, and the piece that it keeps, next to the cotangent of its rows and the loss.
    assert got.gradients == WEIGHT + WEIGHT / 4
    assert got.activations == HIDDEN / 4 + 4


def test_a_loop_keeps_what_each_layer_saves():
    """With longer loops memory grows by what one layer keeps, and by its state."""

    def total(layers):
        def loss(w, x):
            return (jax.lax.scan(lambda x, w: (jnp.sin(x) @ w, None), x, w)[0]).sum()

        step = train_step(
            loss, optax.sgd(0.1), model=lambda key: jnp.ones((layers, IN, IN))
        )
        return memory(pricer(step, [shape(ROWS, IN)]))

    few, many = total(4), total(8)
    assert many.params - few.params == 4 * IN * IN * 4
    assert many.gradients - few.gradients == 4 * IN * IN * 4
    # sin(x) for the weight's gradient and cos(x) for the operand's.
    assert many.activations - few.activations == 4 * 2 * ROWS * IN * 4


def test_what_a_loop_stacks_is_there_from_its_first_run():
    wide, length = 8 * IN, 3

    def fn(weights, x):
        def body(x, _):
            x = x @ weights["up"] @ weights["down"]
            return x, x

        return jax.lax.scan(body, x, None, length=length)[1]

    weights = {"up": shape(IN, wide), "down": shape(wide, IN)}
    got = memory(pricer(fn, [weights, shape(ROWS, IN)]))
    # What is carried, what is stacked, and the wide product between the two others.
    assert got.activations == 4 * ROWS * (IN + length * IN + wide)
