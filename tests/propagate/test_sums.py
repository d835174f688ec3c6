"""Partial sums that are added first and reduced once."""

from __future__ import annotations

import jax.numpy as jnp
from propagate.programs import collectives, shape, shard

from autoshard.ir.annotate import annotate
from autoshard.ir.trace import trace
from autoshard.propagate.sums import trees

TENSOR = ("tensor",)
RULES = {"hidden": TENSOR, "batch": ("data",)}


def hidden(x):
    return annotate(x, "batch", "hidden")


def two(ws, x):
    a, b = (hidden(x @ ws[f"in{k}"]) for k in (0, 1))
    return a @ ws["out0"] + b @ ws["out1"]


WEIGHTS = {
    **{f"in{k}": shape(16, 32) for k in range(3)},
    **{f"out{k}": shape(32, 16) for k in range(3)},
}
X = shape(8, 16)


def sums(fn, rules=None, args=(WEIGHTS, X), **storage):
    sharded = shard(fn, list(args), RULES if rules is None else rules, **storage)
    moves = [c for c in collectives(sharded) if c[0] != "slice"]
    return sharded, [(kind, axes) for kind, axes, _ in moves]


def test_two_products_that_are_added_are_reduced_once():
    sharded, moves = sums(two)
    assert moves == [("all_reduce", "tensor")]
    (sum_,) = sharded.delayed
    assert (len(sum_.roots), len(sum_.carriers), sum_.axes) == (2, 1, TENSOR)


def test_what_is_no_partial_sum_is_added_behind_the_reduction():
    def fn(ws, x):
        return x + two(ws, x)  # jnp adds left to right: (a + b) first, then x

    def first(ws, x):
        a, b = (hidden(x @ ws[f"in{k}"]) for k in (0, 1))
        return (x + a @ ws["out0"]) + b @ ws["out1"]

    for each in (fn, first):
        sharded, moves = sums(each)
        assert moves == [("all_reduce", "tensor")]
        assert len(sharded.delayed) == 1


def test_three_products_and_a_difference():
    def fn(ws, x):
        a, b, c = (hidden(x @ ws[f"in{k}"]) @ ws[f"out{k}"] for k in range(3))
        return (a - b) + (-c)

    sharded, moves = sums(fn)
    assert moves == [("all_reduce", "tensor")]
    assert [len(s.roots) for s in sharded.delayed] == [3]


def test_a_sum_that_is_wanted_in_pieces_is_scattered():
    def fn(ws, x):
        return annotate(two(ws, x), "batch", "embed")

    _, moves = sums(fn, {**RULES, "embed": TENSOR})
    # x has the embed dim too, so it is gathered for the first products.
    assert ("reduce_scatter", "tensor") in moves
    assert ("all_reduce", "tensor") not in moves


def test_products_reduced_over_different_axes_are_not_mixed():
    def fn(ws, x):
        a = annotate(x @ ws["in0"], "batch", "hidden") @ ws["out0"]
        b = annotate(x @ ws["in1"], "batch", "other") @ ws["out1"]
        return a + b

    sharded, moves = sums(fn, {**RULES, "other": ("fsdp",)})
    assert sharded.delayed == ()
    assert sorted(moves) == [("all_reduce", "fsdp"), ("all_reduce", "tensor")]


def test_a_product_that_is_used_twice_is_reduced_by_itself():
    def fn(ws, x):
        a = hidden(x @ ws["in0"]) @ ws["out0"]
        return a + hidden(x @ ws["in1"]) @ ws["out1"], a

    sharded, moves = sums(fn)
    assert sharded.delayed == ()
    assert moves == [("all_reduce", "tensor")] * 2


def test_without_a_reduction_there_is_nothing_to_delay():
    sharded, moves = sums(two, {"batch": ("data",)})
    assert (sharded.delayed, moves) == ((), [])


def test_a_nonlinear_op_ends_a_sum():
    def fn(ws, x):
        a, b = (hidden(x @ ws[f"in{k}"]) @ ws[f"out{k}"] for k in (0, 1))
        return jnp.tanh(a) + b

    sharded, moves = sums(fn)
    assert sharded.delayed == ()
    assert moves == [("all_reduce", "tensor")] * 2


def test_trees_are_those_of_the_program():
    (tree,) = trees(trace(two, [WEIGHTS, X]).program)
    ops = trace(two, [WEIGHTS, X]).program.ops
    assert [ops[i].primitive for i in tree.roots] == ["dot_general"] * 2
    assert [ops[i].primitive for i in tree.rest] == ["add"]
