"""What a program says of loops, branches, manual regions and calls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ir.structures import (
    arguments,
    manual_in_manual,
    mapped,
    own_kernel,
    pinned_call,
    solved,
)
from jax import lax
from jax.sharding import PartitionSpec as P

from autoshard.ir.program import LINK, build

# -- what a program says of each structure ---------------------------------------


def links(program):
    return [
        (op.params["kind"], op.address) for op in program.ops if op.primitive == LINK
    ]


def program_of(fn, *args):
    return build(jax.make_jaxpr(fn)(*(args or arguments())), [])


@pytest.mark.parametrize(
    ("start", "more", "step", "trips"),
    [
        (0, lambda i: i < 7, lambda i: i + 2, 4),
        (0, lambda i: i <= 6, lambda i: 2 + i, 4),
        (7, lambda i: i > 0, lambda i: i - 3, 3),
        (7, lambda i: lax.le(0, i), lambda i: i - 1, 8),
        (0, lambda i: i != 9, lambda i: i + 3, 3),
        (5, lambda i: i < 5, lambda i: i + 1, 0),
        (np.int8(1), lambda i: lax.gt(np.int8(4), i), lambda i: i + 1, 3),
        (0, lambda i: i.astype(jnp.int16) < 3, lambda i: i + 1, 3),
    ],
)
def test_a_counting_loop_has_its_trips(start, more, step, trips):
    def fn(x):
        return lax.while_loop(
            lambda c: more(c[0]), lambda c: (step(c[0]), c[1] + 1.0), (start, x)
        )

    program = program_of(fn, 0.0)
    # Counted by running it.
    assert trips == float(jax.jit(fn)(0.0)[1])
    assert (program.regions[1].trips, program.regions[1].note) == (trips, "")
    # The condition is a part of each run.
    assert (program.regions[2].parent, program.regions[2].trips) == (1, 1)


def test_bounds_are_found_through_calls_carries_and_arithmetic():
    @jax.jit
    def counted(x, first, last):
        return lax.fori_loop(first, last * 2, lambda i, c: jnp.sin(c), x)

    program = program_of(lambda x: counted(x, 1, 5), 0.0)
    assert [r.trips for r in program.regions[1:]] == [9, 1]


@pytest.mark.parametrize(
    ("start", "more", "step"),
    [
        (0, lambda i: i < 7, lambda i: i - 1),  # no end
        (0, lambda i: i < 7, lambda i: i * 2 + 1),
        (0, lambda i: i != 7, lambda i: i + 2),
        (0.0, lambda i: i < 7, lambda i: i + 1),
        (0, lambda i: (i < 7) & (i < 9), lambda i: i + 1),
    ],
)
def test_another_loop_counts_once_and_says_so(start, more, step):
    def fn(x):
        return lax.while_loop(
            lambda c: more(c[0]), lambda c: (step(c[0]), c[1]), (start, x)
        )

    region = program_of(fn, 0.0).regions[1]
    assert region.trips == 1
    line = fn.__code__.co_firstlineno + 1
    assert f"test_regions.py:{line}" in region.note
    assert "counted once" in region.note


def test_a_loop_whose_bound_is_an_argument_is_not_known():
    def fn(n, x):
        return lax.fori_loop(0, n, lambda i, c: c + x, x)

    program = program_of(fn, 3, 1.0)
    assert "counted once" in program.regions[1].note


def test_links_of_a_while_loop():
    def fn(x, w):
        def body(c):
            return c[0] + 1, c[1] @ w, c[1]

        return lax.while_loop(lambda c: c[0] < 3, body, (0, x, x))

    x = jnp.ones((4, 4))
    program = program_of(fn, x, x)
    address = "while#0"
    assert links(program) == [
        ("carry_in", f"{address}:in2"),  # after one constant and a literal
        ("carry_in", f"{address}:in3"),
        ("carry", f"{address}:carry0"),
        ("carry", f"{address}:carry1"),
        ("carry", f"{address}:carry2"),
        ("carry_out", f"{address}:out0"),
        ("carry_out", f"{address}:out1"),
        ("carry_out", f"{address}:out2"),
    ]
    [dot] = [op for op in program.ops if op.primitive == "dot_general"]
    assert dot.address == f"{address}/dot_general#0"
    assert dot.inputs[1] == program.inputs[1]  # loop-invariant: the same value
    [test] = [op for op in program.ops if op.primitive == "lt"]
    assert test.address == f"{address}:cond/lt#0"
    # The test reads what the run begins with.
    carry = next(op for op in program.ops if op.address == f"{address}:carry0")
    assert test.inputs[0] == carry.outputs[0]


def test_a_branch_is_counted_where_it_costs_most():
    w = jnp.ones((4, 4))

    def fn(x):
        small = lax.cond(x[0, 0] > 0, lambda x: x * 3.0, lambda x: x @ w, x)
        return lax.cond(
            x[0, 0] > 0,
            lambda x: lax.fori_loop(0, 9, lambda i, x: jnp.sin(x), x),
            lambda x: jnp.cos(jnp.cos(x)),
            small,
        )

    program = program_of(fn, w)
    # Branch 0 is the one for False.
    trips = {
        op.primitive: program.runs(op.region)
        for op in program.ops
        if op.primitive in ("mul", "dot_general", "sin", "cos")
    }
    assert trips == {"mul": 0, "dot_general": 1, "sin": 9, "cos": 0}
    skipped = [r for r in program.regions if r.trips == 0]
    line = fn.__code__.co_firstlineno
    for skip, n in zip(skipped, (1, 2), strict=True):
        assert f"test_regions.py:{line + n}" in skip.note
    assert all("costs more" in r.note for r in skipped)


def test_links_of_a_cond():
    program = program_of(
        lambda x, y: lax.cond(
            x[0] > 0, lambda x, y: (x, 1.0), lambda x, y: (y, y[0]), x, y
        ),
        jnp.ones(4),
        jnp.ones(4),
    )
    assert links(program) == [
        # A branch takes what it uses; a literal has no link.
        ("branch_in", "cond#0:0:in2"),
        ("branch_out", "cond#0:0:out0"),
        ("branch_out", "cond#0:0:out1"),
        ("branch_in", "cond#0:1:in1"),
        ("branch_out", "cond#0:1:out0"),
    ]
    out = [op for op in program.ops if op.params.get("kind") == "branch_out"]
    assert out[0].outputs == out[2].outputs == (program.outputs[0],)
    assert program.values[program.outputs[0]].region == 0
    assert [r.parent for r in program.regions] == [-1, 0, 0]


def test_a_manual_region_names_the_axes_of_the_user():
    def body(x, y):
        def step(c, _):
            return lax.psum(c, "mp"), None

        return lax.scan(step, x, None, length=2)[0] + y

    fn = mapped(
        body,
        (P(("dp", "mp"), None), P(None, "dp")),
        P("dp"),
        check_vma=False,
    )
    program = program_of(fn, jnp.ones((16, 3)), jnp.ones((2, 12)))
    found = {
        op.address: (
            op.params["names"],
            program.values[op.inputs[0]].shape,
            program.values[op.outputs[0]].shape,
        )
        for op in program.ops
        if op.params.get("kind", "").startswith("manual")
    }
    assert found == {
        "shard_map#0:in0": ((("dp", "mp"), ()), (16, 3), (2, 3)),
        "shard_map#0:in1": (((), ("dp",)), (2, 12), (2, 3)),
        "shard_map#0:out0": ((("dp",), ()), (2, 3), (8, 3)),
    }
    sizes = {"dp": 4, "mp": 2}
    # The loop inside is as manual as what it stands in.
    assert [r.manual for r in program.regions] == [{}, sizes, sizes]
    psum = next(op for op in program.ops if op.primitive.startswith("psum"))
    assert psum.address == f"shard_map#0/scan#0/{psum.primitive}#0"
    assert program.runs(psum.region) == 2


def test_a_partly_manual_region_in_another_adds_its_axes():
    program = program_of(manual_in_manual)
    assert [r.manual for r in program.regions] == [{}, {"dp": 4}, {"dp": 4, "mp": 2}]


def test_what_an_inner_jit_pins_is_a_constraint():
    program = program_of(pinned_call)
    pins = [op for op in program.ops if op.primitive == "sharding_constraint"]
    assert [(op.address, op.params["sharding"].spec) for op in pins] == [
        ("jit#0:in0", P("dp")),
        ("jit#0:out0", P("dp", "mp")),
    ]
    [sin] = [op for op in program.ops if op.primitive == "sin"]
    assert sin.inputs == pins[0].outputs
    assert pins[0].inputs == (program.inputs[1],)
    line = pinned_call.__code__.co_firstlineno
    assert f"structures.py:{line + 7}" in pins[0].source
    assert pins[0].operand_shapes == ((8, 4),)


def test_a_jit_that_pins_nothing_leaves_no_trace():
    def fn(x):
        return jax.jit(jnp.sin)(x)

    assert [op.address for op in program_of(fn, 1.0).ops] == ["sin#0"]


def test_a_kernel_goes_by_its_name():
    found = [op for op in program_of(own_kernel).ops if op.primitive == "pallas_call"]
    # JAX may open a scope of that name too.
    assert [op.address.removeprefix("double/") for op in found] == [
        "pallas_call[double]#0",
        "pallas_call[double]#1",
    ]


def test_only_the_solution_of_a_linear_solve_is_evaluated():
    names = [op.primitive for op in program_of(solved).ops]
    assert names.count("triangular_solve") == 2
    assert "custom_linear_solve" not in names
