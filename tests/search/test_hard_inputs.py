"""Inputs at the edges: a plan that arithmetic by hand confirms, or a clear error."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.equality import adamw, relative
from helpers.spaces import floats, mlp_step

import autoshard as ash
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.plan.files import save_type

SCALARS_BYTES = 4
"""Of the step count, which AdamW's state holds as an int32."""


def adamw_step(loss, model):
    return ash.train_step(loss, adamw(), model=model)


def normal(*shape):
    return lambda key: 0.1 * jax.random.normal(key, shape)


def checked(step, batch, cluster, **asked):
    """A plan whose sizes multiply, whose dims divide and whose state adds up."""
    # Of one stage: then every chip has a part of all state.
    plan = ash.search(step, batch, cluster=cluster, **{"executable": True, **asked})
    assert math.prod(plan.sizes.values()) == plan.cluster.num_chips
    held = {"params": 0, "optimizer": 0}
    for tensor in plan.tensors:
        ways = [math.prod(plan.sizes[a] for a in dim) for dim in tensor.storage.dims]
        assert all(n % w == 0 for n, w in zip(tensor.shape, ways, strict=True)), tensor
        if tensor.state in held:
            elements = math.prod(tensor.shape) // math.prod(ways)
            held[tensor.state] += elements * np.dtype(tensor.dtype).itemsize
    memory = plan.predicted.memory
    assert held == {"params": memory.params, "optimizer": memory.optimizer}
    assert sum(held.values()) <= memory.total <= memory.capacity
    [spread] = {t.storage.dims[0] for t in plan.tensors if t.state == "data"}
    pieces = plan.microbatches * math.prod(plan.sizes[a] for a in spread)
    assert jax.tree.leaves(batch)[0].shape[0] % pieces == 0
    assert 0 < plan.predicted.step_s < math.inf
    assert plan.certificate.complete
    return plan


# -- pins that cannot all be ---------------------------------------------------------


@pytest.mark.parametrize(
    ("pins", "error", "said"),
    [
        ({"tensor": 4, "data": 4}, InfeasibleError, r"data = 4, tensor = 4.*4 chips"),
        ({"tensor": 3}, InfeasibleError, r"tensor = 3.*4 chips of cpu:4"),
        (
            {"data": 4, "microbatches": 4},
            InfeasibleError,
            r"data = 4,.*microbatches = 4.*batch of 8.*16 .*fix fewer fields",
        ),
        ({"microbatches": 16}, InputError, r"batch of 8 .*into 16 .*divisible by 16"),
        (
            {"storage.params": "tensor", "tensor": 4, "data": 2},
            InfeasibleError,
            r"data = 2, tensor = 4",
        ),
    ],
)
def test_pins_that_contradict_each_other_or_the_input(pins, error, said):
    with pytest.raises(error, match=said):
        ash.search(mlp_step(), floats(8, 32), cluster="cpu:4", pins=pins)


# -- few and odd numbers of chips ----------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "rows", "width"),
    [
        ("cpu:7", 14, 32),
        ("cpu:7", 7, 49),
        ("cpu:7", 8, 32),
        ("h100:7", 14, 28),
        ("h100:13x1", 13, 26),
        ("h100:13x8", 104, 26),
    ],
)
def test_a_prime_number_of_chips(cluster, rows, width):
    checked(mlp_step(width, 2 * width), floats(rows, width), cluster)


def test_all_of_a_prime_number_of_chips_is_used_where_it_divides():
    plan = checked(
        mlp_step(49, 98), floats(14, 49), "cpu:7", strategy="fsdp", pins={"data": 1}
    )
    assert plan.sizes["fsdp"] == 7
    # Three layers of two weights of 49 x 98 in float32, and two moments of each.
    assert plan.predicted.memory.params == 3 * 2 * 49 * 98 * 4 // 7
    assert plan.predicted.memory.optimizer == 3 * 4 * 49 * 98 * 4 // 7 + SCALARS_BYTES


