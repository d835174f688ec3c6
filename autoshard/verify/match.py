"""Planned collectives against emitted ones.

A planned and an emitted collective agree when kind, mesh axes and bytes are the same,
as often as both run. Some data movements are written in another way by the compiler
(`comparison.FORMS`); these agree too, and are told apart in the result. Everything else
is a difference, with its cause (`comparison.CAUSES`) and what there is on either side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from autoshard.plan.schema import Collective
from autoshard.verify import comparison as c
from autoshard.verify.comparison import Agreement, Comparison, Difference
from autoshard.verify.groups import UNNAMED
from autoshard.verify.hlo import Emitted
from autoshard.verify.sides import (
    EmittedSide,
    PlannedSide,
    Test,
    alike,
    closeness,
    emitted_side,
    growth,
    is_converted,
    is_cut,
    is_gathered_wide,
    is_kept_whole,
    is_of_indices,
    is_padded_sum,
    is_plain,
    is_scattered,
    is_sliced_sum,
    is_taken,
    is_used_by,
    planned_side,
)

_SUMS = ("all_reduce", "reduce_scatter")
_AT_ONCE = re.compile(r"(gather|scatter[\w\-]*|reduce_\w+)$")


def compare(planned: Sequence[Collective], emitted: Sequence[Emitted]) -> Comparison:
    """Holds emitted collectives against planned ones.

    Args:
        planned: Of a plan; slices, which move nothing, are left out.
        emitted: Of a compiled program.

    Returns:
        What agrees and what does not.

    >>> plan = Collective(kind="reduce_scatter", axes=("data",), bytes_=64, count=2,
    ...                   time_s=0.0, source="m.py:3:0 (f)", address="dot#0", value="w")
    >>> got = Emitted("all_reduce", ("data",), 64, 2, "jit(f)/dot", "m.py:3", "ar.1",
    ...               sliced=True)
    >>> compare([plan], [got]).by_form()
    {'reduce-scatter written as all-reduce and slice': 128}
    """
    matching = _Matching(
        [planned_side(p) for p in planned if p.kind != "slice" and p.count],
        [emitted_side(e) for e in emitted if e.count],
    )
    planned_bytes = sum(p.total_bytes for p in matching.planned)
    emitted_bytes = sum(e.total_bytes for e in matching.emitted)
    # Steps first, or one of them is taken for some other sum over its one axis.
    matching.lookups()
    matching.steps()
    # A sum of which a slice is kept is left for a reduce-scatter, if there is one, and
    # a sum of padded parts for a gather. What is surely the same op goes first.
    for least in (2, 0):
        if least == 0:
            # All that takes it converts it, and the plan gathers what its ops take.
            matching.conversions(0, is_gathered_wide)
        matching.agree(c.AS_PLANNED, is_plain, least)
        matching.agree(c.SLICED_SUM, is_sliced_sum, least)
        matching.taken(least)
        matching.conversions(least, is_converted)
        matching.agree(c.PADDED_SUM, is_padded_sum, least)
        matching.agree(c.AS_PLANNED, lambda p, e: p.kind == e.kind, least)
        matching.loops(least)
        matching.scattered_first()
        matching.cancelled()
    matching.agree(c.SCATTERED, is_scattered)
    matching.sunk()
    matching.spread()
    matching.hoists()
    matching.at_once()
    matching.same_op()
    matching.alone()
    return Comparison(
        planned_bytes=planned_bytes,
        emitted_bytes=emitted_bytes - matching.steps_bytes,
        matched_bytes=sum(a.bytes_ for a in matching.agreements),
        steps_bytes=matching.steps_bytes,
        agreements=tuple(matching.agreements),
        differences=tuple(matching.differences),
    )


@dataclass
class _Matching:
    planned: list[PlannedSide]
    emitted: list[EmittedSide]
    agreements: list[Agreement] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    steps_bytes: int = 0
    added: set[int] = field(default_factory=set)

    def pairs(self) -> Iterator[tuple[PlannedSide, EmittedSide]]:
        """What is left on either side, each with each."""
        for p in self.planned:
            for e in self.emitted:
                if p.left and e.left:
                    yield p, e

    def agreed(
        self, form: str, p: PlannedSide, sides: Sequence[EmittedSide], bytes_: int
    ) -> None:
        """Notes an agreement."""
        emitted = tuple(e.item for e in sides)
        self.agreements.append(Agreement(form, p.item, emitted, bytes_))

    def differ(
        self, cause: str, planned: Sequence[PlannedSide], emitted: Sequence[EmittedSide]
    ) -> None:
        """Notes a difference; neither side is asked about again."""
        self.differences.append(
            Difference(
                cause,
                tuple(p.item for p in planned),
                tuple(e.item for e in emitted),
                sum(p.total_bytes for p in planned),
                sum(e.total_bytes for e in emitted),
            )
        )
        for side in (*planned, *emitted):
            side.left = 0

    # -- what agrees -------------------------------------------------------------

    def agree(self, form: str, fits: Test, least: int = 0) -> None:
        """Pairs equals that fit: same op first, then same line, then any."""
        for near in range(3, least - 1, -1):
            waiting: dict[object, list[EmittedSide]] = {}
            for e in self.emitted:
                if e.left:
                    waiting.setdefault(e.key, []).append(e)
            for p in self.planned:
                for e in waiting.get(p.key, ()):
                    if not p.left or p.left != e.left:
                        continue
                    if closeness(p, e) >= near and fits(p, e):
                        self.agreed(form, p, [e], p.total_bytes)
                        p.left = e.left = 0

    def taken(self, least: int) -> None:
        """Sums whose result has another type than what they take."""
        for near in range(3, least - 1, -1):
            for p, e in self.pairs():
                if p.left == e.left and closeness(p, e) >= near and is_taken(p, e):
                    self.agreed(c.CONVERTS, p, [e], p.total_bytes)
                    p.left = e.left = 0

    def chains(self) -> Iterator[list[EmittedSide]]:
        """Sums of which each takes the whole result of the one before, in order."""
        by_name = {(e.item.name, e.item.element): e for e in self.emitted}
        ends = set(by_name) - {e.item.fed_by for e in self.emitted}
        for name in by_name:
            if name not in ends:
                continue
            chain = [by_name[name]]
            while (before := by_name.get(chain[0].item.fed_by or ("", 0))) is not None:
                same = before.key[1] == chain[0].key[1]
                if not same or before.left != chain[0].left:
                    break
                chain.insert(0, before)
            if all(e.kind in _SUMS and e.left for e in chain):
                yield chain

    def lookups(self) -> None:
        """One sum over all axes where the plan scatters over some, then sums."""
        groups: dict[str, list[PlannedSide]] = {}
        for p in self.planned:
            if p.kind in _SUMS and _AT_ONCE.match(p.primitive):
                groups.setdefault(p.item.address, []).append(p)
        chains = list(self.chains())
        for parts in groups.values():
            key = (
                frozenset(a for p in parts for a in p.axes),
                max(p.item.bytes_ for p in parts),
            )
            for chain in chains:
                axes = frozenset(a for e in chain for a in e.axes)
                same = (axes, chain[0].item.bytes_) == key and chain[0].left
                if len(parts) > 1 and same and closeness(parts[0], chain[0]) >= 2:
                    self.differ(c.AT_ONCE, parts, chain)
                    break

    def steps(self) -> None:
        """All-reduces over single axes where the plan has one over all of them."""
        for chain in self.chains():
            if len(chain) == 1:
                continue
            key = frozenset(a for e in chain for a in e.axes), chain[0].item.bytes_
            fitting = [
                p
                for p in self.planned
                if p.left == chain[0].left and p.key == key and p.kind in _SUMS
            ]
            if fitting:
                p = max(fitting, key=lambda p: closeness(p, chain[-1]))
                self.agreed(c.IN_STEPS, p, chain, p.total_bytes)
                self.steps_bytes += sum(e.total_bytes for e in chain[1:])
                for side in (p, *chain):
                    side.left = 0

    def spread(self) -> None:
        """As many runs in all, here in one loop and there in several or in none."""
        for p in self.planned:
            same = [
                e
                for e in self.emitted
                if e.left and e.key == p.key and (alike(p, e) or is_sliced_sum(p, e))
            ]
            near = [e for e in same if closeness(p, e) >= 2]
            for sides in (near, same):
                if p.left and sum(e.left for e in sides) == p.left:
                    self.agreed(c.OTHER_LOOPS, p, sides, p.total_bytes)
                    for side in (p, *sides):
                        side.left = 0

    def sunk(self) -> None:
        """Sums once after a loop, of what the loop adds up."""
        for e in self.emitted:
            fitting = [
                p
                for p in self.planned
                if p.left > e.left > 0
                and p.left % e.left == 0
                and p.key == e.key
                and (alike(p, e) or is_sliced_sum(p, e) or is_scattered(p, e))
            ]
            if fitting and (e.item.looped or e.primitive == "while"):
                p = min(fitting, key=lambda p: p.left)
                self.agreed(c.OTHER_LOOPS, p, [e], e.total_bytes)
                p.left -= e.left
                e.left = 0
                self.differ(c.SUNK, [p], [])

    def hoists(self) -> None:
        """Runs that are saved because nothing changes from one to the next."""
        for p, e in self.pairs():
            if p.kind == e.kind and p.key == e.key and p.left > e.left:
                self.agreed(c.OTHER_LOOPS, p, [e], e.total_bytes)
                p.left -= e.left
                e.left = 0
                self.differ(c.HOISTED, [p], [])

    def loops(self, least: int) -> None:
        """As many bytes in all, in fewer and larger or in more and smaller runs."""
        for p, e in self.pairs():
            kinds = p.kind == e.kind or (p.kind, e.kind) == _SUMS
            same = kinds and p.axes == e.axes and p.total_bytes == e.total_bytes
            near = closeness(p, e) >= 2 or (e.item.looped and least == 0)
            if same and near and p.left != e.left:
                self.agreed(c.MOVED_LOOP, p, [e], p.total_bytes)
                p.left = e.left = 0

    # -- what does not -----------------------------------------------------------

    def conversions(self, least: int, test: Test) -> None:
        """The same movement after the conversion that the plan has behind it."""
        for near in range(3, least - 1, -1):
            for p, e in self.pairs():
                if p.left == e.left and closeness(p, e) >= near and test(p, e):
                    self.differ(c.OTHER_DTYPE, [p], [e])

    def cancelled(self) -> None:
        """Gathers of what is not cut up in the first place."""
        for p in self.planned:
            if p.left and p.kind == "all_gather" and self.is_whole(p):
                emitted = (e for e in self.emitted if e.left and e.key == p.key)
                if not any(alike(p, e) and closeness(p, e) for e in emitted):
                    self.differ(c.CANCELLED, [p], [])

    def scattered_first(self) -> None:
        """Sums over several axes, scattered over some and then summed over the rest."""
        for p in self.planned:
            for e in self.emitted:
                if not p.left or p.kind != "all_reduce" or e.kind != "reduce_scatter":
                    continue
                same = e.item.bytes_ == p.item.bytes_ and e.left == p.left
                rest = p.axes - e.axes
                if not (same and rest and e.axes < p.axes):
                    continue
                for f in self.emitted:
                    fed = f.item.fed_by == (e.item.name, e.item.element)
                    sums = f.left and f.kind == "all_reduce" and f.axes == rest
                    whole = sums and p.total_bytes % f.total_bytes == 0
                    if (
                        whole
                        and e.left
                        and (fed or (f.item.looped and f.left < e.left))
                    ):
                        self.differ(c.SCATTERED_FIRST, [p], [e, f])

    def at_once(self) -> None:
        """One sum over all axes where the plan has several for the same result."""
        groups: dict[str, list[PlannedSide]] = {}
        for p in self.planned:
            if p.left and p.kind in _SUMS:
                groups.setdefault(p.item.address, []).append(p)
        for near in (2, 0):
            for parts in groups.values():
                axes = frozenset(a for p in parts for a in p.axes)
                key = axes, max(p.item.bytes_ for p in parts)
                for e in self.emitted:
                    if len(parts) < 2 or not parts[0].left or not e.left:
                        continue
                    sizes = e.item.bytes_, e.item.taken_bytes
                    same = e.axes == axes and key[1] in sizes and e.kind in _SUMS
                    same = same and e.left == parts[0].left
                    if same and closeness(parts[0], e) >= near:
                        self.differ(c.AT_ONCE, parts, [e])

    def same_op(self) -> None:
        """What the same op does on either side, in another way."""
        tests: list[tuple[str, Test]] = [
            (c.KEPT_WHOLE, is_kept_whole),
            (c.PADDED, lambda p, e: alike(p, e) and 0 < growth(p, e) <= 0.25),
            (c.OTHER_DTYPE, lambda p, e: alike(p, e) and e.item.unconverted != 0),
            (c.CUT, lambda p, e: is_cut(e)),
            (c.OTHER_AXES, lambda p, e: p.kind == e.kind and p.key[1] == e.key[1]),
            (c.OTHER_BYTES, lambda p, e: p.kind == e.kind),
            (c.OTHER_KIND, lambda p, e: True),
        ]
        for cause, test in tests:
            for p, e in self.pairs():
                if p.left and e.left and closeness(p, e) >= 2 and test(p, e):
                    self.differ(cause, [p], [e])

    def alone(self) -> None:
        """What is on one side only."""
        planned = {(p.kind, *p.key, p.item.value) for p in self.planned if not p.left}
        emitted = {
            (e.kind, *e.key, e.item.source, e.primitive)
            for e in self.emitted
            if not e.left and not e.address
        }
        # A parameter is the same array wherever it goes, whatever type it has there.
        arrays = {(kind, axes, value) for kind, axes, _, value in planned}
        left = [p for p in self.planned if p.left]
        for p in left:
            cause = c.UNEXPLAINED
            value = p.item.value
            again = (p.kind, *p.key, value) in planned
            again = again or ("/" in value and (p.kind, p.axes, value) in arrays)
            if again or any(is_used_by(p, e) for e in self.emitted if not e.left):
                cause = c.MERGED
            elif p.kind in _SUMS and self.is_added(p):
                cause = c.ADDED
            elif p.kind == "all_gather" and self.is_whole(p):
                cause = c.CANCELLED
            self.differ(cause, [p], [])
        for e in self.emitted:
            if not e.left:
                continue
            cause = c.UNEXPLAINED
            if UNNAMED in e.axes:
                cause = c.UNNAMED_GROUPS
            elif is_cut(e):
                cause = c.CUT
            elif e.kind == "permute":
                cause = c.DEVICE_ORDER
            elif is_of_indices(e):
                cause = c.INDICES
            elif re.search(r"\b(checkpoint|rematted_computation)\b", e.item.op_name):
                cause = c.RECOMPUTED
            elif (e.kind, *e.key, e.item.source, e.primitive) in emitted:
                cause = c.REPEATED
            self.differ(cause, [], [e])

    def is_added(self, p: PlannedSide) -> bool:
        """Whether an emitted sum, that of an alike one, is of two values added up.

        Each accounts for one sum that is not emitted.
        """
        for k, e in enumerate(self.emitted):
            once = e.item.added and e.item.count == p.left
            after = e.item.looped and p.left % max(e.item.count, 1) == 0
            same = k not in self.added and not e.left and e.key == p.key
            if same and e.kind in _SUMS and (once or after):
                self.added.add(k)
                return True
        return False

    def is_whole(self, p: PlannedSide) -> bool:
        """Whether what is gathered was cut out of a sum, on the same line."""
        return "/" not in p.item.value and any(
            q.kind in _SUMS
            and not q.left
            and q.item.bytes_ == p.item.bytes_
            and q.item.count == p.left
            and q.axes >= p.axes
            and (q.file, q.line, q.scope) == (p.file, p.line, p.scope)
            for q in self.planned
        )
