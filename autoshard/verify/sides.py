"""What is held against each other: a collective, and how much of it is left over."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from autoshard.plan.schema import Collective
from autoshard.verify.hlo import Emitted

Item = TypeVar("Item", Collective, Emitted)

_PIN = re.compile(r"pinned\[(.+)\](?:had|in|out|sum)\d+")
_CUTS = {
    *("concatenate", "dynamic_slice", "dynamic_update_slice", "pad", "rev", "roll"),
    *("select_and_scatter_add", "slice", "split"),
}
"""Primitives that keep, move or add rows of a dim."""


@dataclass(slots=True)
class Side(Generic[Item]):
    """A collective and how many of its runs are not accounted for."""

    item: Item
    left: int
    file: str
    line: str
    primitive: str
    address: str

    @property
    def kind(self) -> str:
        """As in `plan.schema.Collective`."""
        return self.item.kind

    @property
    def scope(self) -> str:
        """Where the op of its address stands."""
        return self.address.rpartition("/")[0]

    @property
    def axes(self) -> frozenset[str]:
        """Mesh axes, in no order."""
        return frozenset(self.item.axes)

    @property
    def key(self) -> tuple[frozenset[str], int]:
        """Axes and bytes."""
        return self.axes, self.item.bytes_

    @property
    def total_bytes(self) -> int:
        """Bytes of the runs that are left."""
        return self.left * self.item.bytes_


PlannedSide = Side[Collective]
EmittedSide = Side[Emitted]
Test = Callable[[PlannedSide, EmittedSide], bool]


def planned_side(item: Collective) -> PlannedSide:
    """A planned collective, none of its runs accounted for."""
    file, line = [*item.source.split(" ")[0].split(":"), "", ""][:2]
    primitive = re.search(r"([\w\-]+)#\d+(?::\w+)?$", item.address)
    op = primitive[1] if primitive else ""
    return Side(item, item.count, file, line, op, item.address)


def emitted_side(item: Emitted) -> EmittedSide:
    """An emitted collective, none of its runs accounted for."""
    file, _, line = item.source.rpartition(":")
    pin = _PIN.search(item.op_name)
    address = pin[1] if pin else ""
    primitive = re.search(r"([\w\-]+)#\d+(?::\w+)?$", address)
    op = primitive[1] if primitive else last_name(item.op_name)
    return Side(item, item.count, file, line, op, address)


def last_name(op_name: str) -> str:
    """The primitive at the end of a name stack."""
    return op_name.rpartition("/")[2]


def is_cut(e: EmittedSide) -> bool:
    """Whether it serves an op that keeps, moves or adds rows of a dim."""
    return not _CUTS.isdisjoint((e.primitive, last_name(e.item.used_by)))


def closeness(p: PlannedSide, e: EmittedSide) -> int:
    """3 for the same op, 2 for its primitive and line, 1 for one of these, else 0."""
    if e.address and e.address == p.address:
        return 3
    same_file = bool(p.file) and e.file.endswith(p.file)
    same_line = same_file and p.line == e.line
    return same_line + (bool(p.primitive) and p.primitive == e.primitive)


def is_of_indices(e: EmittedSide) -> bool:
    """Whether integers are gathered that say where a lookup reads or writes."""
    users = (last_name(name) for name in (*e.item.users, e.item.used_by))
    takes = any(re.match(r"(gather|scatter|dynamic_\w*slice)", user) for user in users)
    return e.kind == "all_gather" and takes and e.item.dtype in ("s32", "u32", "s64")


def alike(p: PlannedSide, e: EmittedSide) -> bool:
    """Whether kind and axes are the same."""
    return p.kind == e.kind and p.axes == e.axes


def growth(p: PlannedSide, e: EmittedSide) -> float:
    """By which part of the planned bytes the emitted ones are more."""
    return e.item.bytes_ / p.item.bytes_ - 1 if p.item.bytes_ else 0.0


def is_plain(p: PlannedSide, e: EmittedSide) -> bool:
    """Whether it is the collective itself, not a sum that stands for another one."""
    return p.kind == e.kind and not e.item.sliced and not e.item.padded


def is_sliced_sum(p: PlannedSide, e: EmittedSide) -> bool:
    """Whether it is a reduce-scatter written as a sum and a slice."""
    return _is_sum_for_scatter(p, e) and e.item.sliced


def is_scattered(p: PlannedSide, e: EmittedSide) -> bool:
    """Whether it is a sum of which a slice is kept, written as a reduce-scatter."""
    return p.kind == "all_reduce" and e.kind == "reduce_scatter" and p.key == e.key


def is_kept_whole(p: PlannedSide, e: EmittedSide) -> bool:
    """Whether it is a reduce-scatter, written as a sum that no slice is taken of."""
    return _is_sum_for_scatter(p, e) and not e.item.sliced


def is_padded_sum(p: PlannedSide, e: EmittedSide) -> bool:
    """Whether it is an all-gather written as a sum of parts, each set into zeros."""
    return p.kind == "all_gather" and e.kind == "all_reduce" and e.item.padded


def is_taken(p: PlannedSide, e: EmittedSide) -> bool:
    """Whether it takes what was planned, and makes it of another type on its way."""
    same = alike(p, e) or (p.kind == "reduce_scatter" and e.item.sliced)
    return same and p.axes == e.axes and e.item.taken_bytes == p.item.bytes_


def is_converted(p: PlannedSide, e: EmittedSide) -> bool:
    """Whether it is what was planned, but for a conversion that changed its place."""
    if not alike(p, e) or e.item.bytes_ == p.item.bytes_:
        return False
    return p.item.bytes_ in (e.item.unconverted, e.item.converted)


def is_gathered_wide(p: PlannedSide, e: EmittedSide) -> bool:
    """Whether it is the planned gather before what it moves is made narrower."""
    same = alike(p, e) and p.kind == "all_gather"
    return same and p.item.bytes_ == e.item.converted < e.item.bytes_


def is_used_by(p: PlannedSide, e: EmittedSide) -> bool:
    """Whether what is moved for another op is what the op of a plan takes as well."""
    if not alike(p, e) or p.kind != "all_gather":
        return False
    stack = re.sub(r"#\d+(:\w+)?", "", p.address).replace("scan/", "").split("/")
    return any(name.split("/")[-len(stack) :] == stack for name in e.item.users)


def _is_sum_for_scatter(p: PlannedSide, e: EmittedSide) -> bool:
    return p.kind == "reduce_scatter" and e.kind == "all_reduce" and p.key == e.key
