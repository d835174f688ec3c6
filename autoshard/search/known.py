"""What a search finds of its candidates, for a later one with more fields fixed.

A bound of a candidate holds as well where fewer ways to run it are left: of a smaller
space only what is between the old best and the new one has to be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autoshard.cost.offload import Offload
from autoshard.cost.pipeline import Pipeline
from autoshard.ir.mesh import AXES
from autoshard.plan.strategy import Strategy
from autoshard.search.priced import STAGE, Candidates

Vector = np.ndarray[Any, np.dtype[np.float64]]
Rows = np.ndarray[Any, np.dtype[np.int64]]

ROUNDING = 1e-9
"""What is priced among others may be rounded otherwise."""


class Known:
    """Bounds on the candidates of one search.

    Args:
        strategy: What is searched.
        pipelines: How stages may take turns in it.
        rounds: Its mesh sizes, int64[candidate, axis], with their microbatches, as in
            `Space.rounds`.
        earlier: Of another search of the same program on the same cluster, whose bounds
            are taken over where they hold.
    """

    def __init__(
        self,
        strategy: Strategy,
        pipelines: Sequence[Pipeline],
        rounds: Sequence[tuple[np.ndarray, np.ndarray]],
        earlier: Known | None = None,
    ) -> None:
        self._order, self._pipelines = strategy.order, frozenset(pipelines)
        self._offloads: dict[object, frozenset[Offload]] = {}
        self._floor_s: dict[object, Vector] = {}
        self._begins = np.cumsum([0, *(len(cuts) for _, cuts in rounds)])
        none = np.zeros((0, len(AXES) + 1), dtype=np.int64)
        each = [np.column_stack([sizes, cuts]) for sizes, cuts in rounds]
        self._rows = np.concatenate([none, *each]).astype(np.int64)
        self._earlier = earlier if earlier and self._within(earlier) else None
        self._places = self._earlier and self._earlier._find(self._rows)

    def _within(self, earlier: Known) -> bool:
        """Whether all ways to run a candidate are among those of an earlier search."""
        if earlier._order not in ("auto", self._order):
            return False
        # Without any way to take turns, `stage` is an axis like any other.
        if not self._pipelines or not earlier._pipelines:
            one_stage = bool((self._rows[:, STAGE] == 1).all())
            return one_stage or self._pipelines == earlier._pipelines
        return self._pipelines <= earlier._pipelines

    def _find(self, rows: Rows) -> Rows:
        """Where other candidates are among these; -1 where they are not."""
        own = {row.tobytes(): k for k, row in enumerate(self._rows)}
        return np.array([own.get(row.tobytes(), -1) for row in rows], dtype=np.int64)

    def floor_s(
        self, structure: Strategy, offloads: Sequence[Offload], number: int
    ) -> Vector:
        """What is known of the candidates of a structure; to be raised in place.

        Args:
            structure: It.
            offloads: What may be in the host's memory.
            number: Of the round.

        Returns:
            As `Watch.lets` takes them, float64[candidate]; zero where nothing is known.
        """
        begin, end = self._begins[number : number + 2]
        key = _key(structure)
        if key not in self._floor_s:
            self._offloads[key] = frozenset(offloads)
            self._floor_s[key] = self._taken_over(key)
        return self._floor_s[key][begin:end]

    def _taken_over(self, key: object) -> Vector:
        found, earlier, places = np.zeros(len(self._rows)), self._earlier, self._places
        if earlier is None or places is None or key not in earlier._floor_s:
            return found
        if self._offloads[key] <= earlier._offloads[key]:
            at = np.flatnonzero(places >= 0)
            found[at] = earlier._floor_s[key][places[at]]
        return found


def _key(structure: Strategy) -> object:
    """What tells a structure from others, whatever fills the holes that are left."""
    schedule = structure.schedule
    kind = schedule.context_kind, schedule.context_heads
    axes = frozenset(structure.mesh)
    return structure.rules, structure.storage, schedule.remat, kind, axes


def as_priced(
    found: Candidates, sizes: np.ndarray, cuts: np.ndarray, limit_s: float, room: float
) -> Vector:
    """Bounds of candidates that were priced: what they take, or what is too slow.

    Args:
        found: What was kept of them: all ways to run them that take no longer.
        sizes: Of their meshes, int64[candidate, axis].
        cuts: Their microbatches, int64[candidate].
        limit_s: What they had to stay within.
        room: Bytes that a chip has for them.
    """
    # Without a limit some can be missing only because they cannot be cut into stages.
    missing_s = np.nextafter(limit_s, np.inf) if limit_s < np.inf else 0.0
    floor_s = np.full(len(sizes), np.inf)
    at = {row.tobytes(): k for k, row in enumerate(np.column_stack([sizes, cuts]))}
    fits = found.peak_bytes <= room
    rows = np.column_stack([found.sizes, found.cuts])[fits]
    own = np.array([at[row.tobytes()] for row in rows], dtype=np.int64)
    np.minimum.at(floor_s, own, found.step_s[fits] * (1 - ROUNDING))
    return np.where(floor_s < np.inf, floor_s, missing_s)
