"""Pricing many meshes of one sharded program at once.

One `Pricer` holds a program with a layout; `price` evaluates any number of mesh sizes
and microbatch counts as NumPy vectors, so thousands of candidates cost what one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from autoshard.cost.active import Moves, along
from autoshard.cost.attention import in_parts, passes_of
from autoshard.cost.collectives import Meshes, Rows, Vector, scattered
from autoshard.cost.compute import Compute
from autoshard.cost.constants import Constants
from autoshard.cost.context import ALL_GATHER, Context, Transfer
from autoshard.cost.liveness import Liveness
from autoshard.cost.moves import (
    Step,
    axes_of,
    moves_of_state,
    steps_of,
    unique_moves,
)
from autoshard.cost.overlap import exposed_s
from autoshard.cost.pipeline import Pipeline, bubble_share
from autoshard.cost.rates import Rates
from autoshard.cost.segments import BOTH
from autoshard.cost.stages import PLACES, STAGE, Cut, Parts, Table, cut, staged, waiting
from autoshard.cost.work import Work
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
        bubble_s: Seconds in which the slowest stage of a pipeline waits for others.
        sent_s: Seconds in transfers between stages, as far as they show.
        cut: How they are cut into stages; None where they are not.
        slowest_share: What the slowest stage has, by place: [place, candidate].
        context_heads: Devices of `context` that share the heads of attention,
            int64[candidate].
    """

    matmul_s: Vector
    other_s: Vector
    collective_s: Vector
    peak_bytes: Vector
    hidden_s: Vector
    context_heads: np.ndarray[Any, np.dtype[np.int64]]
    bubble_s: Vector | float = 0.0
    sent_s: Vector | float = 0.0
    cut: Cut | None = None
    slowest_share: Table | None = None

    @property
    def step_s(self) -> Vector:
        """Seconds per step."""
        work = self.matmul_s + self.other_s + self.collective_s
        return work + self.bubble_s + self.sent_s


T = TypeVar("T")


