"""The builder and the interpreter walk alike, and evaluating changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from autoshard.ir.interpret import evaluate
from autoshard.ir.program import build

TABLE = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)


@jax.custom_vjp
def _bent(x):
    return jnp.sin(x)


_bent.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * jnp.cos(x) * 0.5,))


def _layer(w, x):
    return jnp.tanh(jax.jit(lambda a, b: a @ b)(x, w)) + TABLE


def nested_loops(ws, x):
    def inner(c, w):
        return _layer(w, c), c.sum()

    def outer(c, _):
        c, sums = lax.scan(inner, c, ws)
        return c, sums

    x, sums = lax.scan(outer, x, None, length=2)
    return x.sum() + (sums**2).sum()


def rematerialised_loop(ws, x):
    return lax.scan(lambda c, w: (jax.checkpoint(_layer)(w, c), None), x, ws)[0].sum()


def rematerialised_calls(ws, x):
    for i in range(3):
        with jax.named_scope(f"layer{i}"):
            x = jax.checkpoint(lambda w, x: _layer(w, _bent(x)) * 2.0)(ws[i], x)
    return jnp.where(x > 0, x, 0.1 * x).mean()


def carries_of_every_kind(ws, x):
    """A carry that starts as a literal, one that never changes, a reversed loop."""

    def body(carry, w):
        total, same, x = carry
        return (total + x.sum(), same, x @ w), total

    (total, same, x), totals = lax.scan(body, (0.0, x, x), ws, reverse=True)
    return total + (same * x).sum() + totals.sum()


FUNCTIONS = [
    nested_loops,
    rematerialised_loop,
    rematerialised_calls,
    carries_of_every_kind,
]
both = pytest.mark.parametrize("fn", FUNCTIONS)
derivative = pytest.mark.parametrize("grad", [False, True])


def arguments():
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32),
        jnp.asarray(rng.normal(size=(4, 4)), jnp.float32),
    ]


def traced(fn, grad):
    return jax.make_jaxpr(jax.grad(fn, argnums=(0, 1)) if grad else fn)(*arguments())


@both
@derivative
def test_evaluating_gives_the_same_result(fn, grad):
    expected = jax.jit(jax.grad(fn, argnums=(0, 1)) if grad else fn)(*arguments())
    jaxpr = traced(fn, grad)
    got = jax.jit(lambda *xs: evaluate(jaxpr, xs, lambda a, s, v: v))(*arguments())
    for a, b in zip(got, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@both
@derivative
def test_every_slot_of_every_op_is_visited(fn, grad):
    jaxpr = traced(fn, grad)
    program = build(jaxpr, [])
    visited = []
    jax.make_jaxpr(
        lambda *xs: evaluate(jaxpr, xs, lambda a, s, v: (visited.append((a, s)), v)[1])
    )(*arguments())
    assert len(visited) == len(set(visited))
    ops = [op for op in program.ops if op.primitive != "link"]
    expected = {(op.address, f"out{k}") for op in ops for k in range(len(op.outputs))}
    expected |= {
        (op.address, f"in{k}") for op in ops for k, v in enumerate(op.inputs) if v >= 0
    }
    for op in program.ops:
        if op.primitive == "link":
            # What a loop carries out is on its way in the body, as the carry.
            inside = op.params["kind"] != "carry_out"
            expected |= {(op.address, "in0")} if inside else set()
            expected |= {(op.address, "out0")}
    # A carry that starts as a literal has no link in, only one from run to run.
    assert set(visited) == expected


@both
def test_values_have_the_shapes_the_program_says(fn):
    jaxpr = traced(fn, True)
    program = build(jaxpr, [])
    shapes = {}
    for op in program.ops:
        for side, values in (("in", op.inputs), ("out", op.outputs)):
            for k, v in enumerate(values):
                if v >= 0:
                    shapes[op.address, f"{side}{k}"] = program.values[v].shape

    def place(address, slot, value):
        if (address, slot) in shapes:
            assert value.shape == shapes.pop((address, slot))
        return value

    jax.make_jaxpr(lambda *xs: evaluate(jaxpr, xs, place))(*arguments())
    # Each loop value has two names; the lowering uses the one on the inside.
    assert all(":carry" in a or ":out" in a for a, _ in shapes)


def test_what_place_returns_goes_on():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x) + 1.0)(0.0)

    def place(address, slot, value):
        return value * 0 + 5.0 if (address, slot) == ("sin#0", "out0") else value

    assert evaluate(jaxpr, [0.0], place) == [6.0]


def test_place_reaches_into_loops_and_remat():
    def fn(x):
        return lax.scan(lambda c, _: (jax.checkpoint(jnp.sin)(c), None), x, None, 3)[0]

    jaxpr = jax.make_jaxpr(fn)(0.0)
    [address] = [op.address for op in build(jaxpr, []).ops if op.primitive == "sin"]

    def place(at, slot, value):
        return value + 1.0 if (at, slot) == (address, "out0") else value

    x = 0.5
    for _ in range(3):
        x = np.sin(x) + 1.0
    np.testing.assert_allclose(evaluate(jaxpr, [0.5], place)[0], x, rtol=1e-6)


# -- addresses -------------------------------------------------------------------


def addresses(fn):
    return [op.address for op in build(jax.make_jaxpr(fn)(*arguments()), []).ops]


def test_a_renamed_variable_moves_no_address():
    def one(ws, x):
        hidden = jnp.tanh(x @ ws[0])
        return hidden @ ws[1]

    def other(weights, batch):
        a = batch @ weights[0]
        b = jnp.tanh(a)
        return b @ weights[1]

    assert sorted(addresses(one)) == sorted(addresses(other))


@both
def test_an_edit_elsewhere_moves_no_address(fn):
    def edited(ws, x):
        with jax.named_scope("new"):
            extra = jnp.cosh(ws[0] @ x)
        return fn(ws, x), extra

    before, after = addresses(fn), addresses(edited)
    assert set(before) < set(after)
    assert len(after) == len(set(after))


def test_an_address_tells_scope_loop_and_ordinal():
    def fn(ws, x):
        with jax.named_scope("a"):
            x = jnp.sin(jnp.sin(x))
        return lax.scan(lambda c, w: (jnp.sin(c) + w, None), x, ws)[0]

    found = [a for a in addresses(fn) if "sin" in a]
    assert found == ["a/sin#0", "a/sin#1", "scan#0/sin#0"]
