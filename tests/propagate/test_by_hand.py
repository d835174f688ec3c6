"""Published layouts on programs small enough to say every collective beforehand."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest
from propagate.programs import (
    ACTIVATIONS,
    ATTENTION_WEIGHTS,
    BATCH,
    EMBED,
    LAYERS,
    MLP,
    MLP_WEIGHTS,
    SEQ,
    attention,
    collectives,
    mlp,
    mlp_step,
    shape,
    shard,
    specs,
    stacked_step,
)

from autoshard.cost.moves import unique_moves
from autoshard.ir.annotate import annotate
from autoshard.ir.train_step import train_step
from autoshard.plan.sharded import OUTPUT

DATA, FSDP, TENSOR = ("data",), ("fsdp",), ("tensor",)
TP = {"batch": DATA, "mlp": TENSOR, "heads": TENSOR}
SP = {**TP, "seq.residual": TENSOR}

FIRST, SECOND = "dot_general#0", "dot_general#1"
"""Products of the MLP in the order it is written: up, then down."""


# -- tensor parallelism: Shoeybi et al. 2019, arXiv:1909.08053, figure 3 ---------


def test_an_mlp_sums_once_after_its_second_product():
    sharded = shard(mlp, [MLP_WEIGHTS, ACTIVATIONS], TP)
    assert collectives(sharded) == [("all_reduce", "tensor", f"{SECOND} out0")]
    assert specs(sharded) == {
        "0/up": ((), TENSOR),
        "0/down": (TENSOR, ()),
        "batch": (DATA, (), ()),
    }


def test_attention_sums_once_after_its_output_projection():
    sharded = shard(attention, [ATTENTION_WEIGHTS, ACTIVATIONS], TP)
    where = "bshd,hde->bse/dot_general#0 out0"
    assert collectives(sharded) == [("all_reduce", "tensor", where)]
    assert specs(sharded)["0/q"] == ((), TENSOR, ())
    assert specs(sharded)["0/out"] == (TENSOR, (), ())


def test_a_layer_in_training_sums_once_forward_and_once_backward():
    sharded = shard(stacked_step(), [ACTIVATIONS], TP)
    ops = sharded.traced.program.ops
    tensor = [
        (kind, where.split("/")[0])
        for kind, axes, where in collectives(sharded)
        if axes == "tensor" and "/scan#0/" in where
    ]
    assert sorted(tensor) == [
        ("all_reduce", "jvp()"),
        ("all_reduce", "transpose(jvp())"),
    ]
    products = {
        ops[m.op].primitive
        for m in unique_moves(sharded)
        if m.unreduced == TENSOR and ops[m.op].region > 0
    }
    assert products == {"dot_general"}


# -- context parallelism by gathers: Grattafiori et al. 2024, section 3.3.2 -------


def test_keys_and_values_are_gathered_and_their_gradients_scattered():
    """Queries keep their part of the sequence, forward and backward.

    The products, by hand: scores take keys and the mix takes values whole, and the
    backward pass takes the same copies. The gradients of keys and of values are sums
    over queries, which are partial on each device. Scores and queries stay.
    """

    def loss(weights, x):
        return (attention(weights, x) ** 2).mean()

    args = [ATTENTION_WEIGHTS, ACTIVATIONS]
    rules = {"batch": DATA, "seq": ("context",)}
    moved = Counter(
        (kind, "transpose" in where.split("/")[0], where.split()[1][:-1])
        for kind, axes, where in collectives(shard(jax.grad(loss), args, rules))
        if axes == "context" and ("bqhd,bkhd" in where or "bhqk,bkhd" in where)
    )
    assert moved == {
        ("all_gather", False, "in"): 2,
        ("reduce_scatter", True, "out"): 2,
    }


# -- sequence parallelism: Korthikanti et al. 2022, arXiv:2205.05198 -------------


def test_with_the_residual_sharded_the_sum_is_split_in_two():
    sharded = shard(mlp, [MLP_WEIGHTS, ACTIVATIONS], SP)
    assert collectives(sharded) == [
        ("all_gather", "tensor", f"{FIRST} in0"),
        ("reduce_scatter", "tensor", f"{SECOND} out0"),
    ]
    assert specs(sharded)["batch"] == (DATA, TENSOR, ())


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (mlp, [MLP_WEIGHTS, ACTIVATIONS]),
        (attention, [ATTENTION_WEIGHTS, ACTIVATIONS]),
        (stacked_step(), [ACTIVATIONS]),
    ],
    ids=["mlp", "attention", "training"],
)
def test_over_context_devices_too_the_residual_is_sharded_further(fn, args):
    """What tensor parallelism moves does not hang on where else the sequence lies."""
    by_context = shard(fn, args, {**SP, "seq": ("context",)})
    assert specs(by_context)["batch"] == (DATA, ("context", "tensor"), ())

    def over_tensor(sharded):
        found = Counter()
        for kind, axes, _ in collectives(sharded):
            found[kind] += "tensor" in axes
        return +found

    assert over_tensor(by_context) == over_tensor(shard(fn, args, SP))


def test_the_residual_rule_is_not_for_parameters():
    """Learned positions have the sequence and the embed dim, and stay whole."""

    def fn(positions, x):
        return annotate(x, "batch", "seq", "embed") + positions

    sharded = shard(fn, [shape(SEQ, EMBED), ACTIVATIONS], SP)
    assert specs(sharded) == {"0": ((), ()), "batch": (DATA, TENSOR, ())}
    assert {kind for kind, _, _ in collectives(sharded)} == {"slice"}


def test_three_projections_share_one_gather():
    sharded = shard(attention, [ATTENTION_WEIGHTS, ACTIVATIONS], SP)
    assert [(kind, axes) for kind, axes, _ in collectives(sharded)] == [
        ("all_gather", "tensor"),
        ("reduce_scatter", "tensor"),
    ]
    # All three need it; the program moves it once.
    gathers = [r for r in sharded.reshards if not r.unreduced]
    assert len(gathers) == 3
    assert len({r.value for r in gathers}) == 1


def test_what_a_residual_rule_shards_beyond_another_rule_stays_so_between_products():
    """Where a rule cuts sequences over devices too, norms gather nothing."""

    def fn(weights, x):
        x = annotate(x, "batch", "seq", "embed")
        scale = jax.lax.rsqrt((x**2).mean(axis=-1, keepdims=True))
        return x + mlp(weights, x * scale)

    weights = [MLP_WEIGHTS, ACTIVATIONS]
    sharded = shard(fn, weights, {**SP, "seq": ("context",)})
    assert collectives(sharded) == [
        ("all_gather", "tensor", f"{FIRST} in0"),
        ("reduce_scatter", "tensor", f"{SECOND} out0"),
    ]
    assert specs(sharded)["batch"] == (DATA, ("context", "tensor"), ())
    assert collectives(sharded) == collectives(shard(fn, weights, SP))


# -- data parallelism and ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054 --------

UP_GRADIENT = "transpose(jvp())/dot_general#2 out0"
DOWN_GRADIENT = "transpose(jvp())/dot_general#0 out0"
"""Backwards the second product comes first: its weight, its operand, then the first's
weight; the data needs no gradient."""

LOSS = ("all_reduce", "data", "jvp()/reduce_sum#0 out0")


def without_scalars(sharded):
    """Collectives but for those of the loss and of the gradients' norm."""
    return [
        (kind, axes, where)
        for kind, axes, where in collectives(sharded)
        if kind != "slice" and "reduce_sum" not in where
    ]