def test_a_prime_number_of_chips_that_divides_nothing_is_said():
    with pytest.raises(InfeasibleError, match=r"batch of 8 is not divisible by 7"):
        ash.search(mlp_step(), floats(8, 32), cluster="cpu:7", strategy="dp")


def test_a_cluster_file_of_thirteen_chips_in_a_node(tmp_path):
    chip = ash.cluster("h100:8").chip
    odd = chip.chips_per_node.model_copy(update={"value": 13.0})
    save_type(chip.model_copy(update={"chips_per_node": odd}), tmp_path / "odd.toml")
    plan = checked(
        mlp_step(26, 52),
        floats(26, 26),
        f"{tmp_path / 'odd.toml'}:26",
        strategy="fsdp",
        pins={"fsdp": 26},
    )
    assert plan.predicted.memory.params == 3 * 2 * 26 * 52 * 4 // 26


@pytest.mark.parametrize("cluster", ["cpu:1", "h100:1", "v5e:1x1", "v5p:1x1x1"])
def test_one_chip(cluster):
    # Dims of whole tiles, as memory of TPUs has them.
    plan = checked(mlp_step(128, 256), floats(8, 128), cluster)
    assert set(plan.sizes.values()) == {1}
    assert plan.predicted.collectives == ()
    assert plan.predicted.collective_s == 0
    assert plan.predicted.memory.params == 3 * 2 * 128 * 256 * 4


# -- small and odd programs ----------------------------------------------------------


def test_a_batch_of_one_is_not_spread_over_devices():
    plan = checked(mlp_step(), floats(1, 32), "cpu:4")
    assert plan.microbatches == 1
    assert plan.sizes["data"] * plan.sizes["fsdp"] == 1
    # Where there is nothing else to do, all devices do the same, and move nothing.
    alike = checked(mlp_step(), floats(1, 32), "cpu:4", strategy="dp")
    assert alike.sizes["data"] == 4
    assert [t.compute.dims[0] for t in alike.tensors if t.state == "data"] == [()]
    assert alike.predicted.collectives == ()


def test_a_model_with_no_block_that_repeats():
    def model(key):
        return {"a": normal(32, 64)(key), "b": normal(64, 16)(key)}

    step = adamw_step(lambda w, x: ((x @ w["a"]) @ w["b"]).mean(), model)
    plan = checked(step, floats(8, 32), "cpu:4", strategy="fsdp", pins={"fsdp": 4})
    assert plan.blocks == ()
    assert plan.remat == "none"
    assert plan.predicted.memory.params == (32 * 64 + 64 * 16) * 4 // 4


def test_remat_without_blocks_is_refused_after_a_search_that_left_it_out():
    step = adamw_step(
        lambda w, x: (x @ w["a"]).mean(), lambda key: {"a": jnp.ones((8, 4))}
    )
    solver = ash.solver(step, floats(8, 8), cluster="cpu:4")
    assert solver.plans()[0].remat == "none"
    with pytest.raises(InputError, match="no block repeats"):
        solver.pinned({"remat": "full"}).plans()


PRIMES = 31, 61


def test_dims_of_prime_size():
    step, batch = mlp_step(*PRIMES), floats(8, PRIMES[0])
    checked(step, batch, "cpu:8")
    # Only the batch can be spread, and all state stays whole.
    plan = checked(step, batch, "cpu:8", strategy="dp")
    assert plan.predicted.memory.params == 3 * 2 * 31 * 61 * 4
    with pytest.raises(InfeasibleError, match=r"params/down/0 .*by 8 \(fsdp\)"):
        ash.search(step, batch, cluster="cpu:8", strategy="fsdp", pins={"fsdp": 8})
    # 61 chips divide what 8 do not.
    there = checked(step, floats(61, 31), "cpu:61", strategy="fsdp", pins={"fsdp": 61})
    assert there.predicted.memory.params == 3 * 2 * 31 * 4


