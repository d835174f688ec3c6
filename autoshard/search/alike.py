"""Structures that are one another, or other ones, where axes have one device."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np

from autoshard.ir.mesh import AXES
from autoshard.ir.trace import Traced
from autoshard.plan.sharded import Fixed, ShardedProgram
from autoshard.plan.strategy import STATES, Strategy
from autoshard.propagate.wants import rules_of

Names = frozenset[tuple[str, ...]]
"""The names that classes of dims have, each combination once."""


def decided(rules: Iterable[tuple[str, tuple[str, ...]]], names: Names) -> object:
    """What rules want of a program whose dims have these names.

    A class of dims follows the first rule for one of its names, so that the others may
    be whatever they like: where heads of keys are tied to those of queries, a rule for
    them is one of those. `rules_of` reads both this and the wishes of propagation.
    """
    rules = list(rules)
    found = {}
    for own in names:
        strong, weak = rules_of(own, rules)
        found[own] = tuple((order, axes) for order, axes, _ in strong[:1]), weak
    return frozenset(found.items())


def state_dims(sharded: ShardedProgram) -> frozenset[tuple[str, ...]]:
    """The axes that rules shard dims of state with, dim by dim."""
    pairs = zip(sharded.traced.inputs, sharded.compute, strict=True)
    return frozenset(
        dim for info, dims in pairs if info.state != "data" for dim in dims if dim
    )


def felt(
    structure: Strategy, traced: Traced, fixed: Fixed, state: frozenset[tuple[str, ...]]
) -> set[tuple[str, ...]]:
    """Axes such that propagation may decide otherwise if all of them have one device.

    Where state is stored depends on which of its dims are taken. An update runs as its
    optimizer state is stored, if there is any that has the axes of what it meets; else
    it hangs on what else is stored. A rule gives way where the user fixed one of its
    axes himself; and gradients of what he placed are stored so if any are. Of dims of
    one value that an axis is for, one gets it: where a rule names others beside it,
    sums there differ. That nothing else is felt, random programs show
    (tests/search/test_solver.py).

    Args:
        structure: Rules and storage.
        traced: The program.
        fixed: What the user fixed in it.
        state: From `state_dims`.
    """
    storage = structure.storage
    found = set(state)
    stored = [set(getattr(storage, state)) for state in STATES]
    if not all(a <= b for a, b in itertools.pairwise(stored)):
        found |= {(axis,) for axis in set().union(*stored)}
    params, optimizer = (
        {info.shape for info in traced.inputs if info.state == state}
        for state in ("params", "optimizer")
    )
    if not params <= optimizer and storage.params:
        found.add(tuple(storage.params))
    several = [axes for rule in structure.rules if len(axes := rule.axes) > 1]
    named = Counter(axis for rule in structure.rules for axis in rule.axes)
    found |= {(axis,) for axes in several for axis in axes if named[axis] > 1}
    found |= {
        (axis,) for dims in fixed.dims.values() for dim in dims for axis in dim or ()
    }
    if fixed.storage and storage.gradients:
        found.add(tuple(storage.gradients))
    return found


class Alike:
    """Which meshes make a structure another than all that came before it.

    Along an axis of one device nothing is done. So structures are compared as they are
    without such axes, for every set of axes that some mesh has several devices of; and
    by what their rules want of the program, see `decided`.

    Args:
        sizes: Of the meshes, int64[mesh, axis].
    """

    def __init__(self, sizes: np.ndarray) -> None:
        bits = (sizes > 1) @ (1 << np.arange(len(AXES)))
        patterns, self._of_mesh = np.unique(bits, return_inverse=True)
        self._active = [
            frozenset(a for k, a in enumerate(AXES) if pattern >> k & 1)
            for pattern in patterns.tolist()
        ]
        self._seen: list[set[object]] = [set() for _ in self._active]
        self._rules: object = None
        self._wanted: list[object] = []

    def distinct(self, structure: Strategy, names: Names) -> np.ndarray:
        """Whether the structure is another one there, bool[mesh]; it is remembered.

        Args:
            structure: It.
            names: Of the classes of the program that it rematerialises.
        """
        schedule, storage = structure.schedule, structure.storage
        states = [getattr(storage, state) for state in STATES]
        rules = [(rule.logical, rule.axes) for rule in structure.rules]
        key = tuple(rules), names
        if self._rules != key:
            self._rules = key
            self._wanted = [
                decided(
                    ((logical, _along(axes, active)) for logical, axes in rules), names
                )
                for active in self._active
            ]
        new = np.zeros(len(self._active), dtype=bool)
        for k, (active, wanted) in enumerate(
            zip(self._active, self._wanted, strict=True)
        ):
            kind = schedule.context_kind if "context" in active else ""
            axes = tuple(_along(own, active) for own in states)
            found = (schedule.remat, kind, wanted, axes)
            new[k] = found not in self._seen[k]
            self._seen[k].add(found)
        return new[self._of_mesh]


def _along(axes: Iterable[str], active: frozenset[str]) -> tuple[str, ...]:
    return tuple(a for a in axes if a in active)