def test_data_parallelism_sums_each_gradient():
    sharded = shard(mlp_step(), [ACTIVATIONS], {"batch": DATA})
    assert collectives(sharded) == [
        LOSS,
        ("all_reduce", "data", DOWN_GRADIENT),
        ("all_reduce", "data", UP_GRADIENT),
    ]


def test_zero_1_sums_gradients_and_gathers_new_parameters():
    sharded = shard(mlp_step(), [ACTIVATIONS], {"batch": DATA}, optimizer=DATA)
    paths = [i.path for i in sharded.traced.inputs]
    outputs = [f"output out{paths.index(f'params/{w}')}" for w in ("down", "up")]
    assert without_scalars(sharded) == [
        *(("all_gather", "data", where) for where in outputs),
        ("all_reduce", "data", DOWN_GRADIENT),
        ("all_reduce", "data", UP_GRADIENT),
    ]
    found = specs(sharded)
    assert found["params/up"] == ((), ())
    assert found["opt_state/0/mu/up"] == found["opt_state/0/nu/up"] == ((), DATA)
    assert found["opt_state/0/mu/down"] == (DATA, ())


def test_zero_2_scatters_gradients():
    sharded = shard(
        mlp_step(), [ACTIVATIONS], {"batch": DATA}, optimizer=DATA, gradients=DATA
    )
    assert [
        (kind, where)
        for kind, _, where in without_scalars(sharded)
        if not where.startswith("output")
    ] == [("reduce_scatter", DOWN_GRADIENT), ("reduce_scatter", UP_GRADIENT)]
    assert sum(w.startswith("output") for _, _, w in without_scalars(sharded)) == 2


