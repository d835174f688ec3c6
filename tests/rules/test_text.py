"""The text of every rule, against the one derived by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from rules.case import program_of
from rules.cases import ALL, CASES, NOT_PRODUCED, SHAPE

from autoshard.ir.program import build
from autoshard.rules import covered, rule_of
from autoshard.rules.core import FactorRule, Factors, same_dim
from autoshard.rules.registry import example_rule


def _label(case):
    return f"{case.primitive}: {case.text}"


@pytest.mark.parametrize("case", CASES, ids=_label)
def test_text(case):
    program, op = program_of(case)
    assert rule_of(program, op).text == case.text


def _links(program):
    links = [op for op in program.ops if op.primitive == "link"]
    return {op.params["kind"]: rule_of(program, op).text for op in links}


def test_links_of_a_loop():
    [case] = [c for c in SHAPE if c.primitive == "link"]
    program, _ = program_of(case)
    assert _links(program) == {
        "carry_in": "i -> i {i=4}",
        "slice": "i j -> j {i=3 j=4} blocked i",
        "carry": "i -> i {i=4}",
        "stack": "j -> i j {i=3 j=4} blocked i",
        "carry_out": "i -> i {i=4}",
    }


def test_links_of_a_manual_region():
    """A dim that the region cuts is one dim on both sides, and is left to the user."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    halves = jax.shard_map(
        lambda x, y: (x[:, :3], y[:1]),
        mesh=mesh,
        in_specs=(P("x"), P("x")),
        out_specs=(P(None, "x"), P("x")),
    )
    program = build(jax.make_jaxpr(halves)(jnp.ones((8, 6)), jnp.ones((2, 5))), [])
    texts = [rule_of(program, op).text for op in program.ops if op.primitive == "link"]
    assert texts == [
        "i j -> i j {i=8 j=6} blocked i",
        "i j -> 1 j {i=2 j=5} blocked i",
        "i j -> i j {i=4 j=6} blocked j",
        "1 j -> i j {i=2 j=5} blocked i",
    ]


def test_every_rule_is_in_the_table():
    assert {case.primitive for case in ALL} | set(NOT_PRODUCED) == set(covered())


def test_every_exception_of_the_table_has_no_case():
    assert not {case.primitive for case in ALL} & set(NOT_PRODUCED)


EXAMPLES = [
    ("check", "i j ->  {i=8 j=4} blocked i j"),
    ("empty2", " -> i j {i=8 j=4}"),
    ("from_edtype", "i j -> i j {i=8 j=4}"),
    (
        "geqp3",
        "i j k, i l -> i m n, i o, i p {i=8 j=6 k=4 l=4 m=6 n=4 o=4 p=4} "
        "blocked j k l m n o p",
    ),
    (
        "geqrf",
        "i j k -> i l m, i n {i=8 j=6 k=4 l=6 m=4 n=4} blocked j k l m n",
    ),
    ("relayout", "i j -> i j {i=8 j=4}"),
    (
        "scaled_matmul",
        "i j (lm), i k (lm), i j l, i k l -> i j k "
        "{i=2 j=8 k=4 l=2 m=32} reduce l blocked m",
    ),
    ("stage", "i j -> i j {i=8 j=4}"),
    ("tie", "i, j k -> j k {i=2 j=8 k=4}"),
    ("to_edtype", "i j -> i j {i=8 j=4}"),
    ("unreduced_pmax", "i j -> i j {i=8 j=4} blocked i j"),
    ("unreduced_pmin", "i j -> i j {i=8 j=4} blocked i j"),
    ("with_memory_space_constraint", "i j -> i j {i=8 j=4}"),
]
"""Rules of primitives that no program here has."""


@pytest.mark.parametrize(("primitive", "text"), EXAMPLES)
def test_rules_that_no_program_reaches_by_their_example(primitive, text):
    assert primitive in NOT_PRODUCED
    assert example_rule(primitive).text == text


