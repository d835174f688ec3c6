"""Every op names a line of the user's, also inside of library functions."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
from jax import lax

from autoshard.ir.interpret import evaluate
from autoshard.ir.program import build


def line_of(fn, part):
    lines, first = inspect.getsourcelines(fn)
    [at] = [k for k, text in enumerate(lines) if part in text]
    return f"test_source.py:{first + at}:"


def twice(x):
    first = jnp.cumsum(x, 1)
    return jnp.cumsum(first, 0)


@jax.jit
def inner(x):
    return jnp.where(x > 0, x, 1.0)


def outer(x):
    return inner(x) + 1


def looped(x):
    def body(c, row):
        c = c + jnp.cumsum(row)
        return c, c

    return lax.scan(body, x[0], x)


def sources(fn, primitive):
    program = build(jax.make_jaxpr(fn)(jnp.ones((4, 6))), [])
    return [op.source for op in program.ops if op.primitive == primitive]


def test_a_library_function_has_the_line_of_its_call():
    """Also where JAX has traced it before, for another line."""
    first, second = sources(twice, "cumsum")
    assert line_of(twice, "cumsum(x") in first
    assert line_of(twice, "cumsum(first") in second


def test_a_function_of_the_users_has_its_own_line():
    [gt] = sources(outer, "gt")
    [select] = sources(outer, "select_n")
    assert line_of(inner.__wrapped__, "where") in gt
    assert line_of(inner.__wrapped__, "where") in select


def test_a_library_function_in_a_loop():
    [found] = sources(looped, "cumsum")
    assert line_of(looped, "cumsum") in found


def test_every_op_of_a_program_has_a_line():
    program = build(jax.make_jaxpr(looped)(jnp.ones((4, 6))), [])
    assert all("test_source.py:" in op.source for op in program.ops)


def test_what_is_evaluated_again_keeps_the_lines():
    jaxpr = jax.make_jaxpr(twice)(jnp.ones((4, 6)))

    def again(x):
        [out] = evaluate(jaxpr, [x], lambda address, slot, value: value)
        return out

    first, second = sources(again, "cumsum")
    assert line_of(twice, "cumsum(x") in first
    assert line_of(twice, "cumsum(first") in second
