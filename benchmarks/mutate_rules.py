"""Plants one mistake at a time in every factor rule, and counts which are caught.

Each rule of the table in `tests/rules`, and each example of a primitive that no program
of the table has, is changed in one place: a factor dropped from one dim, two dims of an
operand or result swapped, a reduction forgotten, a factor sharded that is needed whole
or the other way round, a halo longer or shorter by one, another kind of op, another
number of operations. The changed rule is put into the registry and the tests of that
rule run in this process. A mutant that is the same rule with other letters is none.

Four tests see a mutant: `text` (the line derived by hand), `pieces` (the op run on
pieces of its operands), `loose` (what is blocked cannot be cut, a halo is not too long)
and `kind` or `flops`. `pieces` and `loose` know nothing of the text: what they catch is
counted by itself, for the mutants that concern how an op may be sharded.

The bar: no mutant survives.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import _record

sys.path.insert(0, str(_record.ROOT / "tests"))

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from rules import test_kinds, test_legal, test_text  # noqa: E402
from rules.case import Case, program_of  # noqa: E402
from rules.cases import CASES  # noqa: E402
from rules.plant import instead, planted  # noqa: E402

from autoshard.rules import FactorRule, rule_of  # noqa: E402
from autoshard.rules.core import letter  # noqa: E402
from autoshard.rules.registry import example_rule  # noqa: E402

Slots = tuple[tuple[tuple[int, ...], ...], ...]
Tests = dict[str, Callable[[], None]]

DROPPED = "a factor dropped"
SWAPPED = "two dims swapped"
FORGOTTEN = "a reduction forgotten"
FREED = "sharded though needed whole"
BLOCKED = "blocked though free"
HALO = "a halo off by one"
KIND = "another kind of op"
FLOPS = "other operations"
CHANGES = (DROPPED, SWAPPED, FORGOTTEN, FREED, BLOCKED, HALO, KIND, FLOPS)
SHARDING = CHANGES[:6]
"""Changes of how an op may be sharded; the others are about its price."""
MEANING = ("pieces", "loose")
"""Tests that run the op and know nothing of the rule's text."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A rule and the tests that it has to pass."""

    primitive: str
    rule: FactorRule
    tests: Tests
    runs: bool


def subjects(only: str) -> Iterator[Subject]:
    """All rules of the table, and the examples of what the table cannot have."""
    for case in CASES:
        if only in ("", case.primitive):
            rule = rule_of(*program_of(case))
            yield Subject(case.primitive, rule, _of_case(case), runs=True)
    for primitive, text in test_text.EXAMPLES:
        if only in ("", primitive):
            rule = example_rule(primitive)
            yield Subject(primitive, rule, _of_example(primitive, text), runs=False)


def _of_case(case: Case) -> Tests:
    return {
        "text": lambda: test_text.test_text(case),
        "pieces": lambda: test_legal.test_pieces_make_the_whole(case),
        "loose": lambda: test_legal.test_nothing_is_blocked_that_could_be_cut(case),
        "kind": lambda: test_kinds.test_what_kind_of_op_each_case_is(case),
        "flops": lambda: test_kinds.test_flops_of_every_case(case),
    }


def _of_example(primitive: str, text: str) -> Tests:
    reached = test_text.test_rules_that_no_program_reaches_by_their_example
    return {
        "text": lambda: reached(primitive, text),
        "kind": test_kinds.test_what_kind_of_op_each_is,
        "flops": lambda: test_kinds.test_flops_of_every_example(primitive),
    }


# -- mutants -------------------------------------------------------------------------


def mutants(rule: FactorRule) -> Iterator[tuple[str, str, FactorRule]]:
    """`(kind of change, what was changed, rule)` of every rule that differs."""
    seen = {_canonical(rule)}
    for change, what, made in _changed(rule):
        key = _canonical(made)
        if key not in seen:
            seen.add(key)
            yield change, what, made