def test_a_parameter_without_elements():
    def model(key):
        return {"a": normal(32, 64)(key), "none": jnp.zeros((0, 5))}

    step = adamw_step(lambda w, x: ((x @ w["a"]) ** 2).mean() + w["none"].sum(), model)
    plan = checked(step, floats(8, 32), "cpu:4")
    assert plan.program.params == 32 * 64


def test_a_layer_without_width():
    plan = checked(mlp_step(hidden=0), floats(8, 32), "cpu:4", strategy="dp")
    assert plan.program.params == 0
    assert plan.predicted.model_flops == 0


def test_an_empty_batch_is_refused():
    with pytest.raises(InputError, match=r"leading dim of 0.*at least 1"):
        ash.search(mlp_step(), floats(0, 32), cluster="cpu:4")


# -- blocks of two kinds -------------------------------------------------------------

VOCAB, WIDTH, NARROW, WIDE, PAIRS = 64, 32, 64, 128, 3
WEIGHTS = VOCAB * WIDTH + PAIRS * (2 * WIDTH * NARROW + 2 * WIDTH * WIDE)


def in_pairs(*, scanned):
    """Layers of which every other one is wider and has another activation."""

    def pair(x, w):
        x = x + jnp.tanh(x @ w["up"]) @ w["down"]
        return x + jax.nn.gelu(x @ w["wide_up"]) @ w["wide_down"]

    def loss(params, ids):
        x = params["embed"][ids]
        if scanned:
            x, _ = jax.lax.scan(lambda x, w: (pair(x, w), None), x, params["layers"])
        else:
            for k in range(PAIRS):
                x = pair(x, {name: w[k] for name, w in params["layers"].items()})
        return ((x @ params["embed"].T) ** 2).mean()

    def model(key):
        shapes = {
            "up": (WIDTH, NARROW), "down": (NARROW, WIDTH),
            "wide_up": (WIDTH, WIDE), "wide_down": (WIDE, WIDTH),
        }  # fmt: skip
        layers = {
            name: normal(PAIRS, *s)(key) if scanned else list(normal(PAIRS, *s)(key))
            for name, s in shapes.items()
        }
        return {"embed": normal(VOCAB, WIDTH)(key), "layers": layers}

    return adamw_step(loss, model)


IDS = jax.ShapeDtypeStruct((8, 16), jnp.int32)


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unrolled"])
def test_every_other_layer_is_different(scanned):
    step = in_pairs(scanned=scanned)
    checked(step, IDS, "cpu:4")
    plan = checked(step, IDS, "cpu:4", pins={"tensor": 4, "rules.mlp": "tensor"})
    assert plan.predicted.model_flops == 6 * math.prod(IDS.shape) * WEIGHTS
    blocks = [b for b in plan.blocks if b.copies == PAIRS]
    assert {b.kind for b in blocks} == {"scanned" if scanned else "unrolled"}
    # Both kinds of layer are tensor parallel, in all their copies: the dim between
    # their two products is.
    for tensor in plan.tensors:
        if tensor.state == "params" and "layers" in tensor.path:
            over = tensor.compute.dims[-2:]
            up = "up" in tensor.path
            assert over == (((), ("tensor",)) if up else (("tensor",), ())), tensor


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unrolled"])
def test_blocks_of_two_kinds_equal_a_single_device(scanned):
    step, ids = in_pairs(scanned=scanned), np.arange(8 * 16).reshape(8, 16) % VOCAB
    ids = ids.astype(np.int32)
    pins = {"tensor": 4, "data": 2, "rules.mlp": "tensor"}
    parallel = ash.parallelize(step, ash.search(step, IDS, cluster="cpu:8", pins=pins))
    want, want_metrics = jax.jit(step)(step.init(0), ids)
    got, got_metrics = parallel(parallel.init(0), ids)
    pairs = zip(
        jax.tree.leaves((want.params, want_metrics)),
        jax.tree.leaves((got.params, got_metrics)),
        strict=True,
    )
    assert max(relative(b, a) for a, b in pairs) <= 1e-5


