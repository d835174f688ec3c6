"""Structures: builder and interpreter agree, and values are right."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ir.structures import (
    DIFFERENTIABLE,
    FORWARD,
    RENAME,
    arguments,
    branch_in_scan_in_remat,
    manual_kernel,
    manual_sum,
    own_kernel,
    pinned_values,
    plan_mesh,
    same,
    user_mesh,
    whole,
)
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from autoshard.ir.errors import InputError
from autoshard.ir.interpret import evaluate
from autoshard.ir.program import LINK, build

CASES = [(fn, grad) for fn in DIFFERENTIABLE for grad in (False, True)]
CASES += [(fn, False) for fn in FORWARD]
every = pytest.mark.parametrize(
    ("fn", "grad"), CASES, ids=[f"{f.__name__}{'-grad' * g}" for f, g in CASES]
)


# -- building and evaluating agree -----------------------------------------------


def slots(program):
    """Where `place` must be called, read off the program."""
    found = set()
    for op in program.ops:
        # What a loop carries out is on its way in the body, as the carry.
        if op.params.get("kind") != "carry_out":
            found |= {(op.address, f"in{k}") for k, v in enumerate(op.inputs) if v >= 0}
        found |= {(op.address, f"out{k}") for k in range(len(op.outputs))}
    return found


@every
def test_every_slot_is_visited_once(fn, grad):
    jaxpr = jax.make_jaxpr(whole(fn, grad))(*arguments())
    program = build(jaxpr, ["ws", "x"])
    visited = []

    def place(address, slot, value):
        visited.append((address, slot))
        return value

    run = partial(evaluate, jaxpr, place=place, mesh=plan_mesh(), rename=RENAME)
    jax.make_jaxpr(lambda *xs: run(xs))(*arguments())
    assert len(visited) == len(set(visited))
    assert set(visited) == slots(program)
    assert len({op.address for op in program.ops}) == len(program.ops)


@every
def test_values_have_the_shapes_the_program_says(fn, grad):
    jaxpr = jax.make_jaxpr(whole(fn, grad))(*arguments())
    program = build(jaxpr, ["ws", "x"])
    shapes = {}
    for op in program.ops:
        for side, values in (("in", op.inputs), ("out", op.outputs)):
            for k, v in enumerate(values):
                if v >= 0:
                    value = program.values[v]
                    shapes[op.address, f"{side}{k}"] = (value.shape, value.dtype)

    def place(address, slot, value):
        assert (value.shape, value.dtype) == shapes[address, slot], (address, slot)
        return value

    run = partial(evaluate, jaxpr, place=place, mesh=plan_mesh(), rename=RENAME)
    jax.make_jaxpr(lambda *xs: run(xs))(*arguments())


@every
def test_evaluating_on_the_renamed_mesh_gives_the_same_result(fn, grad):
    expected = jax.jit(whole(fn, grad))(*arguments())
    jaxpr = jax.make_jaxpr(whole(fn, grad))(*arguments())
    mesh = plan_mesh()
    step = jax.jit(
        lambda *xs: evaluate(jaxpr, xs, same, mesh=mesh, rename=RENAME),
        in_shardings=NamedSharding(mesh, P()),
    )
    got = step(*arguments())
    for a, b in zip(got, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    text = step.lower(*arguments()).as_text()
    assert '"dp"' not in text
    assert '"mp"' not in text


@every
def test_building_twice_gives_the_same_program(fn, grad):
    first, second = (
        build(jax.make_jaxpr(lambda *xs: whole(fn, grad)(*xs))(*arguments()), [])
        for _ in range(2)
    )
    assert first.fingerprint == second.fingerprint
    assert [op.address for op in first.ops] == [op.address for op in second.ops]
    assert [op.source for op in first.ops] == [op.source for op in second.ops]


# -- evaluating ------------------------------------------------------------------


def test_place_reaches_into_every_structure():
    """A constraint put on any slot arrives in the lowered program, in its axes."""
    fn = branch_in_scan_in_remat
    jaxpr = jax.make_jaxpr(fn)(*arguments())
    mesh = plan_mesh()
    wanted = [
        op.address
        for op in build(jaxpr, []).ops
        if op.primitive in ("dot_general", "tanh", LINK)
    ]
    seen = []

    def place(address, slot, value):
        if slot != "out0" or address not in wanted or not value.ndim:
            return value
        seen.append(address)
        axes = ["tensor"] + [None] * (value.ndim - 1)
        return lax.with_sharding_constraint(value, NamedSharding(mesh, P(*axes)))

    step = jax.jit(lambda *xs: evaluate(jaxpr, xs, place))
    text = step.lower(*arguments()).as_text()
    assert {"scan#0:in1", "scan#0/cond#0:1:in1", "scan#0/cond#0:1/tanh#0"} <= {
        a.split("/", 1)[-1] if a.startswith("checkpoint") else a for a in seen
    }
    assert text.count("sdy.sharding_constraint") == len(seen)
    np.testing.assert_allclose(step(*arguments())[0], fn(*arguments()), rtol=1e-5)


def test_what_the_plan_puts_replaces_what_the_user_pinned():
    jaxpr = jax.make_jaxpr(pinned_values)(*arguments())
    mesh = plan_mesh()

    def place(address, slot, value):
        if address == "sharding_constraint#0" and slot == "out0":
            sharding = NamedSharding(mesh, P("data", None))
            return lax.with_sharding_constraint(value, sharding)
        return value

    text = jax.jit(lambda *xs: evaluate(jaxpr, xs, place)).lower(*arguments()).as_text()
    assert text.count("sdy.sharding_constraint") == 1
    assert '[{"data"}, {}]' in text


@pytest.mark.parametrize("grad", [False, True])
def test_an_explicit_mesh_does_not_survive(grad):
    """Types with shardings, shardings as parameters, and the mesh in the context."""
    mesh = user_mesh(AxisType.Explicit)

    def fn(ws, x):
        x = jax.sharding.reshard(x, P("dp", None))
        y = jnp.einsum("ij,jk->ik", x, ws[0], out_sharding=P("dp", "mp"))
        y = y + jnp.broadcast_to(y.sum(0, keepdims=True), y.shape)
        y = jnp.sin(y).reshape(8, 2, 2, out_sharding=P("dp", "mp", None))
        part = jax.shard_map(
            lambda y: lax.psum(y, "mp"), in_specs=P("dp", "mp"), out_specs=P("dp")
        )
        z = lax.scan(lambda c, w: (c * w.mean(), None), part(y), ws)[0]
        free = jax.sharding.auto_axes(jnp.cos, out_sharding=P("dp"))
        return free(z).sum() + lax.iota(jnp.float32, 8).sum()

    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(whole(fn, grad))(*arguments())
        expected = jax.jit(whole(fn, grad))(*arguments())
    plan = plan_mesh()
    run = partial(evaluate, jaxpr, place=same, mesh=plan, rename=RENAME)
    step = jax.jit(lambda *xs: run(xs))
    for a, b in zip(step(*arguments()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, np.asarray(b), rtol=2e-5, atol=2e-5)
    text = step.lower(*arguments()).as_text()
    assert '"dp"' not in text
    # Only the manual region speaks of a mesh at all.
    assert "sdy.sharding_constraint" not in text
    again = jax.make_jaxpr(lambda *xs: run(xs))(*arguments())
    inside = [v.aval for eqn in again.eqns for v in eqn.outvars]
    assert all("@" not in str(aval) for aval in inside)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_that_the_user_has_set_does_not_matter(kind):
    jaxpr = jax.make_jaxpr(manual_sum)(*arguments())
    mesh = plan_mesh()
    step = jax.jit(
        lambda *xs: evaluate(jaxpr, xs, same, mesh=mesh, rename=RENAME),
        in_shardings=NamedSharding(mesh, P()),
    )
    args = [np.asarray(x) for x in arguments()]
    expected = step(*args)
    step.clear_cache()
    with jax.set_mesh(user_mesh(kind)):
        [got] = step(*args)
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected[0]), rtol=1e-6)


def test_a_manual_axis_of_another_size_is_an_error():
    jaxpr = jax.make_jaxpr(manual_sum)(*arguments())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    line = manual_sum.__code__.co_firstlineno + 5
    with pytest.raises(InputError, match=r"manual over axis 'dp' of size 4") as error:
        evaluate(jaxpr, arguments(), same, mesh=mesh, rename={"dp": "data"})
    assert f"structures.py:{line}" in str(error.value)


@pytest.mark.parametrize("fn", [manual_sum, manual_kernel])
def test_a_mesh_may_have_the_users_names(fn):
    """And more axes, and another order of devices."""
    jaxpr = jax.make_jaxpr(fn)(*arguments())
    mesh = jax.make_mesh((1, 2, 4), ("x", "mp", "dp"), axis_types=(AxisType.Auto,) * 3)
    [got] = jax.jit(lambda *xs: evaluate(jaxpr, xs, same, mesh=mesh))(*arguments())
    np.testing.assert_allclose(got, fn(*arguments()), rtol=1e-5)


def test_without_a_mesh_a_manual_region_stays_on_the_users():
    jaxpr = jax.make_jaxpr(manual_sum)(*arguments())
    [got] = jax.jit(lambda *xs: evaluate(jaxpr, xs, same))(*arguments())
    np.testing.assert_allclose(got, manual_sum(*arguments()), rtol=1e-5)


def test_a_foreign_call_is_run_as_told():
    jaxpr = jax.make_jaxpr(own_kernel)(*arguments())
    calls = []

    def foreign(address, eqn, values):
        if eqn.primitive.name != "pallas_call":
            return None
        calls.append((address.removeprefix("double/"), [v.shape for v in values]))
        return [values[0] * 3.0]

    [got] = evaluate(jaxpr, arguments(), same, foreign=foreign)
    x = arguments()[1]
    np.testing.assert_allclose(got, 3 * x.sum() + 3 * (x + 1).sum(), rtol=1e-5)
    assert calls == [
        ("pallas_call[double]#0", [(8, 4)]),
        ("pallas_call[double]#1", [(8, 4)]),
    ]


def test_a_foreign_call_sees_placed_operands_and_its_results_are_placed():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x) + 1.0)(0.0)

    def place(address, slot, value):
        return value + {"in0": 1.0, "out0": 10.0}[slot] * (address == "sin#0")

    def foreign(address, eqn, values):
        return [values[0] * 2] if address == "sin#0" else None

    assert evaluate(jaxpr, [3.0], place, foreign=foreign) == [(3 + 1) * 2 + 10 + 1]
