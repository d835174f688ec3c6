"""The candidates of a space: structures, each with every mesh and microbatch count.

A structure is a strategy in which only mesh sizes and microbatches are still holes. It
is propagated once; all its candidates are priced together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from autoshard.cost import Pricer
from autoshard.cost.context import ALL_GATHER
from autoshard.cost.offload import Offload, Offloading
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.cost.segments import Segments
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.ir.mesh import AXES
from autoshard.ir.remat import parts_of
from autoshard.ir.trace import abstract
from autoshard.ir.train_step import TrainStep
from autoshard.plan.cluster import Cluster
from autoshard.plan.sharded import Layout
from autoshard.plan.strategy import Strategy
from autoshard.propagate import propagate
from autoshard.search import space
from autoshard.search.alike import Alike, felt, state_dims
from autoshard.search.bounds import Family, Wanted, floor_s
from autoshard.search.divisible import divisible
from autoshard.search.offloads import offloads
from autoshard.search.placing import Placing
from autoshard.search.priced import STAGE, Candidates, price
from autoshard.search.reading import Sketch, fixed_sizes
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
        self._pricers: dict[Any, Pricer] = {}
        self._attending: dict[Any, bool] = {}
        self._state_dims: dict[Any, frozenset[tuple[str, ...]]] = {}

    def sketch(self, remat: str, *, required: bool = True) -> Sketch | None:
        """The program traced without microbatches, with or without remat."""
        if remat not in self._sketches:
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
            rows = _staged_as_can_be(rows, strategy, sketch.shallow.work.segments)
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
            found = tuple(some for some in found if "activations" not in some)
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
    ) -> Iterator[Candidates]:
        """The structures one after the other, each with its candidates priced.

        Args:
            strategy: Which fields are fixed and which are holes.
            cluster: Where.
            keep: A strategy whose fixed fields are among what the holes may become.
            watch: What need not be priced, and where it is counted; by default all is
                priced, but of orders of the axes only what may be on the front.
        """
        watch = watch or Watch(bytes_=cluster.hbm_bytes * MEMORY_HEADROOM)
        for grid, cuts in self.rounds(strategy, cluster):
            yield from self._round(strategy, cluster, keep, watch, grid, cuts)

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
        return next(self._round(structure, cluster, None, watch, grid, cuts), None)

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
    ) -> Iterator[Candidates]:
        bounded = watch.best is not None
        open_ = Placing.of(strategy, cluster, grid)
        required = not strategy.schedule.remat_is_open
        batch, hows = self.batch(), self.pipelines(strategy)
        alike = Alike(grid)
        family: Any = None
        bounds, first = Family(grid, cuts, batch), strategy
        for structure in space.structures(strategy, keep):
            watch.visited += 1
            if hows and grid[0, STAGE] > 1 and parts_of(structure.schedule.remat):
                continue  # the blocks of all stages are alike
            gathers = structure.schedule.context_kind == ALL_GATHER
            placing = open_ if gathers else open_.usual
            sketch = self.sketch(structure.schedule.remat, required=required)
            if sketch is None or not self._attends(structure, sketch, strategy):
                continue
            new = alike.distinct(structure, sketch.names)
            if bounded and (structure.rules, structure.schedule) != family:
                family = structure.rules, structure.schedule
                first = structure
                bounds = Family(grid, cuts, batch)
            sets = self.offloads(strategy, cluster, sketch, structure.schedule.remat)
            watch.alike += int((~new).sum())
            here = np.flatnonzero(new)
            if bounded and len(here):
                wanted = Wanted(hows, sets, watch.bytes_, watch.step_s)
                for active, rows in self._parts(first, sketch, grid, here):
                    pricer = self._pricer(first, sketch, active)
                    bounds.find(pricer, placing, rows, wanted)
                here = here[watch.lets(bounds.floor_s(here))]
            if not len(here):
                continue
            parts = []
            for active, rows in self._parts(structure, sketch, grid, here):
                pricer = self._pricer(structure, sketch, active)
                fits = divisible(pricer, grid[rows], cuts[rows], batch)
                watch.indivisible += int((~fits).sum())
                for pricer, at in self._as_divided(
                    structure, sketch, active, grid, rows[fits]
                ):
                    if bounded:
                        wanted = Wanted(hows, sets, watch.bytes_, watch.step_s)
                        own = grid[at], cuts[at].astype(float), bounds.floors(at)
                        at = at[watch.lets(floor_s(pricer, placing, *own, wanted))]
                    parts.append((pricer, grid[at], cuts[at]))
            propagated = partial(self._pricer, structure, sketch)
            found = price(
                propagated,
                structure,
                sketch.names,
                cluster,
                parts,
                hows,
                sets,
                placing,
                watch,
            )
            watch.saw(found.sizes, found.step_s, found.peak_bytes)
            yield found

    def _attends(self, structure: Strategy, sketch: Sketch, asked: Strategy) -> bool:
        """Whether attention can be done as a structure has it.

        Raises:
            InputError: It cannot, and that is fixed.
        """
        kind = structure.schedule.context_kind
        if kind == ALL_GATHER:
            return True
        key = (structure.schedule.remat, structure.rules)
        if key not in self._attending:
            attends = bool(self._pricer(structure, sketch).context.passes)
            self._attending[key] = attends
        if self._attending[key]:
            return True
        if asked.schedule.context_kind == "auto":
            return False
        raise InputError(
            f"context_kind = {kind!r}{asked.where('context_kind')} is for attention "
            "over a sequence that a rule shards over `context`, and none was found: "
            "there must be products of queries and keys, both of the sequence, that "
            'run on a part of the queries each. Add `seq = ["context"]` to [rules] '
            "if it is missing there, or drop context_kind."
        )

    def _parts(
        self, structure: Strategy, sketch: Sketch, grid: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[frozenset[str], np.ndarray]]:
        """Some rows of a grid of mesh sizes, by the axes to propagate along.

        Where an axis has one device the structure is what it is without the axis. As a
        rule it need not be propagated again for that: along the others it is the same.
        """
        schedule = structure.schedule
        if (schedule.remat, structure.rules) not in self._state_dims:
            dims = state_dims(self._pricer(structure, sketch).sharded)
            self._state_dims[schedule.remat, structure.rules] = dims
        dims = self._state_dims[schedule.remat, structure.rules]
        together = sorted(felt(structure, sketch.traced, sketch.classes.fixed, dims))
        columns = [[AXES.index(axis) for axis in axes] for axes in together]
        lacks = np.array([(grid[rows][:, c] == 1).all(axis=1) for c in columns])
        bits = (1 << np.arange(len(together))) @ lacks.reshape(len(together), len(rows))
        for pattern in np.unique(bits).tolist():
            lacking = {
                a for k, own in enumerate(together) if pattern >> k & 1 for a in own
            }
            yield frozenset(AXES) - lacking, rows[bits == pattern]

    def _as_divided(
        self,
        structure: Strategy,
        sketch: Sketch,
        active: frozenset[str],
        grid: np.ndarray,
        rows: np.ndarray,
    ) -> Iterator[tuple[Pricer, np.ndarray]]:
        """Some rows of a grid of mesh sizes, by what prices them as they divide.

        Propagation without sizes takes it that everything divides. Where something it
        asks for does not, it is propagated with the sizes of such a mesh, which then
        stands for all that answer alike.
        """
        sizes: dict[str, int] = {}
        while len(rows):
            pricer = self._pricer(structure, sketch, active, sizes)
            alike = np.ones(len(rows), dtype=bool)
            for size, axes in pricer.sharded.asked:
                ways = grid[rows][:, [AXES.index(a) for a in axes]].prod(axis=1)
                met = size % math.prod(sizes.get(a, 1) for a in axes) == 0
                alike &= (size % ways == 0) == met
            if alike.any():
                yield pricer, rows[alike]
            rows = rows[~alike]
            if len(rows):
                # Of an axis without a size nothing is taken for granted but that it may
                # have several devices, as it has in others that answer alike.
                own = zip(AXES, grid[rows[0]].tolist(), strict=True)
                sizes = {axis: size for axis, size in own if size > 1}

    def _pricer(
        self,
        structure: Strategy,
        sketch: Sketch,
        active: frozenset[str] = frozenset(AXES),
        sizes: Mapping[str, int] = MappingProxyType({}),
    ) -> Pricer:
        layout = replace(Layout.of(structure).along(active), sizes=dict(sizes))
        states = (layout.params, layout.gradients, layout.optimizer)
        key = (structure.schedule.remat, layout.rules, states, tuple(sizes.items()))
        gathering = key, ALL_GATHER
        if gathering not in self._pricers:
            shallow = sketch.shallow
            sharded = propagate(shallow.traced, shallow.classes, layout)
            self._pricers[gathering] = Pricer(sharded, shallow.work)
        if "context" not in active:
            return self._pricers[gathering]
        how = structure.schedule.context_kind, structure.schedule.context_heads
        if (key, *how) not in self._pricers:
            found = self._pricers[gathering].with_context(*how)
            self._pricers[key, *how] = found
        return self._pricers[key, *how]


def _staged_as_can_be(
    rows: np.ndarray, strategy: Strategy, segments: Segments
) -> np.ndarray:
    """Meshes with no more stages than there are blocks, and schedules for them.

    Raises:
        InfeasibleError: The strategy fixes more stages than that.
    """
    stages = rows[:, STAGE]
    most = segments.blocks
    if not (stages <= most).any():
        why = f": {segments.why}" if segments.why else ""
        raise InfeasibleError(
            f"stage = {strategy.mesh['stage']}{strategy.where('stage')} asks for more "
            f"stages than the program has blocks to cut between, {most}{why}. Take as "
            "many stages as there are blocks or fewer, or leave stage = 'auto'."
        )
    rows = _for_blocks(rows[stages <= most], strategy, segments)
    wished = strategy.schedule.pipeline not in ("auto", "none")
    several = rows[:, STAGE] > 1
    # A schedule that is fixed is not followed where there is one stage.
    return rows[several] if wished and several.any() else rows


def _for_blocks(rows: np.ndarray, strategy: Strategy, segments: Segments) -> np.ndarray:
    """Meshes with as many stages as the blocks that are fixed are for.

    Raises:
        InputError: There are not as many blocks in the program.
        InfeasibleError: No mesh has as many stages.
    """
    blocks = strategy.schedule.blocks
    if not blocks:
        return rows
    said = f"blocks = {list(blocks)}{strategy.where('blocks')}"
    if sum(blocks) != segments.blocks:
        raise InputError(
            f"{said} cuts {sum(blocks)} blocks into stages, and the program has "
            f"{segments.blocks}; give every stage its blocks, in order."
        )
    parts = {how.virtual for how in space.pipelines(strategy)}
    fits = np.isin(rows[:, STAGE], [len(blocks) / part for part in parts])
    if not fits.any():
        raise InfeasibleError(
            f"{said} is for {len(blocks)} parts of stages, and no mesh has as many: "
            f"stage = {strategy.mesh['stage']}, virtual = {strategy.schedule.virtual}."
        )
    return rows[fits]
