"""Cutting an op along a factor and joining the pieces gives the whole.

For every rule of the table and every factor that may be sharded: the operands are cut
into pieces along the factor, the primitive runs on each piece as a device would run
it, and the results are joined (`pass`, `shift`) or combined (`reduce`). A factor with a
halo lends each piece so many rows of its neighbours, and no more. The other way round,
a factor that could be sharded and is blocked needs a reason.
"""

from __future__ import annotations

import pytest
from rules.case import operands_of, program_of
from rules.cases import CASES

from autoshard.rules import rule_of
from autoshard.rules.check import check_rule, loose_factors
from autoshard.rules.core import letter
from autoshard.rules.runs import MADE_ALONE, UNCHECKED

GROUPS = "XLA computes a convolution that is cut by groups wrongly"
MINOR = "it stands behind another factor, by which the sum is cut"
CAREFUL = {
    "i (kl), (kl) j, i 1, k j -> i j {i=8 j=4 k=4 l=16} reduce k blocked l": (
        "l",
        MINOR,
    ),
    "i j (lm), i k (lm), i j l, i k l -> i j k {i=2 j=8 k=4 l=2 m=32} "
    "reduce l blocked m": ("m", MINOR),
    # Groups of features, one for each feature, and the gradient of a grouped one.
    "i (jl) m, (jk) l n -> i (jk) m {i=2 j=3 k=4 l=2 m=16 n=3} blocked j k l m n": (
        "jkl",
        GROUPS,
    ),
    "i (jl) m, (jk) l n -> i (jk) m {i=3 j=2 k=5 l=2 m=16 n=3} blocked j k l m n": (
        "jkl",
        GROUPS,
    ),
    "i j k, j 1 l -> i j k {i=2 j=4 k=16 l=3} blocked j k l": ("j", GROUPS),
    "(ji) l m, (jk) l n -> i (jk) m {i=2 j=3 k=4 l=5 m=16 n=3} blocked i j k l m n": (
        "ijkl",
        GROUPS,
    ),
    "(ji) l m, (jk) l n -> i (jk) m {i=3 j=2 k=4 l=5 m=16 n=3} blocked i j k l m n": (
        "ijkl",
        GROUPS,
    ),
    "i j k, i l m -> i n o {i=3 j=6 k=4 l=6 m=6 n=6 o=6} blocked j k l m n o": (
        "k",
        "the symmetric matrix that is added would count once per piece",
    ),
    "i k l, j k l -> i j 1 {i=2 j=4 k=6 l=8} reduce k blocked l": (
        "l",
        "XLA sums what is padded over devices that hold the same",
    ),
    ("reduce_xor", "i j -> i {i=4 j=6} blocked j"): (
        "j",
        "no collective combines bits by exclusive or",
    ),
}
"""Rules with factors that are blocked without need: which, and why."""


def _label(case):
    return f"{case.primitive}: {case.text}"


@pytest.mark.parametrize("case", CASES, ids=_label)
def test_pieces_make_the_whole(case):
    program, op = program_of(case)
    skipped = check_rule(program, op, rule_of(program, op), operands_of(case))
    assert not skipped or case.primitive in (*UNCHECKED, *MADE_ALONE)


@pytest.mark.parametrize("case", CASES, ids=_label)
def test_nothing_is_blocked_that_could_be_cut(case):
    program, op = program_of(case)
    loose = loose_factors(program, op, rule_of(program, op), operands_of(case))
    nothing = ("", "")
    known = CAREFUL.get(case.text) or CAREFUL.get((case.primitive, case.text), nothing)
    assert "".join(map(letter, loose)) == known[0], loose


def test_every_primitive_that_is_not_tried_has_a_case():
    """But for one that JAX makes after tracing."""
    made = {case.primitive for case in CASES}
    assert made >= MADE_ALONE
    assert set(UNCHECKED) - made == {"empty2"}


def test_every_careful_rule_is_in_the_table():
    texts = {key for c in CASES for key in (c.text, (c.primitive, c.text))}
    assert set(CAREFUL) <= texts
