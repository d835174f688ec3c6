"""Bounds on the candidates of structures, by which most of them need not be priced.

What no structure of some rules and schedule is below is found once for all of them, see
`cost.floors`; what storage adds to it, for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autoshard.cost import Pricer, fitting, floors
from autoshard.cost.collectives import Meshes, Rows
from autoshard.cost.offload import Offload
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.segments import BLOCK
from autoshard.cost.stages import PLACES, STAGE, Table
from autoshard.search.divisible import arguments_divide, divide_alike
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

    def of(self, rows: np.ndarray) -> Wanted:
        """The same of some of the candidates."""
        bytes_, step_s = (
            each if np.ndim(each) == 0 else np.asarray(each)[rows]
            for each in (self.bytes_, self.step_s)
        )
        return replace(self, bytes_=bytes_, step_s=step_s)


@dataclass(frozen=True)
class Floors:
    """Bounds of some candidates, whatever their storage.

    Attributes:
        of_step: From `floors.rest_s`.
        alive: From `fitting.alive_bytes`, with what is kept for the backward pass on
            the chip, and without it: float64[2, 3, candidate].
        moved: From `fitting.moved_bytes` of activations, float64[3, candidate]; zero
            where none are offloaded.
    """

    of_step: Table
    alive: Table
    moved: Table

    def take(self, rows: np.ndarray) -> Floors:
        """Those of some of the candidates."""
        tables = self.of_step, self.alive, self.moved
        return Floors(*(table[..., rows] for table in tables))


def _alive(
    pricer: Pricer, meshes: Meshes, cuts: Vector, offloads: Sequence[Offload]
) -> Table:
    on_chip = fitting.alive_bytes(pricer, meshes, cuts)
    if not any("activations" in offload for offload in offloads):
        return np.stack([on_chip, on_chip])
    moved = fitting.alive_bytes(pricer, meshes, cuts, offloaded=True)
    return np.stack([on_chip, moved])


def _moved(
    pricer: Pricer, meshes: Meshes, cuts: Vector, offloads: Sequence[Offload]
) -> Table:
    if not any("activations" in offload for offload in offloads):
        return np.zeros((3, len(meshes)))

    def moved(pricer: Pricer, part: Meshes, cuts: Vector, _rows: Rows) -> Table:
        return fitting.moved_bytes(pricer, part, cuts, ["activations"])["activations"]

    return pricer.apart(meshes, cuts, moved)


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
    step_s = _moving_s(pricer, placing, sizes, cuts, found.of_step, wanted)
    # What is too slow whatever fits need not be held against memory.
    near = np.flatnonzero(step_s <= wanted.step_s)
    if len(near):
        given = cuts[near], found.take(near), step_s[near], wanted.of(near)
        step_s[near] = _fitting_s(pricer, placing.meshes(sizes[near]), *given)
    return step_s


def _fitting_s(
    pricer: Pricer,
    meshes: Meshes,
    cuts: Vector,
    found: Floors,
    step_s: Vector,
    wanted: Wanted,
) -> Vector:
    """The same of candidates that take so long whatever fits."""
    hows = wanted.pipelines
    rest = found.of_step[1]
    most = _most(pricer, meshes, cuts, hows, found.of_step, wanted.step_s)
    states = fitting.held_bytes(pricer, meshes, cuts)
    kinds = {kind for offload in wanted.offloads for kind in offload}
    moved = fitting.moved_bytes(pricer, meshes, cuts, kinds - {"activations"})
    moved["activations"] = found.moved
    counts = meshes.product(STAGE) if hows else np.ones(len(meshes))

    waits = fitting.waits(meshes, cuts, hows)

    def fits(
        offload: Iterable[str], rows: np.ndarray, most: Table | None = None
    ) -> np.ndarray:
        if not len(rows):
            return np.full(0, True)
        alive = found.alive[int("activations" in offload)][:, rows]
        held = [own[:, rows] for kind, own in states.items() if kind not in offload]
        own = waits[..., rows], alive, sum(held, np.zeros((2, len(rows))))
        more = wanted.of(rows).bytes_, most if most is None else most[:, rows]
        return fitting.room(pricer, meshes.take(rows), *own, *more)

    least_s = np.full(len(meshes), np.inf)
    left = np.arange(len(meshes))
    if kinds:
        left = left[fits(kinds, left)]
    for offload in wanted.offloads:
        if not len(left):
            break
        bound_s = step_s[left]
        if offload:
            host_s = floors.with_host_s(meshes, rest, moved, offload)
            # All stages together are busy that long.
            bound_s = np.maximum(bound_s, (host_s / counts)[left])
        limit_s = wanted.of(left).step_s
        near = bound_s <= limit_s
        rows = left[near]
        small = fits(offload, rows)
        if hows:
            soon = np.copy(small)
            soon[small] = fits(offload, rows[small], most)
            slow_s = np.maximum(bound_s, _above(limit_s))[near]
            bound_s[near] = np.where(soon, bound_s[near], slow_s)
        bound_s[near] = np.where(small, bound_s[near], np.inf)
        least_s[left] = np.minimum(least_s[left], bound_s)
        # What fits as it is has nothing to gain from more that is offloaded.
        left = left[least_s[left] > step_s[left]]
    return least_s


def _moving_s(
    pricer: Pricer,
    placing: Placing,
    sizes: np.ndarray,
    cuts: Vector,
    of_step: Table,
    wanted: Wanted,
) -> Vector:
    """The same, whatever fits."""
    summed = floors.summed_s(pricer, placing.meshes(sizes), cuts)
    waited, rest = of_step[:2] + summed.sum(axis=0)
    places, every = of_step[2:] + summed, np.arange(len(sizes))

    def bound(meshes: Meshes, rows: np.ndarray) -> Vector:
        own = pricer, meshes, cuts[rows]
        moved = floors.moved_s(*own)
        whole, shown = floors.stored_s(pricer, meshes, moved, rest[rows])
        times = whole, waited[rows], places[:, rows] + shown
        step_s = floors.in_stages(*own, *times, wanted.pipelines)
        slow = (meshes.product(STAGE) == 1) | (step_s > wanted.of(rows).step_s)
        near = np.flatnonzero(~slow) if wanted.pipelines else every[:0]
        if len(near):
            # All but the update is waited for, which takes long to find.
            of, inverse = np.unique(rows[near], return_inverse=True)
            update = floors.update_s(pricer, placing.meshes(sizes[of]), cuts[of])
            update, some = update[:, inverse], meshes.take(near)
            total, at = update.sum(axis=0), rows[near]
            whole, shown = floors.stored_s(
                pricer, some, moved[..., near], rest[at] + total
            )
            times = whole, whole - total, places[:, at] + update + shown
            more_s = floors.in_stages(
                pricer, some, cuts[at], *times, wanted.pipelines, update
            )
            step_s[near] = np.maximum(step_s[near], more_s)
        return step_s

    if placing.anywhere is None:
        return bound(placing.meshes(sizes), every)
    step_s = np.full(len(sizes), np.inf)
    near = every
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
) -> Table:
    both = np.stack([of_step[0], of_step[2:][BLOCK]])
    each = [
        fitting.most_blocks(pricer, meshes, cuts, how, both, limit_s)
        for how in pipelines
    ]
    return np.array(each).reshape(len(each), len(meshes))


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
        self._found = Floors(
            np.zeros((2 + PLACES, count)),
            np.zeros((2, 3, count)),
            np.zeros((3, count)),
        )

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
            wanted: What is asked; what is too slow needs no bound on its memory.
        """
        rows = rows[~self._known[rows]]
        self._known[rows] = True
        fits = arguments_divide(pricer, self.grid[rows], self.cuts[rows], self.batch)
        self._floor_s[rows[fits]] = 0.0
        rows = rows[fits & divide_alike(pricer, self.grid[rows], {})]
        if not len(rows):
            return
        meshes, cuts = placing.meshes(self.grid[rows]), self.cuts[rows]
        of_step = floors.rest_s(pricer, meshes, cuts)
        self._found.of_step[:, rows] = of_step
        own = of_step[0], of_step[0], of_step[2:], wanted.pipelines
        floor_s = floors.in_stages(pricer, meshes, cuts, *own)
        self._floor_s[rows] = floor_s
        # What is too slow whatever fits need not be held against memory.
        near = np.flatnonzero(floor_s <= wanted.step_s)
        if len(near):
            own = of_step[:, near], floor_s[near], wanted.of(near)
            self._floor_s[rows[near]] = self._fitting_s(
                pricer, placing, rows[near], *own
            )

    def _fitting_s(
        self,
        pricer: Pricer,
        placing: Placing,
        rows: np.ndarray,
        of_step: Table,
        floor_s: Vector,
        wanted: Wanted,
    ) -> Vector:
        """The same of candidates that take so long whatever fits."""
        meshes, cuts = Meshes(placing.cluster, self.grid[rows]), self.cuts[rows]
        hows, nothing = wanted.pipelines, np.zeros((2, len(rows)))
        alive = _alive(pricer, meshes, cuts, wanted.offloads)
        self._found.alive[:, :, rows] = alive
        self._found.moved[:, rows] = _moved(pricer, meshes, cuts, wanted.offloads)
        own = (
            fitting.waits(meshes, cuts, hows),
            alive[-1],
            nothing,
            wanted.bytes_,
        )
        small = fitting.room(pricer, meshes, *own)
        if hows:
            most = _most(pricer, meshes, cuts, hows, of_step, wanted.step_s)
            soon = fitting.room(pricer, meshes, *own, most)
            slow_s = np.maximum(floor_s, _above(wanted.step_s))
            floor_s = np.where(soon, floor_s, slow_s)
        return np.where(small, floor_s, np.inf)

    @property
    def every_s(self) -> Vector:
        """`floor_s` of all candidates; NaN as well where it is not found yet."""
        return self._floor_s

    def floor_s(self, rows: np.ndarray) -> Vector:
        """Seconds a step takes at least, as in the function; NaN where it cannot be.

        There the batch, or an argument, does not divide.
        """
        return self._floor_s[rows]

    def floors(self, rows: np.ndarray) -> Floors:
        """The bounds of some candidates."""
        return self._found.take(rows)