@pytest.mark.parametrize("primitive", covered())
def test_every_example_has_a_rule_that_fits_its_shapes(primitive):
    example = example_rule(primitive)
    assert example.operands or example.results
    assert example.text


# -- dims that stay the same thing, and those that do not ----------------------------


@pytest.mark.parametrize(
    ("m", "n", "same"),
    [
        (1024, 1024, True),
        (1024, 1023, True),
        (8, 16, True),  # half
        (17, 8, False),  # less than half, nine rows
        (16, 7, False),  # less than half, nine rows
        (15, 7, True),  # less than half, but only eight rows
        (12, 4, False),  # eight rows, but one of three parts
        (12, 5, True),
        (2, 1, True),
        (3, 1, False),
        (0, 5, False),
        (0, 0, True),
    ],
)
def test_same_dim(m, n, same):
    assert same_dim(m, n) is same
    assert same_dim(n, m) is same


# -- what a rule may be --------------------------------------------------------------


def test_a_rule_with_a_halo_prints_it_behind_its_factor():
    rule = FactorRule(
        operands=(((0,), (1,)),), results=(((0,),),), sizes=(8, 4),
        kinds=("shift", "reduce"), op_kind="matmul", halos=((1, 2), (0, 3)),
    )  # fmt: skip
    assert rule.text == "i j -> i {i=8 j=4} reduce j(0,3) shift i(1,2)"


def test_rules_of_many_factors_have_names_for_all():
    factors = Factors()
    dims = factors.dims(range(2, 62))
    text = factors.rule([dims], [dims], "move").text
    names = text.split(" -> ")[0].split()
    assert len(set(names)) == 60
    assert names[0] == "i"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"operands": (((0,), (2,)),)}, r"factors \[0, 2\] of a rule with 2 sizes"),
        ({"kinds": ("pass",)}, "2 factors have 1 kinds and 0 halos"),
        ({"halos": ((1, 1),)}, "2 factors have 2 kinds and 1 halos"),
        ({"halos": ((1, 1), (0, 0))}, r"a pass factor has the halo \(1, 1\)"),
        (
            {"halos": ((-1, 1), (0, 0)), "kinds": ("shift", "pass")},
            r"a shift factor has the halo \(-1, 1\)",
        ),
    ],
)
def test_a_rule_that_does_not_fit_together_is_refused(changed, message):
    whole = {
        "operands": (((0,), (1,)),),
        "results": (((0,),),),
        "sizes": (8, 4),
        "kinds": ("pass", "blocked"),
        "op_kind": "move",
    }
    with pytest.raises(ValueError, match=message):
        FactorRule(**{**whole, **changed})


# -- empty arrays --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "shapes", "text"),
    [
        (jnp.dot, ((0, 4), (4, 2)), "i k, k j -> i j {i=0 j=2 k=4} reduce k"),
        (lambda x: x[:, :0], ((4, 6),), "i j -> i k {i=4 j=6 k=0} blocked j k"),
        (
            lambda x, y: lax.concatenate([x, y], 0),
            ((0, 4), (6, 4)),
            "j i, k i -> k i {i=4 j=0 k=6} blocked j k",
        ),
        (lambda x: jnp.tile(x, (2,)), ((0,),), "i -> i {i=0}"),
        (lambda x: x.sum(0), ((0, 4),), "i j -> j {i=0 j=4} reduce i"),
        (
            lambda x, w: lax.conv(x, w, (1,), "SAME"),
            ((0, 6, 16), (4, 6, 3)),
            "i k l, j k m -> i j l {i=0 j=4 k=6 l=16 m=3} "
            "reduce k blocked m shift l(1,1)",
        ),
        (
            lambda x: lax.pad(x, 0.0, ((2, 0, 0),)),
            ((0,),),
            "i, . -> j {i=0 j=2} blocked i j",
        ),
    ],
)
def test_empty_dims(fn, shapes, text):
    args = [jnp.ones(shape) for shape in shapes]
    program = build(jax.make_jaxpr(fn)(*args), [])
    assert rule_of(program, program.ops[-1]).text == text
