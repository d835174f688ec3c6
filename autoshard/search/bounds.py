"""Bounds on the candidates of structures, by which most of them need not be priced.

What no structure of some rules and schedule is below is found once for all of them, see
`cost.floors`; what storage adds to it, for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoshard.cost import Pricer, floors
from autoshard.cost.collectives import Meshes
from autoshard.cost.offload import Offload
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.stages import STAGE, Table
from autoshard.search.divisible import batch_divides, divide_alike
from autoshard.search.placing import Placing

Vector = np.ndarray[Any, np.dtype[np.float64]]


_TOGETHER = 2**12
"""Orders up to which it is as quick to look at all of them as at a bound of all."""


@dataclass(frozen=True)
class Wanted:
    """What candidates must be to be of interest.

    Attributes:
        pipelines: How stages may take turns; without any, `stage` is an axis like any
            other.
        offloads: What may be in the host's memory.
        bytes_: Of a chip's memory.
        step_s: Seconds a step.
    """

    pipelines: Sequence[Pipeline]
    offloads: Sequence[Offload]
    bytes_: float | Vector
    step_s: float | Vector


@dataclass(frozen=True)
class Floors:
    """Bounds of some candidates, whatever their storage.

    Attributes:
        of_step: From `floors.rest_s`, float64[3, candidate].
        alive: From `floors.alive_bytes`, with what is kept for the backward pass on the
            chip, and without it: float64[2, 3, candidate].
    """

    of_step: Table
    alive: Table

    @staticmethod
    def of(
        pricer: Pricer, meshes: Meshes, cuts: Vector, offloads: Sequence[Offload]
    ) -> Floors:
        """Finds them, with any layout of the rules."""
        return Floors(
            floors.rest_s(pricer, meshes, cuts), _alive(pricer, meshes, cuts, offloads)
        )


def _alive(
    pricer: Pricer, meshes: Meshes, cuts: Vector, offloads: Sequence[Offload]
) -> Table:
    on_chip = floors.alive_bytes(pricer, meshes, cuts)
    if not any("activations" in offload for offload in offloads):
        return np.stack([on_chip, on_chip])
    moved = floors.alive_bytes(pricer, meshes, cuts, offloaded=True)
    return np.stack([on_chip, moved])


def floor_s(
    pricer: Pricer,
    placing: Placing,
    sizes: np.ndarray,
    cuts: Vector,
    found: Floors,
    wanted: Wanted,
) -> Vector:
    """Seconds a step of candidates takes at least; infinite if none of them can fit.

    What could fit only in more time than is wanted takes that. Some of it may have to
    be offloaded to fit.

    Args:
        pricer: Of the structure.
        placing: How axes may be laid out.
        sizes: Of the meshes of the candidates, int64[candidate, axis].
        cuts: float64[candidate]; microbatches.
        found: Bounds of its rules and schedule.
        wanted: What is asked.
    """
    meshes, hows = placing.meshes(sizes), wanted.pipelines
    counts = meshes.product(STAGE) if hows else np.ones(len(meshes))
    *of_step, rest = found.of_step
    step_s = _moving_s(pricer, placing, sizes, cuts, rest, wanted)
    asked = meshes, cuts, hows
    most = _most(pricer, *asked, np.stack(of_step), wanted.step_s)
    least_s, nothing = np.full(len(meshes), np.inf), np.zeros((2, len(meshes)))
    states = floors.held_bytes(pricer, meshes, cuts)
    for offload in wanted.offloads:
        alive = found.alive[int("activations" in offload)]
        held = sum(
            (own for kind, own in states.items() if kind not in offload), nothing
        )
        bound = step_s
        if offload:
            host_s = floors.with_host_s(pricer, meshes, cuts, rest, offload)
            # All stages together are busy that long.
            bound = np.maximum(step_s, host_s / counts)
        small = floors.room(pricer, *asked, alive, held, wanted.bytes_)
        if hows:
            soon = floors.room(pricer, *asked, alive, held, wanted.bytes_, most)
            bound = np.where(soon, bound, np.maximum(bound, _above(wanted.step_s)))
        least_s = np.where(small, np.minimum(least_s, bound), least_s)
    return least_s


def _moving_s(
    pricer: Pricer,
    placing: Placing,
    sizes: np.ndarray,
    cuts: Vector,
    rest: Vector,
    wanted: Wanted,
) -> Vector:
    """The same, whatever fits."""

    def bound(meshes: Meshes, rows: Any) -> Vector:
        stored_s = floors.stored_s(pricer, meshes, cuts[rows], rest[rows])
        return floors.in_stages(pricer, meshes, cuts[rows], stored_s, wanted.pipelines)

    every = slice(None)
    if placing.anywhere is None:
        return bound(placing.meshes(sizes), every)
    step_s = np.full(len(sizes), np.inf)
    near = np.arange(len(sizes))
    of, orders = placing.all_orders(sizes)
    if len(of) > _TOGETHER:
        # No order has every axis where it is fastest: this is quick, and lower.
        step_s = bound(placing.meshes(sizes), every)
        near = np.flatnonzero(step_s <= wanted.step_s)
        step_s[near] = np.inf
        of, orders = placing.all_orders(sizes[near])
    rows = near[of]
    in_order_s = bound(Meshes(placing.cluster, sizes[rows], orders), rows)
    np.minimum.at(step_s, rows, in_order_s)
    return step_s


def _above(step_s: float | Vector) -> Vector:
    return np.minimum(np.nextafter(step_s, np.inf), np.finfo(float).max)


def _most(
    pricer: Pricer,
    meshes: Meshes,
    cuts: Vector,
    pipelines: Sequence[Pipeline],
    of_step: Table,
    limit_s: float | Vector,
) -> list[Vector]:
    return [
        floors.most_blocks(pricer, meshes, cuts, how, of_step, limit_s)
        for how in pipelines
    ]


class RuleBounds:
    """Bounds of all structures with the same rules and schedule.

    Args:
        grid: Mesh sizes of the candidates, int64[candidate, axis].
        cuts: Their microbatches, int64[candidate].
        batch: Examples in the batch.
    """

    def __init__(self, grid: np.ndarray, cuts: np.ndarray, batch: int) -> None:
        self.grid, self.cuts, self.batch = grid, cuts.astype(np.float64), batch
        count = len(grid)
        self._known = np.zeros(count, dtype=bool)
        self._floor_s = np.full(count, np.nan)
        self._found = Floors(np.zeros((3, count)), np.zeros((2, 3, count)))

    def find(
        self, pricer: Pricer, placing: Placing, rows: np.ndarray, wanted: Wanted
    ) -> None:
        """Finds the bounds of some candidates, as far as they are not known.

        Where something does not divide, these may be laid out in another way, of which
        nothing is known here.

        Args:
            pricer: Of one of the structures.
            placing: How axes may be laid out.
            rows: Which candidates.
            wanted: What is asked; those that are too large need no bound on their time.
        """
        rows = rows[~self._known[rows]]
        self._known[rows] = True
        fits = batch_divides(pricer, self.grid[rows], self.cuts[rows], self.batch)
        self._floor_s[rows[fits]] = 0.0
        rows = rows[fits & divide_alike(pricer, self.grid[rows], {})]
        if not len(rows):
            return
        meshes, cuts = Meshes(placing.cluster, self.grid[rows]), self.cuts[rows]
        alive = _alive(pricer, meshes, cuts, wanted.offloads)
        self._found.alive[:, :, rows] = alive
        nothing, hows = np.zeros((2, len(rows))), wanted.pipelines
        asked = meshes, cuts, hows, alive[-1], nothing, wanted.bytes_
        small = floors.room(pricer, *asked)
        self._floor_s[rows] = np.inf
        rows = rows[small]
        meshes, cuts = placing.meshes(self.grid[rows]), self.cuts[rows]
        of_step = floors.rest_s(pricer, meshes, cuts)
        self._found.of_step[:, rows] = of_step
        floor_s = floors.in_stages(pricer, meshes, cuts, of_step[0], hows)
        most = _most(pricer, meshes, cuts, hows, of_step[:2], wanted.step_s)
        asked = meshes, cuts, hows, alive[-1][:, small], nothing[:, small]
        if hows:
            soon = floors.room(pricer, *asked, wanted.bytes_, most)
            floor_s = np.where(
                soon, floor_s, np.maximum(floor_s, _above(wanted.step_s))
            )
        self._floor_s[rows] = floor_s

    @property
    def every_s(self) -> Vector:
        """`floor_s` of all candidates; NaN as well where it is not found yet."""
        return self._floor_s

    def floor_s(self, rows: np.ndarray) -> Vector:
        """Seconds a step takes at least, as in the function; NaN for an odd batch.

        That is one which does not divide.
        """
        return self._floor_s[rows]

    def floors(self, rows: np.ndarray) -> Floors:
        """The bounds of some candidates."""
        of_step, alive = self._found.of_step, self._found.alive
        return Floors(of_step[:, rows], alive[:, :, rows])
