"""Exploring a space: what was found, what was left, and how good that is."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autoshard.cost import fastest_s
from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.program import no_collection
from autoshard.plan.cluster import Cluster
from autoshard.plan.strategy import Strategy
from autoshard.search import space
from autoshard.search.candidates import Space
from autoshard.search.known import ROUNDING, Known
from autoshard.search.mixes import PAIRS, mixes
from autoshard.search.priced import Candidates
from autoshard.search.watch import Watch

_PROGRESS_EVERY_S = 1.0

Entry = tuple[float, float, int, int]
"""Seconds, bytes, number of the group and index in it, of a candidate that fits."""


@dataclass(frozen=True)
class Explored:
    """A space, priced as far as time allowed.

    Attributes:
        groups: Structures with their candidates.
        capacity: Bytes of a chip that a program may use.
        watch: How many candidates were left out, and why.
        floor_s: No structure that was left has a faster candidate; infinite if none was
            left.
        left: Structures that were left.
        why: Why they were left: empty, "time limit" or "interrupted".
        known: Bounds on its candidates, for searches with more fields fixed.
    """

    groups: tuple[Candidates, ...]
    capacity: float
    watch: Watch
    floor_s: float
    left: int
    why: str
    known: Known

    @property
    def enumerated(self) -> int:
        """Candidates that were priced."""
        return sum(len(g.sizes) for g in self.groups)

    @property
    def infeasible(self) -> int:
        """Candidates that do not fit in memory."""
        priced = sum(int((g.peak_bytes > self.capacity).sum()) for g in self.groups)
        return priced + self.watch.too_large

    @cached_property
    def ranked(self) -> list[Entry]:
        """Those that fit, the fastest first."""
        fitting = [np.flatnonzero(g.peak_bytes <= self.capacity) for g in self.groups]
        if not fitting:
            return []
        pairs = list(zip(self.groups, fitting, strict=True))
        times = np.concatenate([group.step_s[at] for group, at in pairs])
        peaks = np.concatenate([group.peak_bytes[at] for group, at in pairs])
        numbers = np.repeat(np.arange(len(pairs)), [len(at) for at in fitting])
        indices = np.concatenate(fitting)
        order = np.lexsort((indices, numbers, peaks, times))
        columns = (times, peaks, numbers, indices)
        return list(zip(*(c[order].tolist() for c in columns), strict=True))

    @property
    def lower_bound_s(self) -> float:
        """No candidate that fits is predicted faster."""
        best = self.ranked[0][0] if self.ranked else float("inf")
        return min(best, self.floor_s)

    def guess_s(self, fixed: Mapping[str, Any], count: int) -> float:
        """Seconds that so many plans take that have some more fields fixed.

        Infinite if fewer were priced.

        Args:
            fixed: By the keys of `fixed_fields`.
            count: How many.
        """
        watch = Watch(count, self.capacity)
        for group in filter(lambda group: len(group.sizes), self.groups):
            met = np.full(len(group.sizes), True)
            for key, value in fixed.items():
                met &= group.meets(key, value)
            watch.saw(group.sizes[met], group.step_s[met], group.peak_bytes[met])
        return watch.step_s * (1 + ROUNDING)

    def front(self) -> list[Entry]:
        """Of `ranked`, those than which no other is both as fast and as small.

        The fastest comes first, the smallest last.
        """
        found: list[Entry] = []
        for entry in self.ranked:
            if not found or entry[1] < found[-1][1]:
                found.append(entry)
        return found


@no_collection()
def explore(
    everything: Space,
    strategy: Strategy,
    cluster: Cluster,
    *,
    best: int | None = None,
    time_limit_s: float | None = None,
    known: Known | None = None,
    guess_s: float = float("inf"),
) -> Explored:
    """Prices the candidates of a strategy, structure by structure.

    The first structure is always priced. After that, time may run out and the user may
    interrupt (Ctrl-C); what was found until then is kept, and the bound says so: what
    was left is not faster than its matrix products at the best rate of all chips.

    Args:
        everything: The space of the program.
        strategy: Which fields are fixed and which are holes.
        cluster: Where to run.
        best: How many of the best are wanted, each of another structure or mesh: what a
            bound rules out to be one of them is not priced. All is where it is None,
            but of orders of the axes only what may be on the front.
        time_limit_s: Seconds after which no further structure is begun.
        known: Of a search of the same program on the same cluster that has bounds.
        guess_s: Seconds in which there may be as many candidates as are wanted. Where
            there are not, the space is gone through again without it; so it does not go
            with a time limit.
    """
    assert time_limit_s is None or guess_s == float("inf")
    capacity = cluster.hbm_bytes * MEMORY_HEADROOM
    rounds = everything.rounds(strategy, cluster)
    whole = sum(1 for _ in space.structures(strategy)) * len(rounds)
    known = Known(strategy, everything.pipelines(strategy), rounds, known)
    start_s = said_s = time.monotonic()
    plain = everything.sketch("none")
    assert plain is not None
    shallow = plain.shallow
    floor_s = fastest_s(shallow.traced.program, shallow.classes, shallow.work, cluster)
    # The front of all plans has those with something offloaded that need not have it.
    enough_bytes = 0.0 if best is None else capacity
    watch = Watch(best, capacity, enough_bytes, guess_s=guess_s)
    groups: list[Candidates] = []
    why, tried = "", 0
    found = everything.priced(strategy, cluster, watch=watch, known=known)
    if strategy.schedule.remat == "mix":
        whole += len(PAIRS)
        found = itertools.chain(found, mixes(everything, strategy, cluster, watch))
    try:
        for group in found:
            groups.append(group)
            tried += len(group.sizes)
            now_s = time.monotonic()
            if now_s - said_s >= _PROGRESS_EVERY_S:
                said_s = now_s
                best_s = watch.fastest_s
                fits = best_s < float("inf")
                incumbent = f"best {best_s:.4g} s" if fits else "none fits yet"
                everything.log(
                    f"{tried} candidates priced, {watch.visited} of {whole} structures "
                    f"looked at; {incumbent}, none below {floor_s:.4g} s"
                )
            if time_limit_s is not None and now_s - start_s > time_limit_s:
                why = "time limit"
                break
    except KeyboardInterrupt:
        if not any(len(group.sizes) for group in groups):
            raise
        why = "interrupted"
    left = whole - watch.visited if why else 0
    # An interruption may come while the structure that was visited last is priced.
    left += why == "interrupted"
    if not (left or watch.found_enough):
        try:
            return explore(everything, strategy, cluster, best=best, known=known)
        except KeyboardInterrupt:
            if not any(len(group.sizes) for group in groups):
                raise
            why, left = "interrupted", whole
    return Explored(
        groups=tuple(groups),
        capacity=capacity,
        watch=watch,
        floor_s=floor_s if left else float("inf"),
        left=left,
        why=why if left else "",
        known=known,
    )
