"""The candidates of a space: structures, each with every mesh and microbatch count.

A structure is a strategy in which only mesh sizes and microbatches are still holes. It
is propagated once; all its candidates are priced together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from autoshard.cost.context import ALL_GATHER
from autoshard.cost.offload import Offload, Offloading
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.ir.mesh import AXES
from autoshard.ir.remat import parts_of
from autoshard.ir.stretch import NotAlikeError
from autoshard.ir.trace import abstract
from autoshard.ir.train_step import TrainStep
from autoshard.plan.cluster import Cluster
from autoshard.plan.strategy import Schedule, Strategy
from autoshard.search import space
from autoshard.search.alike import Alike
from autoshard.search.known import Known, as_priced
from autoshard.search.offloads import offloads
from autoshard.search.placing import Placing
from autoshard.search.priced import STAGE, Candidates, price
from autoshard.search.propagated import Propagated
from autoshard.search.reading import Sketch, cuts_traced, fixed_sizes
from autoshard.search.sieve import Sieve
from autoshard.search.staging import staged_as_can_be
from autoshard.search.watch import Watch

Log = Callable[[str], None]


@dataclass
class Space:
    """Prices the structures of a strategy for one program."""

    fn: Any
    args: tuple[Any, ...]
    log: Log
    strategy: Strategy

    def __post_init__(self) -> None:
        self._said: set[str] = set()
        self._sketches: dict[str, Sketch | None] = {}
        self._newest: tuple[tuple[int, str], Sketch] | None = None
        self._propagated = Propagated()

    def sketch(self, remat: str, *, required: bool = True) -> Sketch | None:
        """The program traced without microbatches, with or without remat."""
        lacks = remat in self._sketches and self._sketches[remat] is None
        if remat not in self._sketches or (required and lacks):
            fn = self.fn
            if isinstance(fn, TrainStep):
                if len(self.args) == 1:
                    fn.abstract_state()  # found out once, for all schedules
                fn = fn.with_schedule(microbatches=1, remat=remat)
            elif remat != "none":
                if required:
                    raise InputError(
                        f"the strategy fixes remat = {remat!r}, but a plain function "
                        "cannot be rematerialised: build it with "
                        "autoshard.train_step(loss_fn, optimizer, model=...)."
                    )
                return None
            try:
                self._sketches[remat] = Sketch.of(
                    fn, self.args, self.strategy, log=self._say
                )
            except InputError:
                if required or remat == "none":
                    raise
                why = "no block repeats in the loss function"
                self.log(f"remat {remat!r} left out: {why}")
                self._sketches[remat] = None
        return self._sketches[remat]

    def traced_for(self, schedule: Schedule) -> Sketch:
        """The program traced as a schedule without holes has it.

        Its names are those of the plain program. The newest is kept: plans that are
        written after one another often differ in mesh and storage alone.
        """
        cuts, plain = cuts_traced(schedule), self.sketch("none")
        assert plain is not None
        key = cuts, schedule.remat
        if self._newest is None or self._newest[0] != key:
            try:
                if cuts == 1:
                    traced = self.sketch(schedule.remat)
                    assert traced is not None
                    found = traced.named(plain, self.strategy)
                else:
                    fn, args = self._scheduled(schedule), self.args
                    found = Sketch.of(fn, args, self.strategy, plain, self._say)
            except NotAlikeError as error:
                return self.traced_whole_for(schedule, str(error))
            self._newest = key, found
        return self._newest[1]

    def traced_whole_for(self, schedule: Schedule, why: str) -> Sketch:
        """The same with all copies of its blocks, said why."""
        self._say(f"every copy of the blocks is traced, which takes longer: {why}")
        fn, plain = self._scheduled(schedule), self.sketch("none")
        found = Sketch.of_whole(fn, self.args, self.strategy, plain)
        self._newest = (cuts_traced(schedule), schedule.remat), found
        return found

    def _scheduled(self, schedule: Schedule) -> Any:
        fn, cuts = self.fn, cuts_traced(schedule)
        if isinstance(fn, TrainStep):
            return fn.with_schedule(microbatches=cuts, remat=schedule.remat)
        return fn

    def batch(self) -> int:
        """Leading dim of the data inputs."""
        sketch = self.sketch("none")
        assert sketch is not None
        sizes = {
            i.shape[0] for i in sketch.traced.inputs if i.state == "data" and i.shape
        }
        if len(sizes) > 1:
            raise InputError(
                f"the data inputs disagree on the batch size: leading dims "
                f"{sorted(sizes)}; give every leaf of the batch the same leading dim."
            )
        if 0 in sizes:
            raise InputError(
                "the batch has a leading dim of 0: it is empty; pass a batch of at "
                "least 1."
            )
        return next(iter(sizes), 0)

    def with_batch_times(self, factor: int) -> Space:
        """The same program on a batch `factor` times as large."""
        *state, batch = self.args
        larger = jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct((x.shape[0] * factor, *x.shape[1:]), x.dtype)
                if x.shape
                else x
            ),
            abstract(batch),
        )
        return Space(self.fn, (*state, larger), self.log, self.strategy)

    def meshes(self, strategy: Strategy, cluster: Cluster) -> np.ndarray:
        """The meshes that the program's own manual regions allow, int64[mesh, axis].

        Raises:
            InfeasibleError: None.
        """
        rows = space.meshes(strategy, cluster)
        sketch = self.sketch("none")
        assert sketch is not None
        if self.pipelines(strategy):
            rows = staged_as_can_be(rows, strategy, sketch.shallow.work.segments)
        for axis, size in fixed_sizes(sketch).items():
            column = rows[:, AXES.index(axis)]
            if not (column == size).any():
                raise InfeasibleError(
                    f"a shard_map of the program is written for {size} devices along "
                    f"{axis!r}, but strategy {strategy.name!r} on {cluster.name} has "
                    f"it only in sizes {sorted(set(column.tolist()))}; set [mesh] "
                    f"{axis} = {size}, or change the shard_map."
                )
            rows = rows[column == size]
        return rows

    def pipelines(self, strategy: Strategy) -> tuple[Pipeline, ...]:
        """How stages may take turns, unless the program has uses of its own for them.

        Where it is written for a `stage` axis itself, that is an axis like any other.
        """
        return () if self._written_for("stage") else space.pipelines(strategy)

    def has_experts(self) -> bool:
        """Whether a dim is one of experts, or the program uses their axis itself."""
        sketch = self.sketch("none")
        assert sketch is not None
        named = sketch.classes.names.values()
        return any("expert" in own for own in named) or self._written_for("expert")

    def _written_for(self, axis: str) -> bool:
        """Whether the program itself says what is done along a mesh axis."""
        sketch = self.sketch("none")
        assert sketch is not None
        aliases = sketch.classes.aliases
        return axis in fixed_sizes(sketch) or any(
            axis in (dim or ())
            for seed in sketch.traced.seeds
            for dim in seed.canonical(aliases).dims
        )

    def offloads(
        self, strategy: Strategy, cluster: Cluster, sketch: Sketch, remat: str
    ) -> tuple[Offload, ...]:
        """What may be offloaded; see `search.offloads`."""
        shallow = sketch.shallow
        program = Offloading(shallow.traced, shallow.work)
        found = offloads(strategy, cluster, program)
        if parts_of(remat) and strategy.schedule.offload == "auto":
            # Which of the loops keep what is not known where there are several.
            all_, found = found, tuple(s for s in found if "activations" not in s)
            if len(found) < len(all_):
                self._say("offload of activations left out for mixes of remat")
        missing = cluster.host_lacks
        if strategy.schedule.offload == "auto" and missing and cluster.kind != "cpu":
            self._say(f"offload left out: {cluster.type_name} has no figure {missing}")
        return found

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.log(text)

    def candidates(
        self, strategy: Strategy, cluster: Cluster
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mesh sizes, int64[candidate, axis], and microbatches, int64[candidate]."""
        rows = self.meshes(strategy, cluster)
        cuts = space.microbatches(
            strategy, self.batch(), isinstance(self.fn, TrainStep)
        )
        pieces = np.tile(np.array(cuts, dtype=np.int64), len(rows))
        return np.repeat(rows, len(cuts), axis=0), pieces

    def price(self, strategy: Strategy, cluster: Cluster) -> list[Candidates]:
        """Prices every candidate of every structure."""
        return list(self.priced(strategy, cluster))

    def priced(
        self,
        strategy: Strategy,
        cluster: Cluster,
        keep: Strategy | None = None,
        watch: Watch | None = None,
        known: Known | None = None,
    ) -> Iterator[Candidates]:
        """The structures one after the other, each with its candidates priced.

        Args:
            strategy: Which fields are fixed and which are holes.
            cluster: Where.
            keep: A strategy whose fixed fields are among what the holes may become.
            watch: What need not be priced, and where it is counted; by default all is
                priced, but of orders of the axes only what may be on the front.
            known: Bounds on its candidates, and where those that are found are noted.
        """
        watch = watch or Watch(bytes_=cluster.hbm_bytes * MEMORY_HEADROOM)
        rounds = self.rounds(strategy, cluster)
        known = known or Known(strategy, self.pipelines(strategy), rounds)
        for number, (grid, cuts) in enumerate(rounds):
            own = keep, watch, grid, cuts, known, number
            yield from self._round(strategy, cluster, *own)

    def priced_at(
        self,
        structure: Strategy,
        cluster: Cluster,
        watch: Watch,
        grid: np.ndarray,
        cuts: np.ndarray,
    ) -> Candidates | None:
        """One structure with some of its candidates priced; None if none are.

        Args:
            structure: Of which only sizes, microbatches and the order are holes.
            cluster: Where.
            watch: What need not be priced.
            grid: Mesh sizes, int64[candidate, axis]; all of one stage or of several.
            cuts: Microbatches, int64[candidate].
        """
        known = Known(structure, self.pipelines(structure), [(grid, cuts)])
        own = None, watch, grid, cuts, known, 0
        return next(self._round(structure, cluster, *own), None)

    def rounds(
        self, strategy: Strategy, cluster: Cluster
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """`candidates` in the order to price them: those of one stage come first.

        They are fewer and cheaper to price; what they find bounds the others.
        """
        grid, cuts = self.candidates(strategy, cluster)
        several = grid[:, STAGE] > 1
        return [(grid[at], cuts[at]) for at in (~several, several) if at.any()]

    def _round(
        self,
        strategy: Strategy,
        cluster: Cluster,
        keep: Strategy | None,
        watch: Watch,
        grid: np.ndarray,
        cuts: np.ndarray,
        known: Known,
        number: int,
    ) -> Iterator[Candidates]:
        bounded = watch.best is not None
        open_ = Placing.of(strategy, cluster, grid)
        required = not strategy.schedule.remat_is_open
        hows, propagated, alike = (
            self.pipelines(strategy),
            self._propagated,
            Alike(grid),
        )
        sieve = Sieve(propagated, grid, cuts, self.batch(), hows, watch, known, number)
        for structure in space.structures(strategy, keep):
            watch.visited += 1
            if hows and grid[0, STAGE] > 1 and parts_of(structure.schedule.remat):
                continue  # the blocks of all stages are alike
            gathers = structure.schedule.context_kind == ALL_GATHER
            placing = open_ if gathers else open_.usual
            sketch = self.sketch(structure.schedule.remat, required=required)
            if sketch is None or not propagated.attends(structure, sketch, strategy):
                continue
            new = alike.distinct(structure, sketch.names)
            sets = self.offloads(strategy, cluster, sketch, structure.schedule.remat)
            watch.alike += int((~new).sum())
            here = sieve.by_known(structure, sets, np.flatnonzero(new))
            if len(space.context_kinds(strategy, structure.rules)) > 1:
                here = sieve.whatever_kind(structure, sketch, open_, sets, here)
            parts = sieve.parts(structure, sketch, placing, sets, here)
            whole = partial(propagated.pricer, structure, sketch)
            found = price(
                whole,
                structure,
                sketch.names,
                cluster,
                [(pricer, grid[at], cuts[at]) for pricer, at in parts],
                hows,
                sets,
                placing,
                watch,
            )
            watch.saw(found.sizes, found.step_s, found.peak_bytes)
            if bounded and parts:
                at = np.concatenate([at for _, at in parts])
                asked = grid[at], cuts[at], watch.step_s, watch.bytes_
                priced_s = as_priced(found, *asked)
                known.note(structure, sets, number, at, priced_s)
            yield found