def test_blocks_of_two_kinds_hold_the_same_in_a_loop_and_written_out():
    pins = {"fsdp": 4, "microbatches": 1, "remat": "none"}
    for scanned in (True, False):
        step = in_pairs(scanned=scanned)
        plan = checked(step, IDS, "cpu:4", strategy="fsdp", pins=pins)
        assert plan.predicted.memory.params == WEIGHTS * 4 // 4
        assert plan.predicted.memory.optimizer == 2 * WEIGHTS * 4 // 4 + SCALARS_BYTES


# -- more elements than an int32 counts ----------------------------------------------

ROWS, DEEP, HEAD = 600_000, 4096, 64
TALL, BROAD = 70_000, 40_000


def looked_up():
    def model(key):
        return {"embed": normal(ROWS, DEEP)(key), "head": normal(DEEP, HEAD)(key)}

    return adamw_step(lambda w, ids: (w["embed"][ids] @ w["head"]).mean(), model)


def test_a_table_of_more_than_two_billion_elements():
    assert ROWS * DEEP > 2**31
    ids = jax.ShapeDtypeStruct((64, 128), jnp.int32)
    step, weights = looked_up(), ROWS * DEEP + DEEP * HEAD
    checked(step, ids, "h100:8")
    plan = checked(step, ids, "h100:8", strategy="fsdp", pins={"fsdp": 8})
    assert plan.program.params == weights == 2_457_862_144
    assert plan.predicted.memory.params == weights * 4 // 8
    assert plan.predicted.memory.optimizer == 2 * weights * 4 // 8 + SCALARS_BYTES
    # Forward, and backward for the weights and for what was looked up.
    assert plan.predicted.model_flops == 6 * 64 * 128 * DEEP * HEAD
    whole = checked(step, ids, "h100:8", strategy="dp")
    assert whole.predicted.memory.params == weights * 4
    # Every gradient is summed over all chips, in whole.
    moved = {c.bytes_ for c in whole.predicted.collectives if c.kind == "all_reduce"}
    assert ROWS * DEEP * 4 in moved


def test_a_weight_of_more_than_two_billion_elements():
    assert TALL * BROAD > 2**31
    step = adamw_step(lambda w, x: ((x @ w) ** 2).mean(), normal(TALL, BROAD))
    batch = floats(64, TALL)
    checked(step, batch, "h100:8")
    plan = checked(step, batch, "h100:8", strategy="fsdp", pins={"fsdp": 8})
    assert plan.predicted.memory.params == TALL * BROAD * 4 // 8 == 1_400_000_000
    # Nobody asks for the gradient of the batch.
    assert plan.predicted.model_flops == 4 * 64 * TALL * BROAD
    gathered = {c.bytes_ for c in plan.predicted.collectives if c.kind == "all_gather"}
    assert gathered == {TALL * BROAD * 4}


def test_more_ways_than_divide_a_huge_dim_are_refused():
    # 600,000 is 2**6 * 3 * 5**5: rows divide by 64, not by 128; neither does 4096 by 3.
    ids = jax.ShapeDtypeStruct((768, 16), jnp.int32)
    pins = {"specs.embed": "fsdp,none", "storage.optimizer": "fsdp"}
    step = looked_up()
    plan = checked(step, ids, "h100:64", strategy="fsdp", pins={"fsdp": 64, **pins})
    [embed] = [t for t in plan.tensors if t.path == "params/embed"]
    assert ROWS % math.prod(plan.sizes[a] for a in embed.storage.dims[0]) == 0
    with pytest.raises(InputError, match=r"600000 is not divisible by 128 \(fsdp"):
        ash.search(
            step, ids, cluster="h100:128", strategy="fsdp", pins={"fsdp": 128, **pins}
        )