def _changed(rule: FactorRule) -> Iterator[tuple[str, str, FactorRule]]:
    slots: Slots = (*rule.operands, *rule.results)
    for s, dims in enumerate(slots):
        ahead = len(rule.operands)
        where = f"operand {s}" if s < ahead else f"result {s - ahead}"
        for d, dim in enumerate(dims):
            for f in dim:
                less = tuple(g for g in dim if g != f)
                made = _with_dims(rule, s, {d: less})
                yield DROPPED, f"{letter(f)} of dim {d} of {where}", made
            for e in range(d + 1, len(dims)):
                made = _with_dims(rule, s, {d: dims[e], e: dim})
                yield SWAPPED, f"dims {d} and {e} of {where}", made
    for f, kind in enumerate(rule.kinds):
        for to in ("pass", "blocked"):
            if kind != to:
                change = (
                    FORGOTTEN
                    if kind == "reduce"
                    else FREED
                    if to == "pass"
                    else BLOCKED
                )
                what = f"{letter(f)} is {to}, not {kind}"
                yield change, what, _with_kind(rule, f, to)
        low, high = rule.halos[f] if rule.halos else (0, 0)
        if kind == "shift" or low or high:
            for halo in (
                (low - 1, high), (low + 1, high), (low, high - 1), (low, high + 1)
            ):  # fmt: skip
                if min(halo) >= 0:
                    halos = tuple(
                        halo if k == f else h for k, h in enumerate(rule.halos)
                    )
                    what = f"{letter(f)}{halo}, not {(low, high)}"
                    yield HALO, what, replace(rule, halos=halos)
    for op_kind in ("matmul", "elementwise", "data"):
        if op_kind != rule.op_kind:
            what = f"{op_kind}, not {rule.op_kind}"
            yield KIND, what, replace(rule, op_kind=op_kind)
    for flops in (2 * rule.flops_per_point, rule.flops_per_point + 1, 0.0):
        what = f"{flops:g}, not {rule.flops_per_point:g}"
        yield FLOPS, what, replace(rule, flops_per_point=flops)


def _with_dims(rule: FactorRule, slot: int, new: dict[int, Any]) -> FactorRule:
    slots = [list(dims) for dims in (*rule.operands, *rule.results)]
    for d, dim in new.items():
        slots[slot][d] = dim
    ahead = len(rule.operands)
    fixed = [tuple(dims) for dims in slots]
    return replace(rule, operands=tuple(fixed[:ahead]), results=tuple(fixed[ahead:]))


def _with_kind(rule: FactorRule, f: int, kind: Any) -> FactorRule:
    kinds = tuple(kind if k == f else old for k, old in enumerate(rule.kinds))
    halos = tuple((0, 0) if k == f else old for k, old in enumerate(rule.halos))
    return replace(rule, kinds=kinds, halos=halos)


def _canonical(rule: FactorRule) -> Any:
    """The rule with its factors numbered as they first appear."""
    number: dict[int, int] = {}
    slots = tuple(
        tuple(tuple(number.setdefault(f, len(number)) for f in dim) for dim in dims)
        for dims in (*rule.operands, *rule.results)
    )
    halos = rule.halos or ((0, 0),) * len(rule.sizes)
    facts = list(zip(rule.sizes, rule.kinds, halos, strict=True))
    used = tuple(facts[f] for f in number)
    unused = sorted(facts[f] for f in range(len(facts)) if f not in number)
    flops = rule.flops_per_point * prod(rule.sizes)
    return slots, used, tuple(unused), rule.op_kind, flops


# -- running -------------------------------------------------------------------------


def failing(subject: Subject, wrong: FactorRule, change: str) -> list[str]:
    """The tests that fail with a wrong rule in the registry."""
    failed = []
    with planted(subject.primitive, instead(subject.rule, wrong)):
        for name, test in subject.tests.items():
            if name in MEANING and change not in SHARDING:
                continue  # what an op costs does not change what it computes
            try:
                test()
            except Exception:  # whatever stops a test fails it
                failed.append(name)
    return failed