def fsdp(step):
    return shard(
        step,
        [ACTIVATIONS],
        {"batch": FSDP},
        params=FSDP,
        gradients=FSDP,
        optimizer=FSDP,
        sizes={"fsdp": 4},
    )


def test_fsdp_gathers_at_use_and_scatters_gradients():
    sharded = fsdp(mlp_step())
    assert without_scalars(sharded) == [
        ("all_gather", "fsdp", f"jvp()/{FIRST} in1"),
        ("all_gather", "fsdp", f"jvp()/{SECOND} in1"),
        ("reduce_scatter", "fsdp", DOWN_GRADIENT),
        ("reduce_scatter", "fsdp", UP_GRADIENT),
    ]
    # Nothing is gathered at the end: the update runs on what is stored.
    assert all(r.op != OUTPUT for r in sharded.reshards)


def test_fsdp_gathers_one_layer_at_a_time_in_each_loop():
    sharded = fsdp(stacked_step())
    kinds = [
        (kind, where.split("/")[:2]) for kind, _, where in without_scalars(sharded)
    ]
    forward, backward = ["jvp()", "scan#0"], ["transpose(jvp())", "scan#0"]
    assert kinds == [
        *[("all_gather", forward)] * 2,
        *[("all_gather", backward)] * 2,
        *[("reduce_scatter", backward)] * 2,
    ]
    # The dim of the layers is never cut: a loop takes its slices from it.
    assert specs(sharded)["params/up"] == ((), (), FSDP)
    for move in unique_moves(sharded):
        if sharded.traced.program.ops[move.op].region:
            assert LAYERS not in sharded.traced.program.values[move.value].shape


# -- what divides, and what does not ---------------------------------------------


def odd_step(rows, columns):
    return train_step(
        lambda w, x: ((x @ w) ** 2).mean(),
        optax.adam(1e-3),
        model=lambda key: jnp.ones((rows, columns)),
    )


def test_storage_goes_to_a_dim_that_divides():
    sharded = shard(odd_step(7, 12), [shape(8, 7)], {}, params=FSDP, sizes={"fsdp": 4})
    assert specs(sharded)["params"] == ((), FSDP)
    assert sharded.notes == ()


def test_storage_that_divides_nowhere_stays_with_a_note():
    sharded = shard(odd_step(7, 9), [shape(8, 7)], {}, params=FSDP, sizes={"fsdp": 4})
    assert specs(sharded)["params"] == ((), ())
    [note] = sharded.notes
    assert note == (
        "params (7, 9) is not sharded over fsdp in memory: no dim is divisible by 4"
    )
    assert not [c for c in collectives(sharded) if c[0] == "all_gather"]


def test_while_sizes_are_unknown_everything_divides():
    sharded = shard(odd_step(7, 9), [shape(8, 7)], {}, params=FSDP)
    assert specs(sharded)["params"] == ((), FSDP)


def test_storage_over_an_axis_of_one_changes_nothing():
    sharded = shard(odd_step(8, 8), [shape(8, 8)], {}, params=FSDP, sizes={"fsdp": 1})
    assert specs(sharded)["params"] == ((), ())


def test_storage_joins_the_compute_spec():
    """An axis that shards a dim in compute already is not used again."""
    sharded = shard(
        mlp, [MLP_WEIGHTS, ACTIVATIONS], TP, params=("data", "tensor"), sizes={}
    )
    assert specs(sharded)["0/up"] == (DATA, TENSOR)


def test_what_must_divide_is_listed():
    sharded = shard(mlp, [MLP_WEIGHTS, ACTIVATIONS], SP)
    assert sharded.divides == {(BATCH, DATA), (SEQ, TENSOR), (MLP, TENSOR)}


# -- rules -----------------------------------------------------------------------


