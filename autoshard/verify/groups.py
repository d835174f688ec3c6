"""Which mesh axes a collective runs over, read from the groups of devices it names.

XLA writes groups in four ways: as lists, as an iota that is reshaped and transposed, as
axes of a mesh of its own, and, for a permutation, as pairs of devices. Here all of them
become sets of devices, and sets of devices become axes of the plan's mesh.
"""

from __future__ import annotations

import re
from math import prod

import numpy as np

from autoshard.ir.errors import InputError

Groups = frozenset[frozenset[int]]
"""Devices, by position in the mesh (row-major), that talk to one another."""

UNNAMED = "?"
"""Stands for axes where groups match no product of mesh axes."""

_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>.*?)\))? "
    r"\{(?P<over>[^}]*)\}"
)
_AXIS = re.compile(r"['\"]([^'\"]+)['\"]=(\d+)")
_OVER = re.compile(r"['\"]([^'\"]+)['\"](?::\((\d+)\)(\d+))?")


def parse_groups(text: str, num_devices: int) -> Groups:
    """Reads the value of a `replica_groups` attribute.

    Args:
        text: Such as `{{0,1},{2,3}}`, `[2,4]<=[8]`, `[4,2]<=[2,4]T(1,0)`,
            `mesh['a'=2,'b'=4] {'b'}` or `{}`, which means all devices.
        num_devices: Devices of the program.

    Raises:
        InputError: The text is in none of these forms.

    >>> sorted(map(sorted, parse_groups("[4,2]<=[2,4]T(1,0)", 8)))
    [[0, 4], [1, 5], [2, 6], [3, 7]]
    """
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if text.startswith("["):
        return _rows(_iota(text))
    if text.startswith("{"):
        groups = re.findall(r"\{([\d,]+)\}", text)
        if not groups:
            return frozenset({frozenset(range(num_devices))})
        return frozenset(frozenset(map(int, group.split(","))) for group in groups)
    raise InputError(
        f"replica_groups={text!r} is not in a known form: lists {{{{0,1}},{{2,3}}}}, "
        "an iota [2,4]<=[8], or mesh['a'=2,'b'=4] {'a'}."
    )


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _rows(table: np.ndarray) -> Groups:
    rows = table.reshape(-1, table.shape[-1])
    return frozenset(frozenset(map(int, row)) for row in rows)


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[8]T(1,0)`: numbers 0.. shaped, transposed, and shaped again."""
    match = _IOTA.match(text)
    if match is None:
        raise InputError(f"{text!r} is not an iota of devices such as [2,4]<=[8].")
    shape, source, order = match.groups()
    table = np.arange(prod(_ints(shape))).reshape(_ints(source or shape))
    if order:
        table = table.transpose(_ints(order))
    return table.reshape(_ints(shape)) if source else table.reshape(-1)


def _mesh_groups(text: str) -> Groups:
    match = _MESH.match(text)
    if match is None:
        raise InputError(
            f"replica_groups={text!r} is not of the form mesh['a'=2,'b'=4] {{'a'}}."
        )
    names, sizes = [], []
    for name, size in _AXIS.findall(match["axes"]):
        names.append(name)
        sizes.append(int(size))
    ids = np.arange(prod(sizes))
    if match["ids"]:
        listed = match["ids"]
        ids = _iota(listed) if "[" in listed else np.asarray(_ints(listed))
    # Each axis becomes three: before, at and after the part that is meant.
    over = {
        name: (int(before), int(size)) if size else (1, sizes[names.index(name)])
        for name, before, size in _OVER.findall(match["over"])
    }
    shape, together = [], []
    for name, size in zip(names, sizes, strict=True):
        before, part = over.get(name, (1, 1))
        together.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    apart = [k for k in range(len(shape)) if k not in together]
    table = ids.reshape(shape).transpose(*apart, *together)
    return _rows(table.reshape(-1, prod(part for _, part in over.values())))


def axes_of_groups(groups: Groups, sizes: dict[str, int]) -> tuple[str, ...]:
    """Names the mesh axes whose product the groups are.

    Args:
        groups: From `parse_groups`.
        sizes: Size of each mesh axis in the order of the device layout.

    Returns:
        Axes in the order of `sizes`; none if no group has two devices; a part of an
        axis as `tensor:(1)2` (the two halves of `tensor` apart by half its size);
        `("?",)` where the groups match nothing of the kind.

    >>> axes_of_groups(parse_groups("[2,4]<=[8]", 8), {"data": 2, "tensor": 4})
    ('tensor',)
    """
    if all(len(group) == 1 for group in groups):
        return ()
    first = next((sorted(group) for group in groups if 0 in group), None)
    if first is None:
        return (UNNAMED,)
    # Where device 0 talks to a product of axes, each axis takes evenly spaced
    # coordinates; whether all other groups are alike is compared afterwards.
    coordinates = np.unravel_index(first, tuple(sizes.values()))
    named, shape = [], []
    for (axis, size), along in zip(sizes.items(), coordinates, strict=True):
        part = len(set(along.tolist()))
        after = int(sorted(set(along.tolist()))[1]) if part > 1 else size
        if size % (part * after) and part > 1:
            return (UNNAMED,)
        before = size // (part * after) if part > 1 else 1
        shape += [before, part, after]
        if part > 1:
            named.append(axis if part == size else f"{axis}:({before}){part}")
    ids = np.arange(prod(shape)).reshape(shape)
    apart = [k for k in range(len(shape)) if k % 3 != 1]
    table = ids.transpose(*apart, *range(1, len(shape), 3))
    rows = _rows(table.reshape(-1, prod(shape[1::3])))
    return tuple(named) if rows == groups else (UNNAMED,)


def parse_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Reads the value of `source_target_pairs`.

    >>> parse_pairs("{{0,1},{1,0}}")
    ((0, 1), (1, 0))
    """
    pairs = re.findall(r"\{(\d+),(\d+)\}", text)
    return tuple((int(source), int(target)) for source, target in pairs)


def axes_of_pairs(
    pairs: tuple[tuple[int, int], ...], sizes: dict[str, int]
) -> tuple[str, ...]:
    """Mesh axes along which some pair of devices lies apart.

    >>> axes_of_pairs(((0, 1), (1, 0)), {"data": 2, "tensor": 4})
    ('tensor',)
    """
    shape = tuple(sizes.values())
    moved: set[str] = set()
    for source, target in pairs:
        here, there = np.unravel_index(source, shape), np.unravel_index(target, shape)
        moved |= {a for a, i, j in zip(sizes, here, there, strict=True) if i != j}
    return tuple(axis for axis in sizes if axis in moved)