class Pricer:
    """Prices meshes for a program with a layout.

    Args:
        sharded: The program, traced without microbatches.
        work: Its facts, from `analyse`.
        constants: Of the cost model, by default as fitted to published runs.
        context: How attention over a sequence in parts is done; by moves if it is not
            given.
    """

    def __init__(
        self,
        sharded: ShardedProgram,
        work: Work,
        constants: Constants | None = None,
        context: Context | None = None,
    ) -> None:
        self.sharded = sharded
        self.work = work
        self.program = sharded.traced.program
        self.context = context or Context(ALL_GATHER, 0, (), work, self.local_bytes)
        self.moves = unique_moves(sharded)
        self.constants = constants or Constants.shipped()
        self._padded = self._find_padded()
        self._of_axes = Moves(sharded, self.moves)
        self._along: dict[frozenset[str], Pricer] = {}
        self._gathering: Pricer | None = None
        self._prefetched, self._trailing = moves_of_state(sharded, work, self.moves)
        self.liveness = Liveness(
            sharded, work, self.moves, self.local_bytes, self.context.buffers()
        )

    def with_context(self, kind: str, heads: int = 0) -> Pricer:
        """What prices the same program with another kind of attention.

        Args:
            kind: See `autoshard.cost.context`.
            heads: Devices that share heads under `usp`, 0 for the fastest number.
        """
        if kind == ALL_GATHER:
            return self
        passes = passes_of(self.sharded)
        context = Context(kind, heads, passes, self.work, self.local_bytes)
        parted = in_parts(self.sharded, passes)
        found = Pricer(parted, self.work, self.constants, context)
        found._gathering = self
        return found

    @cached_property
    def compute(self) -> Compute:
        """Its kernels, which take longer to find than all else.

        What attention sends in another way is written like what it gathers.
        """
        if self._gathering:
            return self._gathering.compute
        return Compute(self.sharded, self.work, self._of_axes, self.local_bytes)

    def price(
        self,
        cluster: Cluster,
        sizes: np.ndarray[Any, np.dtype[np.int64]],
        microbatches: Vector,
        limit_s: float = float("inf"),
    ) -> Prices:
        """Prices candidates of one stage.

        Args:
            cluster: Where they run.
            sizes: int64[candidate, axis] in the order of `AXES`.
            microbatches: float64[candidate]; pieces the batch is cut into.
            limit_s: Seconds above which memory is not wanted; it is NaN there.

        Returns:
            Costs per candidate.

        Raises:
            InputError: The chip has no peak for a dtype the program multiplies in.
        """
        meshes = Meshes(cluster, sizes)

        def one(pricer: Pricer, part: Meshes, cuts: Vector) -> Prices:
            return pricer._price(part, cuts, limit_s)

        return self._apart(meshes, microbatches, one)

    def price_stages(
        self,
        cluster: Cluster,
        sizes: np.ndarray[Any, np.dtype[np.int64]],
        microbatches: Vector,
        pipelines: Sequence[Pipeline],
        limit_s: float = float("inf"),
    ) -> list[Prices]:
        """Prices candidates of several stages, once for each pipeline.

        Args:
            cluster: As in `price`.
            sizes: As in `price`.
            microbatches: As in `price`.
            pipelines: How stages take turns.
            limit_s: As in `price`.

        Returns:
            Costs per candidate, as in `price`, for each pipeline, with the cut; those
            of a candidate that cannot be cut so mean nothing.
        """
        meshes = Meshes(cluster, sizes)

        def each(pricer: Pricer, part: Meshes, cuts: Vector) -> list[Prices]:
            return pricer._price_stages(part, cuts, pipelines, limit_s)

        return self._apart(meshes, microbatches, each)

    def on(self, active: frozenset[str]) -> Pricer:
        """What prices meshes where only these axes have several devices.

        That is this one, unless the moves that are left there are others.
        """
        if self._gathering:
            left = self._gathering.on(active)
            key = active & self._gathering._of_axes.axes
            if key not in self._along:
                how = self.context.kind, self.context.heads
                same = left is self._gathering
                self._along[key] = self if same else left.with_context(*how)
            return self._along[key]
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

    def _price(self, meshes: Meshes, microbatches: Vector, limit_s: float) -> Prices:
        parts = self.parts(meshes, microbatches)
        matmul, other = parts.matmul.sum(axis=0), parts.other.sum(axis=0)
        shown = parts.shown.sum(axis=0)
        hidden = parts.collective.sum(axis=0) - shown
        peak = np.full(len(meshes), np.nan)
        at = np.flatnonzero(matmul + other + shown <= limit_s)
        peak[at], _ = self.liveness.memory(meshes.take(at), microbatches[at])
        return Prices(matmul, other, shown, peak, hidden, parts.context_heads)

    def _price_stages(
        self,
        meshes: Meshes,
        microbatches: Vector,
        pipelines: Sequence[Pipeline],
        limit_s: float,
    ) -> list[Prices]:
        parts = self.parts(meshes, microbatches)
        segments, counts = self.work.segments, meshes.product(STAGE)
        blocks = segments.blocks
        sent = np.zeros(len(meshes))
        for v in segments.sent:
            axes = axes_of(self.sharded.specs[v])
            sent += self.local_bytes(v, axes, meshes, microbatches)
        shared = np.zeros(len(meshes))
        for v in self._gradient_leaves():
            if segments.of_value[v] == BOTH:
                axes = axes_of(self.sharded.specs[v])
                shared += self.local_bytes(v, axes, meshes, np.ones(1))
        found = []
        for pipeline in pipelines:
            how = cut(pipeline, blocks, parts, counts, microbatches)
            time = staged(
                how, parts, meshes, microbatches, sent, shared, self.constants
            )
            found.append(
                Prices(
                    matmul_s=time.matmul,
                    other_s=time.other,
                    collective_s=time.shown,
                    peak_bytes=np.full(len(meshes), np.nan),
                    hidden_s=time.hidden,
                    context_heads=parts.context_heads,
                    bubble_s=time.bubble,
                    sent_s=time.sent,
                    cut=how,
                    slowest_share=time.share,
                )
            )
        self._fill_peaks(meshes, microbatches, found, limit_s)
        return found

    def _fill_peaks(
        self, meshes: Meshes, cuts: Vector, found: Sequence[Prices], limit_s: float
    ) -> None:
        """Writes the peaks of all stages of all pipelines, found in one go."""
        counts = meshes.product(STAGE)
        places: list[tuple[Prices, np.ndarray]] = []
        shares, later = [], []
        for prices in found:
            how = prices.cut
            assert how is not None
            wanted = how.valid & (prices.step_s <= limit_s)
            prices.peak_bytes[wanted] = 0.0
            for stage in how.stages:
                at = np.flatnonzero(wanted & stage.exists)
                places.append((prices, at))
                shares.append(stage.share[:, at])
                later.append(waiting(how, stage, counts, cuts)[at])
        rows = np.concatenate([at for _, at in places])
        stages = meshes.take(rows)
        peaks, _ = self.liveness.memory(
            stages, cuts[rows], np.concatenate(shares, axis=1), np.concatenate(later)
        )
        begin = 0
        for prices, at in places:
            own = peaks[begin : begin + len(at)]
            prices.peak_bytes[at] = np.maximum(prices.peak_bytes[at], own)
            begin += len(at)

    def parts(self, meshes: Meshes, microbatches: Vector) -> Parts:
        """Seconds of a step by what belongs together, all blocks on every chip."""
        cluster = meshes.cluster
        rates = Rates.of(cluster, self.constants)
        matmul, other, update, attention = self._compute_parts(
            meshes, microbatches, rates
        )
        sent, heads = self.context.transfers(meshes, microbatches, attention)
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
        beside, late = (np.zeros((PLACES, len(meshes))) for _ in range(2))
        for each in sent:
            beside[of_op[each.op]] += each.time_s
            late[of_op[each.op]] += each.shown_s
        collective = ahead + after + between
        work = (matmul + other).sum(axis=0)
        sums = (kind.sum(axis=0) for kind in (ahead, after, between))
        exposed = exposed_s(cluster.kind, self.constants, work, *sums)
        whole = np.maximum(collective.sum(axis=0), np.finfo(float).tiny)
        shown = collective / whole * exposed + late
        return Parts(matmul, other, update, collective + beside, shown, heads)

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
        attention = [np.zeros(len(meshes)) for _ in self.context.passes]
        for time in self.compute.times(meshes, microbatches, rates, update=False):
            found += time.total_s
            if time.kernel.op in self.context.of_op:
                attention[self.context.of_op[time.kernel.op]] += time.total_s
        for each in self.context.transfers(meshes, microbatches, attention)[0]:
            found += each.shown_s
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

    def sent(self, meshes: Meshes, microbatches: Vector) -> list[Transfer]:
        """What attention sends where its keys and values stay in parts."""
        rates = Rates.of(meshes.cluster, self.constants)
        attention = self._compute_parts(meshes, microbatches, rates)[3]
        return self.context.transfers(meshes, microbatches, attention)[0]

    # -- time --------------------------------------------------------------------

    def compute_s(
        self, meshes: Meshes, cuts: Vector, rates: Rates
    ) -> tuple[Vector, Vector]:
        """Seconds in products, and in all else that a chip computes, at some rates."""
        matmul, other, *_ = self._compute_parts(meshes, cuts, rates)
        return matmul.sum(axis=0), other.sum(axis=0)

    def _compute_parts(
        self, meshes: Meshes, cuts: Vector, rates: Rates
    ) -> tuple[Table, Table, Table, list[Vector]]:
        """The same by what belongs together, the update's part, and attention's."""
        matmul, other, update = (np.zeros((PLACES, len(meshes))) for _ in range(3))
        places, of_op = self.work.segments, self.context.of_op
        attention = [np.zeros(len(meshes)) for _ in self.context.passes]
        for time in self.compute.times(meshes, cuts, rates):
            place = places.of_op[time.kernel.op]
            of_kind = matmul if time.kernel.kind == "product" else other
            of_kind[place] += time.total_s
            if self.work.update[time.kernel.op]:
                update[place] += time.total_s
            if time.kernel.op in of_op:
                attention[of_op[time.kernel.op]] += time.total_s
        # Microbatches: read the sum, read the new gradient, write the sum.
        for value in self._gradient_leaves():
            size = self.local_bytes(
                value, axes_of(self.sharded.specs[value]), meshes, np.ones(1)
            )
            moved = 3 * size / rates.hbm_bytes_per_s
            moved = moved * self.work.alike[value]
            place = places.of_value[value]
            other[place] += np.where(cuts > 1, cuts * moved, 0.0)
        return matmul, other, update, attention

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
