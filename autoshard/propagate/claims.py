"""Axes that two rules want: which of them has one in an op, and in a value.

With expert parallelism experts and the batch share an axis, and no order of the rules
says who has it: where tokens are, it is the batch, and where experts work, they. A
product of arrays is done where fewest of them have to move, so the axis goes to the
rule whose dims more of them have; a value lies as the products want it that use it, so
what is moved in between is moved once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from autoshard.ir.program import Program
from autoshard.plan.sharded import DimClasses
from autoshard.rules import FactorRule

Claim = tuple[tuple[int, int], ...]
"""Rules, by their order in the layout, and how many arrays of a product have each."""

_ALONG = frozenset({"elementwise", "move", "link"})
"""Kinds of op before which a value lies as after them, unless it meets another one:
what is made of both is less to move than they are."""


def contested(wanted: Iterable[tuple[int, tuple[str, ...]]]) -> frozenset[str]:
    """Axes that several rules want.

    Args:
        wanted: Of some dims the rule, by its order, and the axes that it wants.

    >>> sorted(contested([(0, ("data", "expert")), (3, ("expert",)), (3, ("expert",))]))
    ['expert']
    """
    of: dict[str, int] = {}
    found: set[str] = set()
    for rule, axes in wanted:
        found.update(a for a in axes if of.setdefault(a, rule) != rule)
    return frozenset(found)


def claim_of(
    rule: FactorRule,
    classes: Iterable[int],
    strong: Mapping[int, tuple[int, tuple[str, ...]]],
) -> Claim:
    """What a product claims where rules contest its axes; else nothing.

    Args:
        rule: Of the product.
        classes: Class per factor.
        strong: Rule and axes per class.
    """
    wanted = [(f, *strong[c]) for f, c in enumerate(classes) if c in strong]
    if not contested((order, axes) for _, order, axes in wanted):
        return ()
    arrays = (*rule.operands, *rule.results)
    having: dict[int, int] = {}
    for f, order, _ in wanted:
        count = sum(any(f in dim for dim in dims) for dims in arrays)
        having[order] = max(having.get(order, 0), count)
    return tuple(sorted(having.items()))


def claims(
    program: Program,
    classes: DimClasses,
    strong: Mapping[int, tuple[int, tuple[str, ...]]],
) -> dict[int, Claim]:
    """What the first product that uses a value claims of it, where it claims anything.

    Args:
        program: The program.
        classes: Its classes.
        strong: Rule and axes per class.
    """
    if not contested(strong.values()):
        return {}
    found: dict[int, Claim] = {}
    for op in reversed(program.ops):
        rule = classes.rules[op.index]
        claim: Claim = ()
        if rule.op_kind == "matmul":
            claim = claim_of(rule, classes.of_factor[op.index], strong)
        elif rule.op_kind in _ALONG and op.outputs[0] in found:
            claim = found[op.outputs[0]]
        if not claim:
            continue
        held = [v for v in op.inputs if _has(v, classes, strong)]
        if rule.op_kind == "matmul" or len(held) == 1:
            found.update((v, claim) for v in held)
    return found


def _has(
    value: int,
    classes: DimClasses,
    strong: Mapping[int, tuple[int, tuple[str, ...]]],
) -> bool:
    """Whether rules contest an axis of a value."""
    if value < 0:
        return False
    own = classes.of_value[value]
    return bool(contested(strong[c] for c in own if c in strong))
