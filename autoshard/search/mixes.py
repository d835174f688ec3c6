"""Mixes of two policies of rematerialisation: some blocks have one, the rest another.

The blocks of a program are alike, so what a mix costs hangs on how many blocks have
which policy. A second policy is of use where the faster one does not fit in memory and
the slower one does: then as many blocks have the faster one as fit. A third could only
fill what is left, which is less than one block. The blocks that recompute more come
first: their backward passes run last, when what the others keep is free again.

The space are all meshes, microbatches, rules and storages of one stage that fit with
the slower of two policies and not with the faster one, each with every number of blocks
that have the faster one, and with nothing in the host's memory unless that is fixed.
Where both fit, a mix differs from them by the kernels where one policy ends, which has
been a few millionths either way. What is priced is priced as
traced, the copies included that a loop costs which is run as two. What is not priced is
ruled out by two bounds: a mix takes no less time than the faster policy (not: than both
in proportion, as what is recomputed may hide collectives), and of what that one needs
beyond state no more can go than the part of the blocks that have the other one. With
more blocks that recompute, a step is taken to be no faster and no larger: the search
for their number ends where it turns. The tests hold all that against every candidate
alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autoshard.cost.collectives import Meshes
from autoshard.ir.remat import mixed
from autoshard.ir.train_step import TrainStep
from autoshard.plan.cluster import Cluster
from autoshard.plan.strategy import Strategy
from autoshard.search import space
from autoshard.search.candidates import Space
from autoshard.search.priced import Candidates
from autoshard.search.watch import Vector, Watch

PAIRS = tuple(itertools.combinations(reversed(space.REMATS), 2))
"""Two policies, the one that recomputes less first."""


class Ceiling(Watch):
    """Prices all that is as fast as a limit, whatever its memory."""

    def saw(self, sizes: np.ndarray, step_s: Vector, peak_bytes: Vector) -> None:
        """Notes nothing: the limit stays."""

    def limit_s(self, sizes: np.ndarray, step_s: Vector, peak_bytes: Vector) -> float:
        """The limit."""
        return self.step_s

    def limits_s(self, sizes: np.ndarray, step_s: Vector, peak_bytes: Vector) -> Vector:
        """The limit, float64[candidate]."""
        return np.full(len(sizes), self.step_s)


def _reaching(limit_s: float) -> Ceiling:
    return Ceiling(1, float("inf"), float("inf"), limit_s)


def mixes(
    everything: Space, strategy: Strategy, cluster: Cluster, watch: Watch
) -> Iterator[Candidates]:
    """Prices the mixes of a strategy's space that may be among what is wanted.

    Args:
        everything: The space of the program.
        strategy: Whose remat is the hole `"mix"`.
        cluster: Where.
        watch: What has been found with one policy for all blocks. Where it asks for all
            that nothing beats in both time and memory, mixes are left out: between two
            policies there are as many as blocks.

    Yields:
        Structures with their candidates. A pair of policies counts as one that is
        looked at.
    """
    fn, visited = everything.fn, watch.visited
    blocks = fn.blocks(everything.args[-1]) if isinstance(fn, TrainStep) else 0
    several = strategy.mesh.get("stage", 1) not in (1, "auto")
    why = (
        "no block repeats"
        if blocks < 2
        else "they are of one stage; leave stage = 'auto' or set it to 1"
        if several and everything.pipelines(strategy)
        else "a search for a front or a size has one policy for all blocks"
        if watch.best is None
        else "of two loops it is not known what is kept for the backward pass"
        if "activations" in strategy.schedule.offload
        else ""
    )
    if why:
        everything.log(f"mixes of policies left out: {why}")
        watch.visited += len(PAIRS)
        return
    for done, (fast, lean) in enumerate(PAIRS):
        pair = _Pair(everything, strategy, cluster, watch, blocks, fast, lean)
        for found in pair.best():
            watch.visited = visited + done
            yield found
        watch.visited = visited + done + 1


@dataclass(frozen=True)
class _Open:
    """A candidate that is too large with the faster policy for all blocks.

    Attributes:
        structure: Its rules and storage, with the faster policy.
        sizes: Its mesh, int64[1, axis].
        cuts: Its microbatches, int64[1].
        fast: Seconds a step and bytes per chip, with the faster policy.
        lean: With the other one.
        state_bytes: Per chip, whatever the policy.
        room_bytes: Of a chip.
        blocks: Of the program.
    """

    structure: Strategy
    sizes: np.ndarray
    cuts: np.ndarray
    fast: tuple[float, float]
    lean: tuple[float, float]
    state_bytes: float
    room_bytes: float
    blocks: int

    @property
    def least_s(self) -> float:
        """Seconds a step takes at least, however many blocks recompute more."""
        return self.fast[0]

    @property
    def guess_s(self) -> float:
        """Seconds a step takes if nothing hides more than in proportion."""
        (fast_s, _), (lean_s, _) = self.fast, self.lean
        return fast_s + self.fewest / self.blocks * (lean_s - fast_s)

    @property
    def fewest(self) -> int:
        """How many blocks have to recompute more for it to fit, at least."""
        return self._until(self.state_bytes)

    @property
    def likely(self) -> int:
        """How many have to if what they keep is all that counts."""
        return self._until(self.lean[1])

    def _until(self, least_bytes: float) -> int:
        _, bytes_ = self.fast
        part = (bytes_ - self.room_bytes) / (bytes_ - least_bytes)
        # What a rounding error lies above a whole number is that number.
        return max(1, int(np.ceil(self.blocks * part - 1e-9)))


@dataclass(frozen=True)
class _Pair:
    everything: Space
    strategy: Strategy
    cluster: Cluster
    watch: Watch
    blocks: int
    fast: str
    lean: str

    @cached_property
    def plain(self) -> Strategy:
        """The strategy with one stage, and with nothing offloaded if that is open."""
        plain = space.of_one_stage(self.strategy)
        return _with(plain, offload=()) if plain.schedule.offload == "auto" else plain

    def _mixed(self, strategy: Strategy, count: int) -> Strategy:
        """A strategy in which so many blocks recompute more."""
        rest = self.blocks - count
        return _with(strategy, remat=mixed((self.lean, count), (self.fast, rest)))

    def best(self) -> Iterator[Candidates]:
        """Those that may be among the best, the likeliest first."""
        open_ = sorted(self._open(), key=lambda one: one.guess_s)
        self.watch.pruned += len(open_) * (self.blocks - 1)
        for one in open_:
            yield from self._of(one)

    def _of(self, one: _Open) -> Iterator[Candidates]:
        """Seeks the fewest blocks that must recompute more for a candidate to fit."""
        if one.least_s > self.watch.step_s:
            return
        count, way = min(one.likely, self.blocks - 1), 0
        while one.fewest <= count < self.blocks:
            mix = self._mixed(one.structure, count)
            reach = _reaching(self.watch.step_s)
            found = self.everything.priced_at(
                mix, self.cluster, reach, one.sizes, one.cuts
            )
            self.watch.pruned -= 1
            step = -1  # too slow, or it fits: a larger number is slower
            if found is not None:
                yield found
                fits = found.peak_bytes <= one.room_bytes
                for k in np.flatnonzero(fits).tolist():
                    self.watch.saw_mix(found.identity(k), float(found.step_s[k]))
                step = -1 if fits.all() else 1
            if step == -way:
                return
            way = step
            count += step

    def _open(self) -> Iterator[_Open]:
        """What is fast enough with the faster policy, and fits with the other alone."""
        room = self.watch.bytes_
        fast = _with(self.plain, remat=self.fast)
        reach = _reaching(self.watch.step_s)
        for found in self.everything.priced(fast, self.cluster, watch=reach):
            least = {
                row: costs for row, costs in _least(found).items() if costs[1] > room
            }
            if not least:
                continue
            rows = np.array(list(least))
            sizes, cuts = rows[:, :-1], rows[:, -1]
            other = self.everything.priced_at(
                _with(found.strategy, remat=self.lean),
                self.cluster,
                _reaching(float("inf")),
                sizes,
                cuts,
            )
            held = found.pricer.liveness.state_bytes(Meshes(self.cluster, sizes))
            gone = found.strategy.schedule.offload
            state = sum(size for kind, size in held.items() if kind not in gone)
            leaner = _least(other) if other else {}
            for k, (row, costs) in enumerate(least.items()):
                step_s, bytes_ = leaner.get(row, (0.0, 0.0))
                if step_s > costs[0] and bytes_ <= room:
                    yield _Open(
                        structure=found.strategy,
                        sizes=sizes[k : k + 1],
                        cuts=cuts[k : k + 1],
                        fast=costs,
                        lean=(step_s, bytes_),
                        state_bytes=float(np.broadcast_to(state, len(rows))[k]),
                        room_bytes=room,
                        blocks=self.blocks,
                    )


def _with(strategy: Strategy, **schedule: Any) -> Strategy:
    found = strategy.schedule.model_copy(update=schedule)
    return strategy.model_copy(update={"schedule": found}).placed(strategy.places)


def _least(found: Candidates) -> dict[tuple[int, ...], tuple[float, float]]:
    """Seconds and bytes of the fastest order, by mesh sizes and microbatches."""
    keys = zip(*found.sizes.T.tolist(), found.cuts.tolist(), strict=True)
    costs = zip(found.step_s.tolist(), found.peak_bytes.tolist(), strict=True)
    least: dict[tuple[int, ...], tuple[float, float]] = {}
    for key, cost in zip(keys, costs, strict=True):
        least[key] = min(cost, least.get(key, cost))
    return least
