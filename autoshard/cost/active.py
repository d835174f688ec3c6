"""What a layout does where some mesh axes have one device: nothing along these.

A layout is applied once, for meshes of all sizes. Along an axis of one device nothing
is moved, so what is left of its moves may be fewer of them, or others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from autoshard.cost.moves import axes_of, key_of, places_of, roots_of
from autoshard.plan.sharded import Dims, Reshard, ShardedProgram

Axes = frozenset[str]
_Move = tuple[Dims, tuple[str, ...], Dims]
"""Source, axes of partial sums and target."""


def restricted(dims: Dims, active: Axes) -> Dims:
    """A spec without the axes that have one device."""
    return tuple([tuple([a for a in dim if a in active]) for dim in dims])


def _left(move: Reshard, active: Axes) -> Reshard | None:
    """What is left of a move along some axes, if anything."""
    source, target = restricted(move.source, active), restricted(move.target, active)
    unreduced = tuple(a for a in move.unreduced if a in active)
    if not unreduced and source == target:
        return None
    return replace(
        move,
        source=source,
        unreduced=unreduced,
        target=target,
        at_once=move.at_once and len(unreduced) > 1,
    )


def along(sharded: ShardedProgram, active: Axes) -> ShardedProgram:
    """A program with a layout, without what it says of axes that have one device.

    Args:
        sharded: The program.
        active: The axes that have several.
    """
    memo: dict[Dims, Dims] = {}

    def cut(dims: Dims) -> Dims:
        if dims not in memo:
            memo[dims] = restricted(dims, active)
        return memo[dims]

    def pairs(
        given: frozenset[tuple[int, tuple[str, ...]]],
    ) -> frozenset[tuple[int, tuple[str, ...]]]:
        found = ((n, tuple(a for a in axes if a in active)) for n, axes in given)
        return frozenset((n, axes) for n, axes in found if axes)

    divides = pairs(sharded.divides)
    exchanges = (
        replace(e, axes=tuple(a for a in e.axes if a in active), held=e.held & active)
        for e in sharded.exchanges
    )
    moves = (_left(move, active) for move in sharded.reshards)
    return replace(
        sharded,
        specs=tuple(map(cut, sharded.specs)),
        factor_axes=tuple(map(cut, sharded.factor_axes)),
        compute=tuple(map(cut, sharded.compute)),
        reshards=tuple(move for move in moves if move is not None),
        exchanges=tuple(e for e in exchanges if e.axes),
        divides=divides,
        padded=pairs(sharded.padded) - divides,
    )


class Moves:
    """The moves of a program with a layout, by the axes that there are.

    Args:
        sharded: The program.
        unique: Its moves, each once.
    """

    def __init__(self, sharded: ShardedProgram, unique: Sequence[Reshard]) -> None:
        self._sharded = sharded
        self._values: dict[_Move, set[int]] = defaultdict(set)
        for m in sharded.reshards:
            self._values[m.source, m.unreduced, m.target].add(m.value)
        together: dict[object, list[Reshard]] = defaultdict(list)
        for root, move in zip(roots_of(sharded, unique), unique, strict=True):
            together[root].append(move)
        # Of these some may be one where an axis has one device.
        self._together = [moves for moves in together.values() if len(moves) > 1]
        self.axes: Axes = frozenset(
            a
            for source, unreduced, target in self._values
            for a in (*axes_of(source), *unreduced, *axes_of(target))
        )

    def values(self, active: Axes) -> frozenset[int]:
        """Values that are moved where only these axes have several devices."""
        found: set[int] = set()
        for (source, unreduced, target), values in self._values.items():
            if not active.isdisjoint(unreduced) or (
                restricted(source, active) != restricted(target, active)
            ):
                found |= values
        return frozenset(found)

    def differ(self, active: Axes) -> bool:
        """Whether what is left along some axes is more than fewer of the same moves.

        Two moves may be one, and a sum may be none.
        """
        return any(_another(move, active) for move in self._values) or any(
            self._merge(moves, active) for moves in self._together
        )

    def _merge(self, moves: Sequence[Reshard], active: Axes) -> bool:
        seen = set()
        for move in moves:
            left = _left(move, active)
            if left is None:
                continue
            key = key_of(self._sharded, left, lambda dims: restricted(dims, active))
            if key in seen:
                return True
            seen.add(key)
        return False


def _another(move: _Move, active: Axes) -> bool:
    source, unreduced, target = move
    if not active.isdisjoint(unreduced):
        return False
    moves = restricted(source, active) != restricted(target, active)
    if unreduced:
        return moves
    # An axis may only change its place among those of its dim.
    places = places_of(source, target)
    return moves and active.isdisjoint(places) if places else not moves
