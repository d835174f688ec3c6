"""Pricing many meshes of one sharded program at once.

One `Pricer` holds a program with a layout; `price` evaluates any number of mesh sizes
and microbatch counts as NumPy vectors, so thousands of candidates cost what one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from autoshard.cost.active import Moves, along
from autoshard.cost.collectives import Meshes, Rows, Vector, scattered, taken
from autoshard.cost.compute import Compute
from autoshard.cost.constants import Constants
from autoshard.cost.liveness import Liveness
from autoshard.cost.moves import (
    Step,
    axes_of,
    moves_of_state,
    steps_of,
    unique_moves,
)
from autoshard.cost.offload import Held, Offload, Phases, host_bytes, transfers_s
from autoshard.cost.overlap import exposed_s
from autoshard.cost.pipeline import Pipeline, bubble_share
from autoshard.cost.rates import Rates
from autoshard.cost.segments import BOTH
from autoshard.cost.stages import (
    PLACES,
    STAGE,
    Cut,
    Parts,
    StagedTime,
    Table,
    cut,
    staged,
    waiting,
)
from autoshard.cost.work import Work
from autoshard.ir.build import is_transposed
from autoshard.plan.cluster import Cluster
from autoshard.plan.sharded import OUTPUT, Exchange, ShardedProgram

MEMORY_HEADROOM = 0.94
"""Share of memory that a program may use; the rest is runtime, communication buffers
and fragmentation."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Costs per candidate, each a float64 vector.

    Attributes:
        matmul_s: Seconds in matrix products.
        other_s: Seconds in everything else a chip computes.
        collective_s: Seconds in collectives, as far as computation does not hide them.
        peak_bytes: Bytes per device at the peak.
        hidden_s: Seconds in collectives beside computation.
        host_bytes: Bytes per device in the host's memory, of the stage with most.
        bubble_s: Seconds in which the slowest stage of a pipeline waits for others.
        sent_s: Seconds in transfers between stages, as far as they show.
        cut: How they are cut into stages; None where they are not.
        slowest_share: What the slowest stage has, by place: [place, candidate].
        host_s: Seconds in transfers to and from the host, as far as they show.
        offload: What is in the host's memory.
        wanted: Candidates that were to be priced with it, bool[candidate]; the others
            fit without. All of them where it is None.
    """

    matmul_s: Vector
    other_s: Vector
    collective_s: Vector
    peak_bytes: Vector
    hidden_s: Vector
    host_bytes: Vector
    bubble_s: Vector | float = 0.0
    sent_s: Vector | float = 0.0
    cut: Cut | None = None
    slowest_share: Table | None = None
    host_s: Vector | float = 0.0
    offload: Offload = ()
    wanted: np.ndarray[Any, np.dtype[np.bool_]] | None = None

    @property
    def step_s(self) -> Vector:
        """Seconds per step."""
        work = self.matmul_s + self.other_s + self.collective_s
        return work + self.bubble_s + self.sent_s + self.host_s


@dataclass(frozen=True, slots=True)
class Wish:
    """What candidates are priced for.

    Attributes:
        pipelines: How stages may take turns; without any there is one stage.
        offloads: What may be kept in the host's memory, tried in this order.
        enough_bytes: With anything but the first of these only those are priced whose
            peak is larger than this without: offloading only adds time.
        limit_s: Seconds above which memory is not wanted; it is NaN there.
    """

    pipelines: Sequence[Pipeline] = ()
    offloads: Sequence[Offload] = ((),)
    enough_bytes: float = 0.0
    limit_s: float = float("inf")


def _of_one_stage(parts: Parts) -> Prices:
    shown = parts.shown.sum(axis=0)
    return Prices(
        matmul_s=parts.matmul.sum(axis=0),
        other_s=parts.other.sum(axis=0),
        collective_s=shown,
        peak_bytes=np.full(len(shown), np.nan),
        hidden_s=parts.collective.sum(axis=0) - shown,
        host_s=np.sum(parts.host, axis=0),
        host_bytes=np.full(len(shown), np.nan),
    )


def _of_stages(time: StagedTime) -> Prices:
    return Prices(
        matmul_s=time.matmul,
        other_s=time.other,
        collective_s=time.shown,
        peak_bytes=np.full(len(time.shown), np.nan),
        hidden_s=time.hidden,
        bubble_s=time.bubble,
        sent_s=time.sent,
        slowest_share=time.share,
        host_s=time.host,
        host_bytes=np.full(len(time.shown), np.nan),
    )


def _host_s(
    parts: Parts, held: Mapping[str, Held], meshes: Meshes, cuts: Vector
) -> tuple[Table, Table]:
    """What shows of transfers to and from the host; of that, what is in the update."""
    if not held:
        return np.zeros_like(parts.matmul), np.zeros_like(parts.matmul)
    forward, update = (t.sum(axis=0) for t in (parts.forward, parts.update))
    backward = (parts.matmul + parts.other).sum(axis=0) - forward - update
    phases = Phases(forward, backward, update)
    return transfers_s(held, phases, meshes.cluster, cuts, meshes.product(STAGE))


T = TypeVar("T")


class Pricer:
    """Prices meshes for a program with a layout.

    Args:
        sharded: The program, traced without microbatches.
        work: Its facts, from `analyse`.
        constants: Of the cost model, by default as fitted to published runs.
    """

    def __init__(
        self, sharded: ShardedProgram, work: Work, constants: Constants | None = None
    ) -> None:
        self.sharded = sharded
        self.work = work
        self.program = sharded.traced.program
        self.moves = unique_moves(sharded)
        self.constants = constants or Constants.shipped()
        self._padded = self._find_padded()
        self._of_axes = Moves(sharded, self.moves)
        self._along: dict[frozenset[str], Pricer] = {}
        self._prefetched, self._trailing = moves_of_state(sharded, work, self.moves)
        self.liveness = Liveness(sharded, work, self.moves, self.local_bytes)

    @cached_property
    def compute(self) -> Compute:
        """Its kernels, which take longer to find than all else."""
        return Compute(self.sharded, self.work, self._of_axes, self.local_bytes)

    def price(
        self,
        cluster: Cluster,
        sizes: np.ndarray[Any, np.dtype[np.int64]],
        microbatches: Vector,
        limit_s: float = float("inf"),
        offload: Offload = (),
    ) -> Prices:
        """Prices candidates of one stage.

        Args:
            cluster: Where they run.
            sizes: int64[candidate, axis] in the order of `AXES`.
            microbatches: float64[candidate]; pieces the batch is cut into.
            limit_s: Seconds above which memory is not wanted; it is NaN there.
            offload: What is kept in the host's memory.

        Returns:
            Costs per candidate.

        Raises:
            InputError: The chip has no peak for a dtype the program multiplies in, or
                no figure of its host that offloading needs.
        """
        wish = Wish(offloads=(offload,), limit_s=limit_s)
        return self.price_all(cluster, sizes, microbatches, wish)[0]

    def price_stages(
        self,
        cluster: Cluster,
        sizes: np.ndarray[Any, np.dtype[np.int64]],
        microbatches: Vector,
        pipelines: Sequence[Pipeline],
        limit_s: float = float("inf"),
        offload: Offload = (),
    ) -> list[Prices]:
        """Prices candidates of several stages, once for each pipeline.

        Args:
            cluster: As in `price`.
            sizes: As in `price`.
            microbatches: As in `price`.
            pipelines: How stages take turns.
            limit_s: As in `price`.
            offload: As in `price`.

        Returns:
            Costs per candidate, as in `price`, for each pipeline, with the cut; those
            of a candidate that cannot be cut so mean nothing.
        """
        wish = Wish(pipelines, (offload,), limit_s=limit_s)
        return self.price_all(cluster, sizes, microbatches, wish)

    def price_all(
        self,
        cluster: Cluster,
        sizes: np.ndarray[Any, np.dtype[np.int64]],
        microbatches: Vector,
        wish: Wish,
    ) -> list[Prices]:
        """Prices candidates for each of some pipelines and of what may be offloaded.

        Args:
            cluster: As in `price`.
            sizes: As in `price`.
            microbatches: As in `price`.
            wish: For what.

        Returns:
            Costs per candidate; for each set of what is offloaded, for each pipeline.
        """

        def each(pricer: Pricer, part: Meshes, cuts: Vector) -> list[Prices]:
            return pricer._price(part, cuts, wish)

        return self._apart(Meshes(cluster, sizes), microbatches, each)

    def on(self, active: frozenset[str]) -> Pricer:
        """What prices meshes where only these axes have several devices.

        That is this one, unless the moves that are left there are others.
        """
        active &= self._of_axes.axes
        if active not in self._along:
            same = active == self._of_axes.axes or not self._of_axes.differ(active)
            self._along[active] = (
                self
                if same
                else Pricer(along(self.sharded, active), self.work, self.constants)
            )
        return self._along[active]

    def _apart(
        self,
        meshes: Meshes,
        cuts: Vector,
        price: Callable[[Pricer, Meshes, Vector], T],
    ) -> T:
        """Prices candidates with what prices them, and puts all prices together."""
        by: dict[int, tuple[Pricer, list[Rows]]] = {}
        for active, rows in meshes.by_active:
            pricer = self.on(active)
            by.setdefault(id(pricer), (pricer, []))[1].append(rows)
        if len(by) <= 1:
            (pricer, _), *_ = [*by.values(), (self, [])]
            return price(pricer, meshes, cuts)
        parts = []
        for pricer, of_pricer in by.values():
            rows = np.concatenate(of_pricer)
            parts.append((rows, price(pricer, meshes.take(rows), cuts[rows])))
        return scattered(parts, len(meshes))

    def _price(self, meshes: Meshes, cuts: Vector, wish: Wish) -> list[Prices]:
        parts = self.parts(meshes, cuts)
        hows: list[Cut | None] = [None]
        if wish.pipelines:
            blocks, counts = self.work.segments.blocks, meshes.product(STAGE)
            hows = [cut(p, blocks, parts, counts, cuts) for p in wish.pipelines]
        first, *others = wish.offloads
        found = self._with_offloads(meshes, cuts, parts, hows, [first], wish.limit_s)
        if not others:
            return found
        tight = [
            ~(p.peak_bytes <= wish.enough_bytes) & (p.step_s <= wish.limit_s)
            for p in found
        ]
        rows = np.flatnonzero(np.any(tight, axis=0))
        some = self._with_offloads(
            meshes.take(rows),
            cuts[rows],
            taken(parts, rows),
            taken(hows, rows),
            others,
            wish.limit_s,
        )
        for k, prices in enumerate(some):
            way = k % len(hows)
            whole = scattered([(rows, replace(prices, cut=None))], len(meshes))
            found.append(replace(whole, cut=hows[way], wanted=tight[way]))
        return found

    def _with_offloads(
        self,
        meshes: Meshes,
        cuts: Vector,
        parts: Parts,
        hows: Sequence[Cut | None],
        offloads: Sequence[Offload],
        limit_s: float,
    ) -> list[Prices]:
        """Prices of candidates for each set of what is offloaded, for each cut."""
        kinds = dict.fromkeys(kind for offload in offloads for kind in offload)
        held = {kind: self.liveness.held(kind, meshes, cuts) for kind in kinds}
        some: list[tuple[Table, Table]] = [
            _host_s(parts, {kind: held[kind] for kind in offload}, meshes, cuts)
            for offload in offloads
        ]
        # All sets are priced at once, as if they were so many more candidates.
        rows = np.tile(np.arange(len(meshes)), len(offloads))
        host, host_update = (np.concatenate(t, axis=1) for t in zip(*some, strict=True))
        loaded = replace(taken(parts, rows), host=host, host_update=host_update)
        every, pieces = meshes.take(rows), cuts[rows]
        sent, shared = taken(self._sent_bytes(meshes, cuts), rows)
        by_way = []
        for how in hows:
            prices = _of_one_stage(loaded)
            if how is not None:
                cut_alike = taken(how, rows)
                time = staged(
                    cut_alike, loaded, every, pieces, sent, shared, self.constants
                )
                prices = _of_stages(time)
            by_way.append(prices)
        found = [
            replace(
                taken(prices, slice(k * len(meshes), (k + 1) * len(meshes))),
                cut=how,
                offload=offload,
            )
            for k, offload in enumerate(offloads)
            for how, prices in zip(hows, by_way, strict=True)
        ]
        self._fill_memory(meshes, cuts, found, held, offloads, limit_s)
        return found

    def _sent_bytes(self, meshes: Meshes, cuts: Vector) -> tuple[Vector, Vector]:
        """What goes from block to block, and gradients that both ends have."""
        sent, shared = np.zeros(len(meshes)), np.zeros(len(meshes))
        segments, specs = self.work.segments, self.sharded.specs
        for v in segments.sent:
            sent += self.local_bytes(v, axes_of(specs[v]), meshes, cuts)
        for v in self._gradient_leaves():
            if segments.of_value[v] == BOTH:
                shared += self.local_bytes(v, axes_of(specs[v]), meshes, np.ones(1))
        return sent, shared

    def _fill_memory(
        self,
        meshes: Meshes,
        cuts: Vector,
        found: Sequence[Prices],
        held: Mapping[str, Held],
        offloads: Sequence[Offload],
        limit_s: float,
    ) -> None:
        """Writes the peaks, those of all stages of all cuts found in one go."""
        counts, ways = meshes.product(STAGE), len(found) // len(offloads)
        places: list[tuple[int, np.ndarray]] = []
        shares, later = [], []
        for way in range(ways):
            how = found[way].cut
            fast = [prices.step_s <= limit_s for prices in found[way::ways]]
            wanted = np.any(fast, axis=0)
            if how is None:
                places.append((way, np.flatnonzero(wanted)))
                continue
            for stage in how.stages:
                at = np.flatnonzero(wanted & how.valid & stage.exists)
                places.append((way, at))
                shares.append(stage.share[:, at])
                later.append(waiting(how, stage, counts, cuts)[at])
        rows = np.concatenate([at for _, at in places])
        share = np.concatenate(shares, axis=1) if shares else None
        kept = np.concatenate(later) if later else None
        there = {kind: taken(own, rows) for kind, own in held.items()}
        peaks = self.liveness.peaks(
            meshes.take(rows), cuts[rows], share, kept, there, offloads
        )
        hosts = host_bytes(there, share, kept)
        for k, offload in enumerate(offloads):
            on_host = sum((hosts[kind] for kind in offload), np.zeros(len(rows)))
            begin = 0
            for way, at in places:
                own, prices = slice(begin, begin + len(at)), found[k * ways + way]
                for whole, part in (
                    (prices.peak_bytes, peaks[k][own]),
                    (prices.host_bytes, on_host[own]),
                ):
                    whole[at] = np.fmax(whole[at], part)
                begin += len(at)

    def parts(self, meshes: Meshes, microbatches: Vector) -> Parts:
        """Seconds of a step by what belongs together, all blocks on every chip."""
        cluster = meshes.cluster
        rates = Rates.of(cluster, self.constants)
        matmul, other, forward, update = self._compute_parts(
            meshes, microbatches, rates
        )
        ahead, after, between = (np.zeros((PLACES, len(meshes))) for _ in range(3))
        of_op, of_value = self.work.segments.of_op, self.work.segments.of_value
        for index, move in enumerate(self.moves):
            where = (
                ahead
                if index in self._prefetched
                else after
                if index in self._trailing
                else between
            )
            place = of_value[move.value] if move.op == OUTPUT else of_op[move.op]
            for _, time, _, _ in self.collective(index, meshes, microbatches):
                where[place] += time
        for exchange in self.sharded.exchanges:
            seconds = self.exchange(exchange, meshes, microbatches)[0]
            between[of_op[exchange.op]] += seconds
        collective = ahead + after + between
        work = (matmul + other).sum(axis=0)
        sums = (kind.sum(axis=0) for kind in (ahead, after, between))
        exposed = exposed_s(cluster.kind, self.constants, work, *sums)
        whole = np.maximum(collective.sum(axis=0), np.finfo(float).tiny)
        shown = collective / whole * exposed
        return Parts(matmul, other, forward, update, collective, shown)

    def floor_s(
        self,
        cluster: Cluster,
        sizes: np.ndarray[Any, np.dtype[np.int64]],
        microbatches: Vector,
        pipelines: Sequence[Pipeline] = (),
    ) -> Vector:
        """Seconds that a step takes at least, however state is stored.

        The kernels of the forward and backward passes and the collectives on
        activations depend on rules and remat alone: no storage of parameters, gradients
        and optimizer state makes a candidate with the same rules faster. Of several
        stages the slowest takes no less than the average one, and waits for the others
        as the best of the schedules lets it.

        Args:
            cluster: As in `price`.
            sizes: As in `price`.
            microbatches: As in `price`.
            pipelines: How stages may take turns, where there are several.
        """

        def floor(pricer: Pricer, part: Meshes, cuts: Vector) -> Vector:
            return pricer._floor_s(part, cuts, pipelines)

        return self._apart(Meshes(cluster, sizes), microbatches, floor)

    def _floor_s(
        self, meshes: Meshes, microbatches: Vector, pipelines: Sequence[Pipeline]
    ) -> Vector:
        cluster = meshes.cluster
        rates = Rates.of(cluster, self.constants)
        found, between = np.zeros(len(meshes)), np.zeros(len(meshes))
        for time in self.compute.times(meshes, microbatches, rates, update=False):
            found += time.total_s
        for index, move in enumerate(self.moves):
            # Of state are also what the update moves and where its results go.
            of_state = index in self._prefetched or index in self._trailing
            of_state |= move.op == OUTPUT or self.work.update[move.op]
            if not of_state and move.value not in self.work.gradients:
                for _, time, _, _ in self.collective(index, meshes, microbatches):
                    between += time
        none = np.zeros(len(meshes))
        whole = found + exposed_s(
            cluster.kind, self.constants, none, none, none, between
        )
        if not pipelines:
            return whole
        stages = meshes.product(STAGE)
        zero_bubble = self.constants["pipeline.zero_bubble"]
        waits = [
            bubble_share(how.schedule, stages, microbatches, zero_bubble) / how.virtual
            for how in pipelines
        ]
        least = np.minimum.reduce(waits)
        return whole / stages * (1 + least * (stages - 1) / microbatches)

    def local_bytes(
        self, value: int, axes: frozenset[str], meshes: Meshes, cuts: Vector
    ) -> Vector:
        """Bytes of a value on one device, in one microbatch, padding included."""
        whole = self.program.values[value].bytes_ / meshes.product(axes)
        for size, dim in self._padded.get(value, ()):
            rest = frozenset(dim) - axes
            if len(rest) < len(dim):
                ways = meshes.product(frozenset(dim))
                larger = np.ceil(size / ways) * ways / size
                # Of the whole dim, but for axes of one device.
                whole = whole * np.where(meshes.product(rest) > 1, 1.0, larger)
        return whole / cuts if self.work.batched[value] else whole

    def _find_padded(self) -> dict[int, list[tuple[int, tuple[str, ...]]]]:
        """Dims per value that some mesh does not divide: those of no power of two."""
        loose = {(n, axes) for n, axes in self.sharded.padded if n & (n - 1)}
        found: dict[int, list[tuple[int, tuple[str, ...]]]] = {}
        if not loose:
            return found
        for value, spec in zip(self.program.values, self.sharded.specs, strict=True):
            pads = [p for p in zip(value.shape, spec, strict=True) if p in loose]
            if pads:
                found[value.index] = pads
        return found

    # -- time --------------------------------------------------------------------

    def compute_s(
        self, meshes: Meshes, cuts: Vector, rates: Rates
    ) -> tuple[Vector, Vector]:
        """Seconds in products, and in all else that a chip computes, at some rates."""
        matmul, other, _, _ = self._compute_parts(meshes, cuts, rates)
        return matmul.sum(axis=0), other.sum(axis=0)

    def _compute_parts(
        self, meshes: Meshes, cuts: Vector, rates: Rates
    ) -> tuple[Table, Table, Table, Table]:
        """The same by what belongs together; of both, forward pass and update."""
        matmul, other, forward, update = np.zeros((4, PLACES, len(meshes)))
        places = self.work.segments
        for time in self.compute.times(meshes, cuts, rates):
            place = places.of_op[time.kernel.op]
            of_kind = matmul if time.kernel.kind == "product" else other
            of_kind[place] += time.total_s
            if self.work.update[time.kernel.op]:
                update[place] += time.total_s
            elif not is_transposed(self.program.ops[time.kernel.op]):
                forward[place] += time.total_s
        # Microbatches: read the sum, read the new gradient, write the sum.
        for value in self._gradient_leaves():
            size = self.local_bytes(
                value, axes_of(self.sharded.specs[value]), meshes, np.ones(1)
            )
            moved = 3 * size / rates.hbm_bytes_per_s
            moved = moved * self.work.alike[value]
            place = places.of_value[value]
            other[place] += np.where(cuts > 1, cuts * moved, 0.0)
        return matmul, other, forward, update

    def _gradient_leaves(self) -> list[int]:
        return [
            op.outputs[0]
            for op in self.program.ops
            if op.primitive == "autoshard_annotate" and op.params["role"] == "gradient"
        ]

    def collective(
        self, index: int, meshes: Meshes, cuts: Vector
    ) -> list[tuple[Step, Vector, Vector, Vector]]:
        """`(step, seconds per step of training, bytes of one run, runs)` of a move."""
        reshard = self.moves[index]
        runs = np.ones(len(meshes))
        if reshard.op == OUTPUT:
            runs = runs * self.work.alike[reshard.value]
        else:
            op = self.program.ops[reshard.op]
            runs = runs * self.work.runs[op.index]
            if not self.work.update[op.index]:
                runs = runs * cuts
        found = []
        steps = [(step, runs) for step in steps_of(reshard)]
        rest = frozenset(reshard.unreduced) - axes_of(reshard.target)
        if reshard.at_once and rest:  # and there are several devices to sum over
            summed = runs * (meshes.product(rest) > 1)
            apart = steps_of(replace(reshard, at_once=False))
            steps = [(step, summed) for step, _ in steps]
            steps += [(step, runs - summed) for step in apart]
        for step, runs in steps:
            size = self.local_bytes(reshard.value, step.large, meshes, cuts)
            axes = frozenset(step.axes)
            time = runs * meshes.time_s(step.kind, axes, size)
            found.append((step, time, size, runs))
        return found

    def exchange(
        self, exchange: Exchange, meshes: Meshes, cuts: Vector
    ) -> tuple[Vector, Vector, Vector]:
        """`(seconds per step of training, bytes of one run, runs)` of an exchange."""
        op = self.program.ops[exchange.op]
        runs = np.ones(len(meshes)) * self.work.runs[op.index]
        if not self.work.update[op.index]:
            runs = runs * cuts
        size = self.local_bytes(exchange.value, exchange.held, meshes, cuts)
        axes = frozenset(exchange.axes)
        if exchange.rows:
            local_rows = np.ceil(exchange.dim_size / meshes.product(axes))
            size = size * exchange.rows / local_rows
        return runs * meshes.time_s(exchange.kind, axes, size), size, runs
