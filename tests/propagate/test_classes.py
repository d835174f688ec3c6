"""Dim classes: what is tied, what it is called, and that order does not matter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st
from propagate.programs import (
    ACTIVATIONS,
    ATTENTION_WEIGHTS,
    MLP_WEIGHTS,
    attention,
    mlp,
    shape,
    stacked_step,
)

from autoshard.ir.annotate import annotate
from autoshard.ir.trace import trace
from autoshard.plan.sharded import Layout
from autoshard.propagate import find_classes, propagate


def classes_of(fn, args):
    """Classes, and the class per dim of each input and output."""
    traced = trace(fn, args)
    classes = find_classes(traced)
    ends = [*traced.program.inputs, *traced.program.outputs]
    return traced, classes, [classes.of_value[v] for v in ends]


def partition(dims):
    """Classes numbered by first appearance, so that partitions can be compared."""
    numbers = {}
    return [[numbers.setdefault(c, len(numbers)) for c in value] for value in dims]


def test_a_product_ties_its_dims_like_an_einsum():
    _, _, dims = classes_of(lambda w, x: x @ w, [shape(4, 8), shape(6, 4)])
    # w[j k], x[i j] -> [i k]
    assert partition(dims) == [[0, 1], [2, 0], [2, 1]]


def test_names_come_from_data_annotations_and_roles():
    _, classes, (down, up, x, out) = classes_of(mlp, [MLP_WEIGHTS, ACTIVATIONS])
    named = {c: names for c, names in classes.names.items() if names}
    assert [named[c] for c in x] == [("batch",), ("seq",), ("embed",)]
    assert [named[c] for c in up] == [("embed",), ("mlp",)]
    assert [named[c] for c in down] == [("mlp",), ("embed",)]
    assert out == x


def test_a_width_beside_a_named_one_has_no_role():
    """Heads are named and their width is not: it is no second hidden width."""
    args = [ATTENTION_WEIGHTS, ACTIVATIONS]
    traced, classes, _ = classes_of(attention, args)
    for value, info in zip(traced.program.inputs, traced.inputs, strict=True):
        if info.state == "params":
            names = {classes.names.get(c, ("-",))[0] for c in classes.of_value[value]}
            assert names == {"embed", "heads", "-"}, info.path


def test_all_names_of_a_class_are_kept():
    def fn(w, x):
        return annotate(x, "batch", "one") + annotate(w, None, "two")

    _, classes, dims = classes_of(fn, [shape(8, 4), shape(8, 4)])
    assert set(classes.names[dims[0][1]]) == {"one", "two"}


def test_a_name_on_a_dim_of_size_one_names_nothing():
    _, classes, _ = classes_of(
        lambda w, x: annotate(x, "batch", "one") * w, [shape(8, 1), shape(8, 1)]
    )
    assert all("one" not in names for names in classes.names.values())


def test_a_loop_ties_its_inside_to_its_outside():
    traced, classes, _ = classes_of(stacked_step(), [ACTIVATIONS])
    named = {
        info.path: [classes.names.get(c, ("",))[0] for c in classes.of_value[v]]
        for info, v in zip(traced.inputs, traced.program.inputs, strict=True)
    }
    assert named["params/up"] == ["layers", "embed", "mlp"]
    # The optimizer's arithmetic ties its state to the parameters.
    assert named["opt_state/0/mu/up"] == named["params/up"]
    assert named["batch"] == ["batch", "seq", "embed"]


# -- order -----------------------------------------------------------------------

SIZE = 4
OPS = {
    "add": (2, jnp.add),
    "dot": (2, jnp.dot),
    "tanh": (1, jnp.tanh),
    "transpose": (1, jnp.transpose),
    "softmax": (1, jax.nn.softmax),
    "name": (1, lambda x: annotate(x, "left", "right")),
}


@st.composite
def programs(draw):
    """Nodes, each an op on two arguments or earlier nodes, and another valid order."""
    nodes = []
    for k in range(draw(st.integers(1, 8))):
        name = draw(st.sampled_from(sorted(OPS)))
        sources = st.integers(-2, k - 1)
        nodes.append((name, [draw(sources) for _ in range(OPS[name][0])]))
    order, left = [], set(range(len(nodes)))
    while left:
        ready = [k for k in sorted(left) if not left.intersection(nodes[k][1])]
        order.append(draw(st.sampled_from(ready)))
        left.remove(order[-1])
    return nodes, order


def run_in(nodes, order):
    """A function that computes the nodes in this order and returns all of them."""

    def fn(w, x):
        made = {-2: w, -1: x}
        for k in order:
            name, sources = nodes[k]
            made[k] = OPS[name][1](*(made[s] for s in sources))
        return tuple(made[k] for k in range(len(nodes)))

    return fn


@given(programs())
@settings(max_examples=40, deadline=None)
def test_classes_and_specs_do_not_depend_on_the_order_of_ops(program):
    nodes, order = program
    args = [shape(SIZE, SIZE)] * 2
    layout = Layout(
        rules=(("left", ("tensor",)), ("batch", ("data",)), ("right", ("fsdp",)))
    )
    found = []
    for each in (range(len(nodes)), order):
        traced, classes, dims = classes_of(run_in(nodes, each), args)
        sharded = propagate(traced, classes, layout)
        ends = [*traced.program.inputs, *traced.program.outputs]
        found.append(
            (
                partition(dims),
                [[set(classes.names.get(c, ())) for c in value] for value in dims],
                [sharded.specs[v] for v in ends],
                sorted(map(repr, sharded.divides)),
            )
        )
    assert found[0] == found[1]