def run(only: str) -> list[dict[str, Any]]:
    """Every mutant: what was changed, and which tests failed."""
    found = []
    for subject in subjects(only):
        sound = failing(subject, subject.rule, DROPPED)
        if sound:
            sys.exit(f"{subject.primitive}: {sound} fail without any mistake")
        for change, what, wrong in mutants(subject.rule):
            found.append(
                {
                    "primitive": subject.primitive,
                    "rule": subject.rule.text,
                    "change": change,
                    "what": what,
                    "failed": failing(subject, wrong, change),
                    "runs": subject.runs,
                }
            )
        jax.clear_caches()  # what was compiled for one rule serves no other
    return found


def figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all mutants and by the kind of change."""

    def counted(some: list[dict[str, Any]]) -> dict[str, Any]:
        sharding = [m for m in some if m["change"] in SHARDING and m["runs"]]
        by_test = Counter(name for m in some for name in m["failed"])
        return {
            "mutants": len(some),
            "killed": sum(bool(m["failed"]) for m in some),
            "survived": sum(not m["failed"] for m in some),
            "killed_by_test": dict(sorted(by_test.items())),
            "run_on_data": len(sharding),
            "killed_by_running": sum(
                not set(MEANING).isdisjoint(m["failed"]) for m in sharding
            ),
        }

    unseen = [
        m
        for m in found
        if m["runs"]
        and m["change"] in SHARDING
        and set(MEANING).isdisjoint(m["failed"])
    ]
    return {
        "primitives": len({m["primitive"] for m in found}),
        "rules": len({(m["primitive"], m["rule"]) for m in found}),
        **counted(found),
        "by_change": {
            change: counted([m for m in found if m["change"] == change])
            for change in CHANGES
        },
        "survivors": [_line(m) for m in found if not m["failed"]],
        "seen_by_the_text_alone": dict(
            sorted(Counter(m["primitive"] for m in unseen).items())
        ),
        "seen_by_the_text_alone_lines": [_line(m) for m in unseen],
    }


def _line(mutant: dict[str, Any]) -> str:
    words = (mutant[key] for key in ("primitive", "rule", "change", "what"))
    return " | ".join(words)


def main() -> int:
    """Runs every mutant and writes the record."""
    parser = _record.parser(__doc__, "cases of one primitive")
    arguments = parser.parse_args()
    start, begun_s = _record.begin(), time.monotonic()
    found = run(arguments.only)
    if not found:
        parser.error(f"no case has the primitive {arguments.only!r}")
    counts = {**figures(found), "wall_s": round(time.monotonic() - begun_s, 1)}
    rows = [
        (
            change,
            of["mutants"],
            of["survived"],
            of["killed_by_test"].get("text", 0),
            f"{of['killed_by_running']} of {of['run_on_data']}",
        )
        for change, of in counts["by_change"].items()
    ]
    _record.table(
        ("change", "mutants", "survived", "by the text", "by running it"), rows
    )
    for line in counts["survivors"]:
        print(f"survived: {line}")
    print(
        f"{counts['mutants']} mutants of {counts['rules']} rules of "
        f"{counts['primitives']} primitives, {counts['survived']} survived; "
        f"{counts['killed_by_running']} of {counts['run_on_data']} caught by running "
        f"the op alone; {counts['wall_s']} s"
    )
    _record.write(
        arguments.into,
        "mutate_rules" + (f"_{arguments.only}" if arguments.only else ""),
        what=(__doc__ or "").strip(),
        command="python benchmarks/mutate_rules.py"
        + (f" --only {arguments.only}" if arguments.only else ""),
        figures=counts,
        passed=not counts["survivors"],
        start=start,
    )
    return int(bool(counts["survivors"]))


if __name__ == "__main__":
    sys.exit(main())
