"""Which candidates of structures bounds let through, and what prices these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from autoshard.cost import Pricer
from autoshard.cost.context import FREE
from autoshard.cost.offload import Offload
from autoshard.cost.pipeline import Pipeline
from autoshard.plan.strategy import Strategy
from autoshard.search.bounds import RuleBounds, Wanted, floor_s
from autoshard.search.divisible import divisible
from autoshard.search.known import Known
from autoshard.search.placing import Placing
from autoshard.search.propagated import Propagated
from autoshard.search.reading import Sketch
from autoshard.search.watch import Vector, Watch


class Sieve:
    """Lets through the candidates of structures that may be among the best.

    Structures that follow one another and differ in storage alone share bounds.

    Args:
        propagated: What gives structures propagated.
        grid: Mesh sizes of the candidates, int64[candidate, axis].
        cuts: Their microbatches, int64[candidate].
        batch: Examples in the batch.
        pipelines: How stages may take turns.
        watch: What candidates must be below; where no number of the best is wanted,
            none is left out but what does not divide.
        known: Where bounds are noted.
        number: Of the round there.
    """

    def __init__(
        self,
        propagated: Propagated,
        grid: np.ndarray,
        cuts: np.ndarray,
        batch: int,
        pipelines: Sequence[Pipeline],
        watch: Watch,
        known: Known,
        number: int,
    ) -> None:
        self._propagated = propagated
        self._grid, self._cuts, self._batch = grid, cuts, batch
        self._pipelines, self._watch = pipelines, watch
        self._known, self._number = known, number
        self._own = _Family()
        self._free = _Family()
        self._free_s: dict[object, Vector] = {}

    def parts(
        self,
        structure: Strategy,
        sketch: Sketch,
        placing: Placing,
        offloads: Sequence[Offload],
        here: np.ndarray,
    ) -> list[tuple[Pricer, np.ndarray]]:
        """Those of some candidates of a structure that are let through.

        What is not is counted.

        Args:
            structure: It.
            sketch: Its program.
            placing: How axes may be laid out.
            offloads: What may be in the host's memory.
            here: Which candidates.
        """
        asked = structure, sketch, placing, offloads
        if not len(here):
            return []
        if self._watch.best is None:
            return list(self._dividing(structure, sketch, here))
        bounds = self._under_rules(self._own, *asked, here)
        here = here[self._watch.lets(bounds.floor_s(here))]
        found = []
        for pricer, at in self._dividing(structure, sketch, here):
            floors_s = self._floors_s(pricer, bounds, *asked, at)
            found.append((pricer, at[self._watch.lets(floors_s)]))
        return found

    def by_known(
        self, structure: Strategy, offloads: Sequence[Offload], here: np.ndarray
    ) -> np.ndarray:
        """Those that are let through by what earlier searches found; see `parts`."""
        if self._watch.best is None or not len(here):
            return here
        before_s = self._known.floor_s(structure, offloads, self._number)
        return here if before_s is None else here[self._watch.lets(before_s[here])]

    def whatever_kind(
        self,
        structure: Strategy,
        sketch: Sketch,
        placing: Placing,
        offloads: Sequence[Offload],
        here: np.ndarray,
    ) -> np.ndarray:
        """Those that are let through by what no kind of attention is below.

        It is found once for the kinds of a structure, which follow one another, and
        mostly rules out all of them at once.

        Args:
            structure: As in `parts`, of one of the kinds.
            sketch: As in `parts`.
            placing: How axes may be laid out, whatever the kind.
            offloads: As in `parts`.
            here: Which candidates.
        """
        schedule = structure.schedule.model_copy(update={"context_kind": FREE})
        free = structure.model_copy(update={"schedule": schedule})
        bounded = self._watch.best is not None
        if not (bounded and self._propagated.passes(free, sketch)):
            return here
        if self._free.of != (free.rules, free.schedule):
            self._free_s = {}
        asked = free, sketch, placing, offloads
        if free.storage not in self._free_s:
            self._free_s[free.storage] = np.full(len(self._grid), -1.0)
        floor_s = self._free_s[free.storage]
        rows = here[floor_s[here] < 0]
        bounds = self._under_rules(self._free, *asked, rows)
        floor_s[rows] = bounds.floor_s(rows)
        # Of what a bound of the rules rules out nothing more is asked.
        rows = rows[floor_s[rows] <= self._watch.step_s]
        floor_s[rows] = np.nan
        for pricer, at in self._dividing(free, sketch, rows, count=False):
            floor_s[at] = self._floors_s(pricer, bounds, *asked, at)
        return here[self._watch.lets(floor_s[here])]

    def _under_rules(
        self,
        family: _Family,
        structure: Strategy,
        sketch: Sketch,
        placing: Placing,
        offloads: Sequence[Offload],
        rows: np.ndarray,
    ) -> RuleBounds:
        """Bounds of some candidates of all structures that differ in storage alone."""
        if family.of != (structure.rules, structure.schedule):
            family.of = structure.rules, structure.schedule
            family.first = structure
            family.bounds = RuleBounds(self._grid, self._cuts, self._batch)
            every_s = family.bounds.every_s
            self._known.note_rules(structure, offloads, self._number, every_s)
        wanted = self._wanted(offloads)
        own = family.first, sketch
        for active, part in self._propagated.parts(*own, self._grid, rows):
            pricer = self._propagated.pricer(*own, active)
            family.bounds.find(pricer, placing, part, wanted)
        return family.bounds

    def _dividing(
        self,
        structure: Strategy,
        sketch: Sketch,
        here: np.ndarray,
        *,
        count: bool = True,
    ) -> Iterator[tuple[Pricer, np.ndarray]]:
        """Those that divide every dim they shard, by what prices them."""
        asked = structure, sketch
        for active, rows in self._propagated.parts(*asked, self._grid, here):
            pricer = self._propagated.pricer(*asked, active)
            fits = divisible(pricer, self._grid[rows], self._cuts[rows], self._batch)
            self._watch.indivisible += int((~fits).sum()) if count else 0
            yield from self._propagated.as_divided(
                *asked, active, self._grid, rows[fits]
            )

    def _floors_s(
        self,
        pricer: Pricer,
        bounds: RuleBounds,
        structure: Strategy,
        sketch: Sketch,
        placing: Placing,
        offloads: Sequence[Offload],
        at: np.ndarray,
    ) -> Vector:
        own = self._grid[at], self._cuts[at].astype(float), bounds.floors(at)
        found = floor_s(pricer, placing, *own, self._wanted(offloads))
        self._known.note(structure, offloads, self._number, at, found)
        return found

    def _wanted(self, offloads: Sequence[Offload]) -> Wanted:
        watch = self._watch
        return Wanted(self._pipelines, offloads, watch.bytes_, watch.step_s)


class _Family:
    """The bounds of structures with the same rules and schedule."""

    of: object = None
    first: Strategy
    bounds: RuleBounds
