"""What a search finds of its candidates, for a later one with more fields fixed.

A bound of a candidate holds as well where fewer ways to run it are left: of a smaller
space only what is between the old best and the new one has to be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from autoshard.cost.context import FREE
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
        self._begins = np.cumsum([0, *(len(cuts) for _, cuts in rounds)])
        none = np.zeros((0, len(AXES) + 1), dtype=np.int64)
        each = [np.column_stack([sizes, cuts]) for sizes, cuts in rounds]
        self._rows = np.concatenate([none, *each]).astype(np.int64)
        self._offloads: dict[object, frozenset[Offload]] = {}
        self._noted: dict[object, list[tuple[Rows | slice, Vector]]] = {}
        # Where candidates are in earlier searches.
        self._places: list[tuple[Known, Rows]] = []
        while earlier is not None:
            if self._within(earlier):
                self._places.append((earlier, _places(self._rows, earlier._rows)))
            earlier = earlier._places[0][0] if earlier._places else None

    def _within(self, earlier: Known) -> bool:
        """Whether all ways to run a candidate are among those of an earlier search."""
        if earlier._order not in ("auto", self._order):
            return False
        # Without any way to take turns, `stage` is an axis like any other.
        if not self._pipelines or not earlier._pipelines:
            one_stage = bool((self._rows[:, STAGE] == 1).all())
            return one_stage or self._pipelines == earlier._pipelines
        return self._pipelines <= earlier._pipelines

    def floor_s(
        self, structure: Strategy, offloads: Sequence[Offload], number: int
    ) -> Vector | None:
        """What earlier searches found of the candidates of a structure.

        Args:
            structure: It.
            offloads: What may be in the host's memory.
            number: Of the round.

        Returns:
            As `Watch.lets` takes them, float64[candidate], zero for those of which
            nothing is known; None if no earlier search has bounds.
        """
        begin, end = self._begins[number : number + 2]
        found: Vector | None = None
        for earlier, places in self._places:
            own = places[begin:end]
            for key in _bounding(structure):
                if not earlier._offloads.get(key, frozenset()).issuperset(offloads):
                    continue
                whole = np.zeros(len(earlier._rows) + 1)  # the last for those not there
                for rows, floor_s in earlier._noted.get(key, ()):
                    # Of what is NaN there nothing is known yet.
                    whole[rows] = np.fmax(whole[rows], floor_s)
                taken = whole[own] * (1 - ROUNDING)
                found = taken if found is None else np.maximum(found, taken)
        return found

    def note_rules(
        self,
        structure: Strategy,
        offloads: Sequence[Offload],
        number: int,
        floor_s: Vector,
    ) -> None:
        """Keeps bounds of all candidates, whatever their storage.

        Args:
            structure: One with the rules and the schedule.
            offloads: What may be in the host's memory.
            number: Of the round.
            floor_s: As from `RuleBounds`, float64[candidate]; it is not copied, so that
                what is written there later is kept, too.
        """
        begin, end = self._begins[number : number + 2]
        self._note(_family(structure), offloads, slice(begin, end), floor_s)

    def note(
        self,
        structure: Strategy,
        offloads: Sequence[Offload],
        number: int,
        rows: Rows,
        floor_s: Vector,
    ) -> None:
        """Keeps bounds of some candidates of a structure, `rows` of a round."""
        at = rows + self._begins[number]
        self._note(_key(structure), offloads, at, floor_s)

    def _note(
        self,
        key: object,
        offloads: Sequence[Offload],
        rows: Rows | slice,
        floor_s: Vector,
    ) -> None:
        self._offloads[key] = frozenset(offloads)
        self._noted.setdefault(key, []).append((rows, floor_s))


def _family(structure: Strategy) -> tuple[object, ...]:
    """What tells structures from others of other rules or schedules."""
    schedule = structure.schedule
    kind = schedule.context_kind, schedule.context_heads
    return structure.rules, schedule.remat, kind, frozenset(structure.mesh)


def _key(structure: Strategy) -> tuple[object, ...]:
    """What tells a structure from others, whatever fills the holes that are left."""
    return (*_family(structure), structure.storage)


def _bounding(structure: Strategy) -> Iterator[tuple[object, ...]]:
    """What bounds of a structure are noted under."""
    for kind in (structure.schedule.context_kind, FREE):
        update = {"context_kind": kind}
        schedule = structure.schedule.model_copy(update=update)
        some = structure.model_copy(update={"schedule": schedule})
        yield from (_family(some), _key(some))


def _places(rows: Rows, among: Rows) -> Rows:
    """Where rows are among others; -1 where they are not."""
    found = np.full(len(rows), -1)
    if not len(among):
        return found
    # Numbers that hardly any two rows share, so that few are compared in vain.
    weights = np.random.default_rng(0).integers(1, 2**62, rows.shape[1])
    own, others = rows @ weights, among @ weights
    order = np.argsort(others, kind="stable")
    at = order[np.minimum(np.searchsorted(others[order], own), len(others) - 1)]
    same = (among[at] == rows).all(axis=1)
    return np.where(same, at, found)


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
    np.minimum.at(floor_s, own, found.step_s[fits])
    # Another way to run what is kept may be faster than that, and above the limit too.
    known = (floor_s < np.inf) & (floor_s <= limit_s)
    return np.where(known, floor_s, missing_s)
