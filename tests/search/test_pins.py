"""Which values are pinned, and that an axis of one device pins nothing."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from propagate.programs import shape

from autoshard.ir.seeds import Seed
from autoshard.ir.trace import trace
from autoshard.plan.sharded import Layout
from autoshard.propagate import find_classes, propagate
from autoshard.search.pins import constraints

TENSOR = ("tensor",)


@pytest.fixture(scope="module")
def product():
    """`x @ w`, where the columns of x and those of w are over the same axis."""
    traced = trace(lambda w, x: jnp.tanh(x @ w), [shape(16, 64), shape(8, 16)])
    w, x = traced.program.inputs
    seeds = (
        Seed(w, (None, TENSOR), "test", "w"),
        Seed(x, (("data",), TENSOR), "test", "x"),
    )
    traced = replace(traced, seeds=seeds)
    return propagate(traced, find_classes(traced), Layout(rules=()))


def pins(sharded, **sizes):
    return {(c.slot, str(c.spec)) for c in constraints(sharded, sizes)}


def test_an_operand_that_is_gathered_is_pinned(product):
    assert ("in0", "Spec[data, -]") in pins(product, data=2, tensor=4)


def test_axes_of_one_device_are_in_no_spec(product):
    assert ("in0", "Spec[-, -]") in pins(product, data=1, tensor=4)


def test_what_moves_over_one_device_only_is_not_pinned(product):
    assert product.reshards
    assert pins(product, data=8, tensor=1) == set()


def test_what_a_loop_takes_whole_and_divided_is_pinned_where_it_is_whole():
    # XLA gives it one spec for all of the loop.
    def fn(w, x):
        def body(x, _):
            return jnp.tanh(x @ w), w.argmin(axis=0)

        return jax.lax.scan(body, x, None, length=3)

    traced = trace(fn, [shape(8, 8), shape(4, 8)])
    least = traced.program.outputs[1]
    seeds = (
        Seed(traced.program.inputs[0], ((), ()), "test", "w"),
        Seed(least, (None, TENSOR), "test", "least"),
    )
    traced = replace(traced, seeds=seeds)
    sharded = propagate(traced, find_classes(traced), Layout(rules=()))
    taken = {
        c.address: str(c.spec)
        for c in constraints(sharded, {"tensor": 2})
        if c.slot in ("in0", "in1")
    }
    assert taken["scan#0/argmin#0"] == "Spec[-, tensor]"
    assert taken["scan#0/dot_general#0"] == "Spec[-, -]"
