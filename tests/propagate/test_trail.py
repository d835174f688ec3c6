"""The way back of an axis: every hop is an op that ties, and it ends where it began."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from propagate.programs import mlp_step, shape, shard, stacked_step

from autoshard.ir.annotate import annotate
from autoshard.ir.seeds import Seed
from autoshard.ir.trace import trace
from autoshard.plan.sharded import Layout
from autoshard.propagate import find_classes, propagate
from autoshard.propagate.trail import trail

MLP = {"batch": ("data",), "mlp": ("tensor",)}


def walk(steps, what, dim, nth=0):
    """`(what, dim)` per step from the nth step of this name, and the origin."""
    index = [k for k, step in enumerate(steps) if step.what == what][nth]
    found, seen = [], set()
    while True:
        here = steps[index].dims[dim]
        assert here is not None
        assert (index, dim) not in seen
        seen.add((index, dim))
        found.append((steps[index].what, dim))
        if here.step is None:
            return found, here.origin
        index, dim = here.step, here.dim


def seeded(fn, args, seeds, rules=()):
    """Steps of a program with `{input number: dims}` fixed."""
    traced = trace(fn, args)
    given = tuple(
        Seed(traced.program.inputs[k], dims, "test", f"seed of {k}")
        for k, dims in seeds.items()
    )
    traced = replace(traced, seeds=given)
    return trail(propagate(traced, find_classes(traced), Layout(rules=tuple(rules))))


def test_a_way_follows_the_data_to_the_annotation():
    def fn(w, x):
        return jnp.exp(annotate(jnp.tanh(x) @ w, "batch", "mlp")).sum(1)

    steps = trail(shard(fn, [shape(16, 32), shape(8, 16)], MLP))
    way, origin = walk(steps, "reduce_sum", 0)
    assert way == [("reduce_sum", 0), ("exp", 0), ("annotate", 0)]
    assert origin.startswith("rule batch = [data], annotate at ")
    assert "test_trail.py:" in origin
    # Against the flow of data, where there is no other way.
    way, origin = walk(steps, "0", 1)
    assert way == [("0", 1), ("dot_general", 1), ("annotate", 1)]
    assert origin.startswith("rule mlp = [tensor], annotate at ")


def test_a_contracted_dim_is_reached_through_the_other_operand():
    def fn(w, x):
        return annotate(x, None, "mlp") @ w

    steps = trail(shard(fn, [shape(16, 4), shape(8, 16)], MLP))
    way, _ = walk(steps, "0", 0)
    assert way == [("0", 0), ("annotate", 1)]


def test_a_name_that_a_rule_gives_twice_leads_to_the_nearest():
    def fn(x):
        y = jnp.sin(annotate(x, "mlp"))
        return jnp.cos(annotate(y, "mlp"))

    steps = trail(shard(fn, [shape(8)], MLP))
    assert len([step for step in steps if step.what == "annotate"]) == 2
    assert walk(steps, "cos", 0)[0] == [("cos", 0), ("annotate", 0)]
    assert walk(steps, "sin", 0)[0] == [("sin", 0), ("annotate", 0)]
    assert walk(steps, "cos", 0)[1] != walk(steps, "sin", 0)[1]


def test_seeds_are_told_apart():
    def fn(w, x):
        return jnp.tanh(x @ w)

    steps = seeded(
        fn,
        [shape(16, 32), shape(8, 16)],
        {0: (None, ("tensor",)), 1: (("data",), None)},
    )
    product = ("tanh", 0), ("dot_general", 0), ("batch", 0)
    assert walk(steps, "tanh", 0) == (list(product), "seed of 1")
    assert walk(steps, "tanh", 1)[1] == "seed of 0"
    assert walk(steps, "tanh", 1)[0][-1] == ("0", 1)


def test_storage_and_rule_have_their_own_origins():
    args = (shape(8, 16, 32),)
    steps = trail(
        shard(
            mlp_step(),
            args,
            MLP,
            params=("fsdp",),
            gradients=("fsdp",),
            optimizer=("fsdp",),
        )
    )
    assert walk(steps, "params/up", 0)[1] == "storage params = [fsdp]"
    assert walk(steps, "gradient of params/up", 0)[1] == "storage gradients = [fsdp]"
    moments = [s.what for s in steps if s.what.startswith("opt_state") and s.shape]
    assert moments
    for what in moments:
        d = 0 if what.endswith("up") else 1
        assert walk(steps, what, d)[1] == "storage optimizer = [fsdp]"
        assert walk(steps, what, 1 - d)[1].startswith("rule mlp = [tensor]")


def test_both_kinds_on_one_dim_have_both_origins():
    def fn(params, x):
        return annotate(x * params["w"], None, "mlp")

    steps = trail(shard(fn, [{"w": shape(8)}, shape(4, 8)], MLP, params=("fsdp",)))
    (dim,) = next(s for s in steps if s.what == "0/w").dims
    assert dim.axes == ("tensor", "fsdp")
    # The rule's axes came from elsewhere, those of storage began here.
    assert dim.step is not None
    assert steps[dim.step].what == "broadcast_in_dim"
    assert dim.origin == "storage params = [fsdp]"


@pytest.mark.parametrize("step", [mlp_step, stacked_step])
def test_every_way_ends_and_carries_its_axes(step):
    steps = trail(
        shard(
            step(),
            (shape(8, 16, 32),),
            {**MLP, "seq.residual": ("tensor",)},
            params=("fsdp",),
            gradients=("fsdp",),
            optimizer=("fsdp",),
        )
    )
    assert len(steps) > 50
    for k, each in enumerate(steps):
        for d, dim in enumerate(each.dims):
            if dim is None:
                continue
            seen, index, at, axes = set(), k, d, set(dim.axes)
            origins = []
            while True:
                assert (index, at) not in seen, (each.what, each.source)
                seen.add((index, at))
                here = steps[index].dims[at]
                if here.origin:
                    origins.append(here.origin)
                if here.step is None:
                    break
                before = steps[here.step].dims[here.dim]
                assert set(before.axes) & axes, (each.what, each.source)
                if not axes <= set(before.axes):
                    assert here.origin
                axes &= set(before.axes)
                index, at = here.step, here.dim
            assert origins, (each.what, each.source)
            assert all(o.startswith(("rule ", "storage ")) for o in origins)


def test_copies_of_a_block_share_their_steps():
    def fn(weights, x):
        for w in weights:
            x = jnp.tanh(annotate(x, "batch", None) @ w)
        return x

    def count(layers):
        args = [[shape(16, 16)] * layers, shape(8, 16)]
        return len(trail(shard(fn, args, MLP)))

    assert count(12) == count(6)


def test_axes_of_one_device_are_left_out():
    traced = trace(lambda x: jnp.sin(annotate(x, "batch")), [shape(8)])
    layout = Layout(rules=(("batch", ("data", "fsdp")),), sizes={"data": 1, "fsdp": 2})
    steps = trail(propagate(traced, find_classes(traced), layout))
    assert [step.dims[0].axes for step in steps] == [("fsdp",)] * 3
    whole = Layout(rules=(("batch", ("data",)),), sizes={"data": 1})
    assert trail(propagate(traced, find_classes(traced), whole)) == ()


def test_a_scan_is_walked_through():
    def fn(w, x):
        x = annotate(x, "batch", None)
        out, _ = jax.lax.scan(lambda c, v: (jnp.tanh(c @ v), None), x, w)
        return jnp.sin(out)

    steps = trail(shard(fn, [shape(3, 16, 16), shape(8, 16)], MLP))
    way, _ = walk(steps, "sin", 0)
    names = [what for what, _ in way]
    assert names[0] == "sin"
    assert names[-1] == "annotate"
    assert any(name.endswith("of a loop") for name in names)
