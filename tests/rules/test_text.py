"""The text of every rule, against the one derived by hand."""

from __future__ import annotations

import jax
import pytest
from rules.cases import CASES, NOT_PRODUCED, SHAPE, program_of

from autoshard.ir.errors import RuleMissingError
from autoshard.ir.program import build
from autoshard.rules import covered, register, rule_of


def _label(case):
    return f"{case.primitive}: {case.text}"


@pytest.mark.parametrize("case", CASES, ids=_label)
def test_text(case):
    program, op = program_of(case)
    assert rule_of(program, op).text == case.text


def test_links_of_a_loop():
    [case] = [c for c in SHAPE if c.primitive == "link"]
    program, _ = program_of(case)
    links = [op for op in program.ops if op.primitive == "link"]
    assert {op.params["kind"]: rule_of(program, op).text for op in links} == {
        "carry_in": "i -> i {i=4}",
        "slice": "i j -> j {i=3 j=4} blocked i",
        "carry": "i -> i {i=4}",
        "stack": "j -> i j {i=3 j=4} blocked i",
        "carry_out": "i -> i {i=4}",
    }


def test_every_rule_is_in_the_table():
    assert {case.primitive for case in CASES} | set(NOT_PRODUCED) == set(covered())


def test_every_exception_of_the_table_has_no_case():
    assert not {case.primitive for case in CASES} & set(NOT_PRODUCED)


def test_a_primitive_has_one_rule():
    with pytest.raises(ValueError, match="'dot_general' already has a rule"):
        register("dot_general")(lambda ctx: None)


def test_a_primitive_without_a_rule_is_an_error_that_says_where():
    program = build(jax.make_jaxpr(lambda n: jax.lax.clz(n))(1), [])
    with pytest.raises(RuleMissingError, match=r"'clz' at .*test_text\.py.* no factor"):
        rule_of(program, program.ops[0])
