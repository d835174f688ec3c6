"""Planned collectives against emitted ones.

A planned and an emitted collective agree when kind, mesh axes and bytes are the same,
as often as both run. Some data movements are written in another way by the compiler
(`comparison.FORMS`); these agree too, and are told apart in the result. Everything else
is a difference, with its cause (`comparison.CAUSES`) and what there is on either side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from autoshard.plan.schema import Collective
from autoshard.verify import comparison as c
from autoshard.verify.comparison import Agreement, Comparison, Difference
from autoshard.verify.groups import UNNAMED
from autoshard.verify.hlo import Emitted

Item = TypeVar("Item", Collective, Emitted)

_PIN = re.compile(r"pinned\[(.+)\](?:had|in|out|sum)\d+")
_SUMS = ("all_reduce", "reduce_scatter")
_AT_ONCE = re.compile(r"(gather|scatter[\w\-]*|reduce_\w+)$")
_CUTS = {
    *("concatenate", "dynamic_slice", "dynamic_update_slice", "pad", "rev", "roll"),
    *("select_and_scatter_add", "slice", "split"),
}
"""Primitives that keep, move or add rows of a dim."""


@dataclass(slots=True)
class _Side(Generic[Item]):
    """A collective and how many of its runs are not accounted for."""

    item: Item
    left: int
    file: str
    line: str
    primitive: str
    address: str

    @property
    def kind(self) -> str:
        return self.item.kind

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(self.item.axes)

    @property
    def key(self) -> tuple[frozenset[str], int]:
        return self.axes, self.item.bytes_

    @property
    def total_bytes(self) -> int:
        return self.left * self.item.bytes_


_Planned = _Side[Collective]
_Emitted = _Side[Emitted]
_Test = Callable[[_Planned, _Emitted], bool]


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
        [_planned(p) for p in planned if p.kind != "slice" and p.count],
        [_emitted(e) for e in emitted if e.count],
    )
    planned_bytes = sum(p.total_bytes for p in matching.planned)
    emitted_bytes = sum(e.total_bytes for e in matching.emitted)
    # Steps first, or one of them is taken for some other sum over its one axis.
    matching.lookups()
    matching.steps()
    # A sum of which a slice is kept is left for a reduce-scatter, if there is one.
    matching.agree(c.AS_PLANNED, lambda p, e: p.kind == e.kind and not e.item.sliced)
    matching.agree(c.SLICED_SUM, _is_sliced_sum)
    matching.agree(c.AS_PLANNED, lambda p, e: p.kind == e.kind)
    matching.agree(c.PADDED_SUM, _is_padded_sum)
    matching.spread()
    matching.hoists()
    matching.loops()
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
    planned: list[_Planned]
    emitted: list[_Emitted]
    agreements: list[Agreement] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    steps_bytes: int = 0

    def pairs(self) -> Iterator[tuple[_Planned, _Emitted]]:
        """What is left on either side, each with each."""
        for p in self.planned:
            for e in self.emitted:
                if p.left and e.left:
                    yield p, e

    def agreed(
        self, form: str, p: _Planned, sides: Sequence[_Emitted], bytes_: int
    ) -> None:
        """Notes an agreement."""
        emitted = tuple(e.item for e in sides)
        self.agreements.append(Agreement(form, p.item, emitted, bytes_))

    def differ(
        self, cause: str, planned: Sequence[_Planned], emitted: Sequence[_Emitted]
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

    def agree(self, form: str, fits: _Test) -> None:
        """Pairs equals that fit: same op first, then same line, then any."""
        for closeness in (3, 2, 1, 0):
            waiting: dict[object, list[_Emitted]] = {}
            for e in self.emitted:
                if e.left:
                    waiting.setdefault(e.key, []).append(e)
            for p in self.planned:
                for e in waiting.get(p.key, ()):
                    if not p.left or p.left != e.left:
                        continue
                    if _closeness(p, e) >= closeness and fits(p, e):
                        self.agreed(form, p, [e], p.total_bytes)
                        p.left = e.left = 0

    def chains(self) -> Iterator[list[_Emitted]]:
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
        groups: dict[str, list[_Planned]] = {}
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
                if len(parts) > 1 and same and _closeness(parts[0], chain[0]) >= 2:
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
                p = max(fitting, key=lambda p: _closeness(p, chain[-1]))
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
                if e.left and e.key == p.key and (_alike(p, e) or _is_sliced_sum(p, e))
            ]
            near = [e for e in same if _closeness(p, e) >= 2]
            for sides in (near, same):
                if p.left and sum(e.left for e in sides) == p.left:
                    self.agreed(c.OTHER_LOOPS, p, sides, p.total_bytes)
                    for side in (p, *sides):
                        side.left = 0

    def hoists(self) -> None:
        """Runs that are saved because nothing changes from one to the next."""
        for p, e in self.pairs():
            if p.kind == e.kind and p.key == e.key and p.left > e.left:
                self.agreed(c.OTHER_LOOPS, p, [e], e.total_bytes)
                p.left -= e.left
                e.left = 0
                self.differ(c.HOISTED, [p], [])

    def loops(self) -> None:
        """As many bytes in all, in fewer and larger or in more and smaller runs."""
        for p, e in self.pairs():
            same = p.axes == e.axes and p.total_bytes == e.total_bytes
            if same and p.kind == e.kind and p.left != e.left and _closeness(p, e) >= 2:
                self.agreed(c.MOVED_LOOP, p, [e], p.total_bytes)
                p.left = e.left = 0

    # -- what does not -----------------------------------------------------------

    def same_op(self) -> None:
        """What the same op does on either side, in another way."""
        tests: list[tuple[str, _Test]] = [
            (c.KEPT_WHOLE, _is_kept_whole),
            (c.PADDED, lambda p, e: _alike(p, e) and 0 < _growth(p, e) <= 0.25),
            (c.OTHER_DTYPE, lambda p, e: _alike(p, e) and e.item.unconverted),
            (c.CUT, lambda p, e: _is_cut(e)),
            (c.OTHER_AXES, lambda p, e: p.kind == e.kind and p.key[1] == e.key[1]),
            (c.OTHER_BYTES, lambda p, e: p.kind == e.kind),
            (c.OTHER_KIND, lambda p, e: True),
        ]
        for cause, test in tests:
            for p, e in self.pairs():
                if p.left and e.left and _closeness(p, e) >= 2 and test(p, e):
                    self.differ(cause, [p], [e])

    def alone(self) -> None:
        """What is on one side only."""
        planned = {(p.kind, *p.key, p.item.value) for p in self.planned if not p.left}
        emitted = {
            (e.kind, *e.key, e.item.source, e.primitive)
            for e in self.emitted
            if not e.left and not e.address
        }
        for p in self.planned:
            if p.left:
                twin = (p.kind, *p.key, p.item.value) in planned
                self.differ(c.MERGED if twin else c.UNEXPLAINED, [p], [])
        for e in self.emitted:
            if not e.left:
                continue
            cause = c.UNEXPLAINED
            if UNNAMED in e.axes:
                cause = c.UNNAMED_GROUPS
            elif _is_cut(e):
                cause = c.CUT
            elif e.kind == "permute":
                cause = c.DEVICE_ORDER
            elif re.search(r"\b(checkpoint|rematted_computation)\b", e.item.op_name):
                cause = c.RECOMPUTED
            elif (e.kind, *e.key, e.item.source, e.primitive) in emitted:
                cause = c.REPEATED
            self.differ(cause, [], [e])


def _planned(item: Collective) -> _Planned:
    file, line = [*item.source.split(" ")[0].split(":"), "", ""][:2]
    primitive = re.search(r"([\w\-]+)#\d+(?::\w+)?$", item.address)
    op = primitive[1] if primitive else ""
    return _Side(item, item.count, file, line, op, item.address)


def _emitted(item: Emitted) -> _Emitted:
    file, _, line = item.source.rpartition(":")
    pin = _PIN.search(item.op_name)
    address = pin[1] if pin else ""
    primitive = re.search(r"([\w\-]+)#\d+(?::\w+)?$", address)
    op = primitive[1] if primitive else _primitive(item.op_name)
    return _Side(item, item.count, file, line, op, address)


def _primitive(op_name: str) -> str:
    return op_name.rpartition("/")[2]


def _is_cut(e: _Emitted) -> bool:
    return not _CUTS.isdisjoint((e.primitive, _primitive(e.item.used_by)))


def _closeness(p: _Planned, e: _Emitted) -> int:
    """3 for the same op, 2 for its primitive and line, 1 for one of these, else 0."""
    if e.address and e.address == p.address:
        return 3
    same_file = bool(p.file) and e.file.endswith(p.file)
    same_line = same_file and p.line == e.line
    return same_line + (bool(p.primitive) and p.primitive == e.primitive)


def _alike(p: _Planned, e: _Emitted) -> bool:
    return p.kind == e.kind and p.axes == e.axes


def _growth(p: _Planned, e: _Emitted) -> float:
    return e.item.bytes_ / p.item.bytes_ - 1 if p.item.bytes_ else 0.0


def _is_sum_for_scatter(p: _Planned, e: _Emitted) -> bool:
    return p.kind == "reduce_scatter" and e.kind == "all_reduce" and p.key == e.key


def _is_sliced_sum(p: _Planned, e: _Emitted) -> bool:
    return _is_sum_for_scatter(p, e) and e.item.sliced


def _is_kept_whole(p: _Planned, e: _Emitted) -> bool:
    return _is_sum_for_scatter(p, e) and not e.item.sliced


def _is_padded_sum(p: _Planned, e: _Emitted) -> bool:
    return p.kind == "all_gather" and e.kind == "all_reduce" and e.item.padded