def test_names_tied_with_different_rules_are_noted_and_the_first_rule_holds():
    def fn(w, x):
        return annotate(x, "batch", "left") + annotate(w, None, "right")

    rules = {"right": TENSOR, "left": FSDP}
    sharded = shard(fn, [shape(8, 4), shape(8, 4)], rules)
    [conflict] = sharded.conflicts
    assert (conflict.kept, conflict.lost) == ("right = tensor", "left = fsdp")
    lines = [conflict.kept_origin, conflict.lost_origin]
    assert all(line.startswith("annotate at") for line in lines)
    assert len({line.split(":")[1] for line in lines}) == 1  # both on the return line
    assert {dims[1] for dims in specs(sharded).values()} == {TENSOR}


def test_names_tied_with_the_same_rule_are_no_conflict():
    def fn(w, x):
        return annotate(x, "batch", "left") + annotate(w, None, "right")

    sharded = shard(fn, [shape(8, 4), shape(8, 4)], {"right": TENSOR, "left": TENSOR})
    assert sharded.conflicts == ()


def test_a_rule_for_a_name_nobody_has_changes_nothing():
    args = [MLP_WEIGHTS, ACTIVATIONS]
    plain = shard(mlp, args, TP)
    more = shard(mlp, args, {"expert": ("expert",), **TP})
    assert (more.specs, more.reshards) == (plain.specs, plain.reshards)
    assert more.notes == ()


@pytest.mark.parametrize(("first", "dim"), [("embed", 0), ("mlp", 1)])
def test_an_axis_goes_to_the_first_rule_that_wants_it(first, dim):
    rules = {first: TENSOR, "embed": TENSOR, "mlp": TENSOR}
    sharded = shard(mlp, [MLP_WEIGHTS, ACTIVATIONS], rules)
    expected = [(), ()]
    expected[dim] = TENSOR
    assert specs(sharded)["0/up"] == tuple(expected)


def test_no_rules_move_nothing():
    sharded = shard(mlp, [MLP_WEIGHTS, ACTIVATIONS], {})
    assert sharded.reshards == ()
    assert sharded.divides == frozenset()


def test_a_dim_of_size_one_is_not_sharded():
    sharded = shard(
        lambda w, x: x * w, [shape(1, EMBED), shape(1, EMBED)], {"batch": DATA}
    )
    assert specs(sharded)["batch"] == ((), ())


def test_an_axis_is_never_used_twice_in_a_spec():
    """Queries against keys: the class of the sequence meets itself."""

    def fn(w, x):
        x = annotate(x, "batch", "seq", "embed")
        return jax.nn.softmax(jnp.einsum("bqe,bke->bqk", x, x)).sum() * w

    for rules in ({"seq": TENSOR}, {"seq": TENSOR, "embed": TENSOR}):
        sharded = shard(fn, [shape(), ACTIVATIONS], rules)
        for spec in (*sharded.specs, *sharded.factor_axes):
            used = [axis for dim in spec for axis in dim]
            assert len(used) == len(set(used))


def test_a_dim_is_gathered_before_it_becomes_the_minor_part_of_another():
    """The parts of a minor factor are strided in the merged dim; no spec says that."""

    def merge(x):
        x = annotate(x, "batch", "seq", None)
        return x.reshape(BATCH * SEQ, EMBED)

    sharded = shard(merge, [ACTIVATIONS], {"batch": DATA, "seq": TENSOR})
    assert collectives(sharded) == [("all_gather", "tensor", "reshape#0 in0")]
    assert sharded.specs[sharded.traced.program.outputs[0]] == (DATA, ())


def test_a_minor_part_is_sharded_for_free_where_a_dim_is_split():
    def split(x):
        return annotate(x.reshape(BATCH, SEQ, EMBED), "batch", "seq", None)

    sharded = shard(split, [shape(BATCH * SEQ, EMBED)], {"batch": DATA, "seq": TENSOR})
    assert collectives(sharded) == []
    assert sharded.specs[sharded.traced.program.outputs[0]] == (DATA, TENSOR, ())


def test_state_that_is_written_and_never_read_lies_as_it_is_written():
    """A running average that only evaluation reads: nothing moves at the end."""

    def step(state, x):
        y = annotate(x, None, "mlp") * 2
        return {"last": y, "count": state["count"] + 1}, y.sum()

    state = {"last": shape(BATCH, MLP), "count": shape()}
    sharded = shard(step, [state, shape(BATCH, MLP)], {"mlp": TENSOR})
    assert sharded.traced.out_source[:2] == (0, 1)
    assert specs(sharded)["0/last"] == ((), TENSOR)
    assert not [r for r in sharded.reshards if r.op == OUTPUT]
