"""Structures that are one another, or other ones, where axes have one device."""

from __future__ import annotations

import itertools

import numpy as np

from autoshard.ir.mesh import AXES
from autoshard.ir.trace import Traced
from autoshard.plan.sharded import ShardedProgram
from autoshard.plan.strategy import STATES, Strategy


def state_dims(sharded: ShardedProgram) -> frozenset[tuple[str, ...]]:
    """The axes that rules shard dims of state with, dim by dim."""
    pairs = zip(sharded.traced.inputs, sharded.compute, strict=True)
    return frozenset(
        dim for info, dims in pairs if info.state != "data" for dim in dims if dim
    )


def felt(
    structure: Strategy, traced: Traced, state: frozenset[tuple[str, ...]]
) -> set[tuple[str, ...]]:
    """Axes such that propagation may decide otherwise if all of them have one device.

    Where state is stored depends on which of its dims are taken. An update runs as its
    optimizer state is stored, if there is any that has the axes of what it meets; else
    it hangs on what else is stored. That nothing else is felt, random programs show
    (tests/search/test_solver.py).

    Args:
        structure: Rules and storage.
        traced: The program.
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
    return found


def _differing(a: Strategy, b: Strategy) -> frozenset[str] | None:
    """The axes that two structures use differently; None if they differ otherwise."""
    kinds = a.schedule.context_kind, b.schedule.context_kind
    if a.schedule.model_copy(update={"context_kind": kinds[1]}) != b.schedule:
        return None
    pairs = [(x.axes, y.axes) for x, y in zip(a.rules, b.rules, strict=True)]
    pairs += [
        (getattr(a.storage, state), getattr(b.storage, state)) for state in STATES
    ]
    found = {"context"} if kinds[0] != kinds[1] else set()
    for one, other in pairs:
        if one != other:
            apart = set(one) ^ set(other)
            found |= apart or set(one)
    return frozenset(found)


def distinct(
    structure: Strategy, earlier: list[Strategy], sizes: np.ndarray
) -> np.ndarray:
    """Which meshes make this structure another than all earlier ones, bool[mesh]."""
    new = np.ones(len(sizes), dtype=bool)
    apart = {axes for e in earlier if (axes := _differing(structure, e)) is not None}
    for axes in sorted(apart, key=sorted):
        columns = [AXES.index(a) for a in sorted(axes)]
        new &= (sizes[:, columns] > 1).any(axis=1)
    return new
