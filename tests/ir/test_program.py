"""Building a `Program` from a jaxpr."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autoshard.ir.program import build

X = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def program(fn, *args):
    return build(jax.make_jaxpr(fn)(*args), [f"arg{i}" for i in range(len(args))])


def names(built):
    return [op.primitive for op in built.ops]


def check(built):
    """What every program must keep: indices, producers, and order of execution."""
    made = set(built.inputs)
    for v in built.values:
        maker = built.ops[v.producer] if v.producer >= 0 else None
        # Constants, and what a loop carries from a literal on.
        if maker is None or maker.params.get("kind") == "carry":
            made.add(v.index)
    assert [v.index for v in built.values] == list(range(len(built.values)))
    for index, op in enumerate(built.ops):
        assert op.index == index
        assert all(v in made for v in op.inputs if v >= 0), op
        for v in op.outputs:
            back = op.primitive == "link" and op.params["kind"] == "carry"
            assert back or built.values[v].producer == index
            made.add(v)
    assert len({op.address for op in built.ops}) == len(built.ops)


def test_ops_and_values_of_a_plain_function():
    built = program(lambda w, x: jnp.tanh(x @ w), X, X)
    check(built)
    assert names(built) == ["dot_general", "tanh"]
    dot, tanh = built.ops
    assert dot.inputs == (built.inputs[1], built.inputs[0])
    assert tanh.inputs == dot.outputs
    assert built.outputs == tanh.outputs
    value = built.values[dot.outputs[0]]
    assert (value.shape, str(value.dtype), value.bytes_) == ((4, 4), "float32", 64)
    assert "test_program.py" in dot.source


def test_a_loop_is_its_body_and_links():
    def fn(c, w, xs):
        return lax.scan(lambda c, x: (c @ w + x, c.sum()), c, xs)

    built = program(fn, X, X, jax.ShapeDtypeStruct((3, 4, 4), jnp.float32))
    check(built)
    kinds = {
        op.params["kind"]: (op.params["lead"], op.region)
        for op in built.ops
        if op.primitive == "link"
    }
    assert kinds == {
        "carry_in": (False, 1),
        "slice": (True, 1),
        "carry": (False, 1),
        "stack": (True, 1),
        "carry_out": (False, 0),
    }
    [dot] = [op for op in built.ops if op.primitive == "dot_general"]
    # A loop-invariant operand is the same value inside.
    assert dot.inputs[1] == built.inputs[1]
    assert (built.regions[1].parent, built.regions[1].trips) == (0, 3)
    assert (built.runs(0), built.runs(1)) == (1, 3)
    [back] = [op for op in built.ops if op.params.get("kind") == "carry"]
    [enter] = [op for op in built.ops if op.params.get("kind") == "carry_in"]
    assert back.outputs == enter.outputs


def test_trip_counts_of_nested_loops_multiply():
    def inner(c, _):
        return lax.fori_loop(0, 5, lambda i, c: jnp.sin(c), c), None

    built = program(lambda c: lax.scan(inner, c, None, length=3)[0], X)
    check(built)
    [sin] = [op for op in built.ops if op.primitive == "sin"]
    assert built.runs(sin.region) == 15
    assert built.regions[sin.region].parent == 1


def test_calls_are_written_in_place():
    @jax.custom_jvp
    def twice(x):
        return 2 * x

    twice.defjvp(lambda p, t: (twice(p[0]), 2 * t[0]))

    def calls(x):
        return jax.checkpoint(jnp.cos)(jax.jit(lambda y: twice(jnp.sin(y)))(x))

    built = program(calls, X)
    check(built)
    assert names(built) == ["sin", "mul", "cos"]
    flat = program(lambda x: jnp.cos(2 * jnp.sin(x)), X)
    assert built.fingerprint == flat.fingerprint


def test_literals_and_constants_are_no_arguments():
    table = np.arange(16, dtype=np.float32).reshape(4, 4)

    @jax.jit
    def scaled(x, by):
        return x * by

    built = program(lambda x: scaled(x + 1.0, 3.0) @ table, X)
    check(built)
    add, mul, dot = [op for op in built.ops if op.primitive != "convert_element_type"]
    assert add.inputs == (built.inputs[0], -1)
    assert add.operand_shapes == ((4, 4), ())
    assert mul.inputs[0] == add.outputs[0]
    held = built.values[dot.inputs[1]]
    assert (held.shape, held.producer) == ((4, 4), -1)
    assert held.index not in built.inputs


def test_a_result_may_be_an_argument_or_a_literal():
    built = program(lambda x: (x, 1.0), X)
    assert built.outputs == (built.inputs[0], -1)


def test_scope_reaches_into_calls_and_loops():
    def fn(x):
        with jax.named_scope("outer"):
            x = jax.jit(jnp.sin)(x)
            return lax.scan(lambda c, _: (jnp.cos(c), None), x, None, length=2)[0]

    scopes = {op.primitive: op.scope for op in program(fn, X).ops}
    assert scopes["sin"] == scopes["cos"] == "outer"


# -- fingerprints ----------------------------------------------------------------


def test_a_fingerprint_is_blind_to_names_and_lines():
    def one(w, x):
        hidden = jnp.tanh(x @ w)
        return hidden.sum()

    def other(kernel, batch):
        with jax.named_scope("renamed"):
            a = batch @ kernel
            return jnp.tanh(a).sum()

    assert program(one, X, X).fingerprint == program(other, X, X).fingerprint


def test_a_fingerprint_tells_programs_apart():
    wide = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    half = jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)

    def repeated(count):
        return lambda x: lax.fori_loop(0, count, lambda i, c: jnp.sin(c), x)

    programs = [
        program(jnp.sin, X),
        program(jnp.cos, X),
        program(jnp.sin, wide),
        program(jnp.sin, half),
        program(repeated(2), X),
        program(repeated(3), X),
        program(lambda x, y: x @ y, X, X),
        program(lambda x, y: y @ x, X, X),
        # The same primitive and shapes, over other dims.
        program(lambda x, y: jnp.einsum("ij,kj->ik", x, y), X, X),
        program(lambda x: x.sum(0), X),
        program(lambda x: x.sum(1), X),
    ]
    assert len({built.fingerprint for built in programs}) == len(programs)
