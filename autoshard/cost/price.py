"""Pricing many meshes of one sharded program at once.

One `Pricer` holds a program with a layout; `price` evaluates any number of mesh sizes
and microbatch counts as NumPy vectors, so thousands of candidates cost what one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from autoshard.cost.active import Moves, along
from autoshard.cost.attention import in_parts, passes_of
from autoshard.cost.collectives import Meshes, Rows, Vector, scattered, taken
from autoshard.cost.compute import Compute
from autoshard.cost.constants import Constants
from autoshard.cost.context import ALL_GATHER, FREE, Context
from autoshard.cost.liveness import Liveness
from autoshard.cost.local import LocalBytes
from autoshard.cost.moved import Moved
from autoshard.cost.offload import Held, Offload, Phases, host_bytes, transfers_s
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.placement import Placements
from autoshard.cost.prices import Alike, Prices, Wish, of_one_stage, of_stages
from autoshard.cost.stages import (
    STAGE,
    Cut,
    Kernels,
    Parts,
    Table,
    cut,
    least_s,
    sent_s,
    staged,
    waiting,
)
from autoshard.cost.timing import Timing
from autoshard.cost.work import Work
from autoshard.plan.cluster import Cluster
from autoshard.plan.sharded import ShardedProgram

MEMORY_HEADROOM = 0.94
"""Share of memory that a program may use; the rest is runtime, communication buffers
and fragmentation."""


T = TypeVar("T")


def _host_s(
    kernels: Kernels,
    held: Mapping[str, Held],
    offload: Offload,
    meshes: Meshes,
    cuts: Vector,
) -> tuple[Table, Table]:
    """What shows of transfers to and from the host; of that, what is in the update."""
    if not offload:
        return np.zeros_like(kernels.matmul), np.zeros_like(kernels.matmul)
    forward, update = (t.sum(axis=0) for t in (kernels.forward, kernels.update))
    backward = (kernels.matmul + kernels.other).sum(axis=0) - forward - update
    phases = Phases(forward, backward, update)
    own = {kind: held[kind] for kind in offload}
    return transfers_s(own, phases, meshes.cluster, cuts, meshes.product(STAGE))


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
        self.local_bytes = LocalBytes(sharded, work)
        self.moved = Moved(sharded, work, self.local_bytes)
        self.context = context or Context(ALL_GATHER, 0, (), work, self.local_bytes)
        self.constants = constants or Constants.shipped()
        self._of_axes = Moves(sharded, self.moved.moves)
        self._along: dict[frozenset[str], Pricer] = {}
        self._gathering: Pricer | None = None
        self.liveness, self.timing = self._find_liveness(), self._find_timing()

    def with_context(self, kind: str, heads: int = 0) -> Pricer:
        """What prices the same program with another kind of attention.

        Args:
            kind: See `autoshard.cost.context`.
            heads: Devices that share heads under `usp`, 0 for the fastest number.
        """
        gathering = self._gathering or self
        if kind == ALL_GATHER:
            return gathering
        free = gathering._free
        if kind == FREE:
            return free
        # All but what attention sends, and holds for it, is the same for all kinds.
        found = copy(free)
        found._along = {}
        passes = free.context.passes
        found.context = Context(kind, heads, passes, self.work, self.local_bytes)
        found.liveness, found.timing = found._find_liveness(), found._find_timing()
        return found

    @cached_property
    def _free(self) -> Pricer:
        passes = passes_of(self.sharded)
        context = Context(FREE, 0, passes, self.work, self.local_bytes)
        parted = in_parts(self.sharded, passes)
        found = Pricer(parted, self.work, self.constants, context)
        found._gathering = self
        return found

    @cached_property
    def lacks_moves_of_state(self) -> bool:
        """Whether what attention sends in another way is of parameters or gradients."""
        if self._gathering is None:
            return False
        pairs = (self.moved, self._gathering.moved)
        own, whole = (len(m.prefetched) + len(m.trailing) for m in pairs)
        return own < whole

    def _find_liveness(self) -> Liveness:
        own = self.sharded, self.work, self.moved.moves, self.local_bytes
        return Liveness(*own, self.context.buffers())

    def _find_timing(self) -> Timing:
        own = self.sharded, self.work, self.moved, self.context
        return Timing(*own, lambda: self.compute, self.constants)

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
        orders: Rows | None = None,
        anywhere: Placements | None = None,
        offload: Offload = (),
    ) -> Prices:
        """Prices candidates of one stage.

        Args:
            cluster: Where they run.
            sizes: int64[candidate, axis] in the order of `AXES`.
            microbatches: float64[candidate]; pieces the batch is cut into.
            limit_s: As in `Wish`.
            orders: int64[candidate, place], see `Meshes`.
            anywhere: As in `Wish`.
            offload: What is kept in the host's memory.

        Returns:
            Costs per candidate.

        Raises:
            InputError: The chip has no peak for a dtype the program multiplies in, or
                no figure of its host that offloading needs.
        """
        wish = Wish((), (offload,), limit_s, anywhere)
        return self.price_all(cluster, sizes, microbatches, wish, orders)[0]

    def price_stages(
        self,
        cluster: Cluster,
        sizes: np.ndarray[Any, np.dtype[np.int64]],
        microbatches: Vector,
        pipelines: Sequence[Pipeline],
        limit_s: float = float("inf"),
        orders: Rows | None = None,
        anywhere: Placements | None = None,
        offload: Offload = (),
    ) -> list[Prices]:
        """Prices candidates of several stages, once for each pipeline.

        Args:
            cluster: As in `price`.
            sizes: As in `price`.
            microbatches: As in `price`.
            pipelines: How stages take turns.
            limit_s: As in `Wish`.
            orders: As in `price`.
            anywhere: As in `Wish`.
            offload: As in `price`.

        Returns:
            Costs per candidate, as in `price`, for each pipeline, with the cut; those
            of a candidate that cannot be cut so mean nothing. In all orders, and
            whatever is offloaded, it is cut as is balanced in the order of `AXES` with
            all on the chip.
        """
        wish = Wish(pipelines, (offload,), limit_s, anywhere)
        return self.price_all(cluster, sizes, microbatches, wish, orders)

    def price_all(
        self,
        cluster: Cluster,
        sizes: np.ndarray[Any, np.dtype[np.int64]],
        microbatches: Vector,
        wish: Wish,
        orders: Rows | None = None,
        known: Sequence[Prices] = (),
        same: Rows | None = None,
    ) -> list[Prices]:
        """Prices candidates for each set of what may be offloaded and each pipeline.

        Args:
            cluster: As in `price`.
            sizes: As in `price`.
            microbatches: As in `price`.
            wish: For what.
            orders: As in `price`.
            known: Of the same candidates, for each pipeline, in another order or with
                something else offloaded. Their kernels and their cut are the same, and
                not found again.
            same: int64[candidate]; those with the same number differ by their order
                alone. What these have in common is found once.

        Returns:
            Costs per candidate; for each set of what is offloaded, for each pipeline.
        """
        meshes = Meshes(cluster, sizes, orders)

        def each(
            pricer: Pricer, part: Meshes, cuts: Vector, rows: Rows
        ) -> list[Prices]:
            alike = Alike.none(len(rows)) if same is None else Alike.of_same(same[rows])
            return pricer._price(part, cuts, wish, taken(known, rows), alike)

        return self.apart(meshes, microbatches, each)

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

    def apart(
        self,
        meshes: Meshes,
        cuts: Vector,
        price: Callable[[Pricer, Meshes, Vector, Rows], T],
    ) -> T:
        """Prices candidates with what prices them, and puts all prices together."""
        by: dict[int, tuple[Pricer, list[Rows]]] = {}
        for active, rows in meshes.by_active:
            pricer = self.on(active)
            by.setdefault(id(pricer), (pricer, []))[1].append(rows)
        if len(by) <= 1:
            (pricer, _), *_ = [*by.values(), (self, [])]
            return price(pricer, meshes, cuts, np.arange(len(meshes)))
        parts = []
        for pricer, of_pricer in by.values():
            rows = np.concatenate(of_pricer)
            parts.append((rows, price(pricer, meshes.take(rows), cuts[rows], rows)))
        return scattered(parts, len(meshes))

    def _price(
        self,
        meshes: Meshes,
        cuts: Vector,
        wish: Wish,
        known: Sequence[Prices],
        same: Alike,
    ) -> list[Prices]:
        base, own = meshes.take(same.first), cuts[same.first]
        kernels = known[0].kernels if known else None
        kernels = kernels or taken(self.timing.kernels(base, own), same.of)
        free = meshes.free(wish.anywhere) if wish.anywhere else None
        parts, least = self.timing.placed(kernels, meshes, cuts, free)
        if known:
            hows = [prices.cut for prices in known]
        else:
            even = taken(parts, same.first)
            hows = taken(self._cuts(base, own, even, wish.pipelines), same.of)
        held = self._held(base, own, wish.offloads)
        alone = taken(kernels, same.first)
        hosts = [
            taken(_host_s(alone, held, offload, base, own), same.of)
            for offload in wish.offloads
        ]
        # All sets are priced at once, as if they were so many more candidates.
        count, ways = len(meshes), len(hows)
        host, update = (np.concatenate(t, axis=1) for t in zip(*hosts, strict=True))
        timed = self._timed(parts, kernels, least, host, update, meshes, free, cuts)
        every = [timed(how) for how in hows]
        found = [
            replace(
                taken(prices, slice(k * count, (k + 1) * count)),
                cut=how,
                offload=offload,
            )
            for k, offload in enumerate(wish.offloads)
            for how, prices in zip(hows, every, strict=True)
        ]
        fast = [same.any(prices.step_s <= wish.limit_s) for prices in found]
        wanted = [np.any(fast[way::ways], axis=0) for way in range(ways)]
        of_base = taken(hows, same.first)
        memory = self._memory(base, own, of_base, wanted, held, wish.offloads)
        found = [
            replace(prices, peak_bytes=peaks[same.of], host_bytes=on_host[same.of])
            for prices, (peaks, on_host) in zip(found, memory, strict=True)
        ]
        found[0] = replace(found[0], kernels=kernels)
        return found

    def _cuts(
        self, base: Meshes, cuts: Vector, parts: Parts, pipelines: Sequence[Pipeline]
    ) -> list[Cut | None]:
        """How each pipeline is cut, in whatever order the parts are; None without."""
        if not pipelines:
            return [None]
        if not base.canonical:
            parts = self.timing.parts(Meshes(base.cluster, base.sizes), cuts)
        blocks, counts = self.work.segments.blocks, base.product(STAGE)
        return [cut(how, blocks, parts, counts, cuts) for how in pipelines]

    def _held(
        self, meshes: Meshes, cuts: Vector, offloads: Sequence[Offload]
    ) -> dict[str, Held]:
        kinds = dict.fromkeys(kind for offload in offloads for kind in offload)
        return {kind: self.liveness.held(kind, meshes, cuts) for kind in kinds}

    def _timed(
        self,
        parts: Parts,
        kernels: Kernels,
        least: Vector | None,
        host: Table,
        host_update: Table,
        meshes: Meshes,
        free: Meshes | None,
        cuts: Vector,
    ) -> Callable[[Cut | None], Prices]:
        """What prices a cut of the candidates, once for each time the host takes."""
        rows = np.tile(np.arange(len(meshes)), host.shape[1] // len(meshes))
        loaded = replace(taken(parts, rows), host=host, host_update=host_update)
        every, pieces = meshes.take(rows), cuts[rows]
        # What the host takes is beside no collective: a stage has it as its kernels.
        busy = taken(kernels, rows)
        other, update = busy.other + host, busy.update + host_update
        busy = replace(busy, other=other, update=update)
        sent, shared = (
            self.timing.sent_bytes(meshes, cuts),
            self.timing.shared_bytes(meshes),
        )
        hops = (cuts, sent, shared, self.constants)

        def one(how: Cut | None) -> Prices:
            if how is None:
                prices = of_one_stage(loaded)
                if least is None:
                    return prices
                return replace(
                    prices, least_s=(busy.matmul + busy.other).sum(axis=0) + least[rows]
                )
            passed = sent_s(how.pipeline, meshes, *hops)[rows]
            each = taken(how, rows)
            time = staged(each, loaded, every, pieces, passed, self.constants)
            if free is None or least is None:
                return of_stages(time, loaded)
            bound = sent_s(how.pipeline, free, *hops)[rows]
            counts = every.product(STAGE)
            bound += least_s(each, busy, least[rows], counts, pieces, self.constants)
            return replace(of_stages(time, loaded), least_s=bound)

        return one

    def memory_bytes(
        self,
        cluster: Cluster,
        sizes: np.ndarray[Any, np.dtype[np.int64]],
        microbatches: Vector,
        how: Cut | None,
        offload: Offload,
    ) -> tuple[Vector, Vector]:
        """Peak bytes per chip of candidates, and bytes in the host's memory.

        Args:
            cluster: As in `price`.
            sizes: As in `price`.
            microbatches: As in `price`.
            how: How they are cut, where they have several stages.
            offload: As in `price`.
        """

        def memory(
            pricer: Pricer, part: Meshes, cuts: Vector, rows: Rows
        ) -> tuple[Vector, Vector]:
            every, held = np.ones(len(rows), bool), pricer._held(part, cuts, [offload])
            cut = taken(how, rows)
            return pricer._memory(part, cuts, [cut], [every], held, [offload])[0]

        return self.apart(Meshes(cluster, sizes), microbatches, memory)

    def _memory(
        self,
        meshes: Meshes,
        cuts: Vector,
        hows: Sequence[Cut | None],
        wanted: Sequence[np.ndarray],
        held: Mapping[str, Held],
        offloads: Sequence[Offload],
    ) -> list[tuple[Vector, Vector]]:
        """Peaks, and bytes on the host, for each set of what is offloaded, each cut.

        Those of all stages of all cuts are found in one go; NaN if not wanted.
        """
        counts = meshes.product(STAGE)
        places: list[tuple[int, np.ndarray]] = []
        shares, later = [], []
        for way, (how, here) in enumerate(zip(hows, wanted, strict=True)):
            if how is None:
                places.append((way, np.flatnonzero(here)))
                continue
            for stage in how.stages:
                at = np.flatnonzero(here & how.valid & stage.exists)
                places.append((way, at))
                shares.append(stage.share[:, at])
                later.append(waiting(how.pipeline, stage.at, counts, cuts)[at])
        rows = np.concatenate([at for _, at in places])
        share = np.concatenate(shares, axis=1) if shares else None
        kept = np.concatenate(later) if later else None
        there = {kind: taken(own, rows) for kind, own in held.items()}
        every = self.liveness.peaks(
            meshes.take(rows), cuts[rows], share, kept, there, offloads
        )
        hosts = host_bytes(there, share, kept)
        found = []
        for offload, peaks in zip(offloads, every, strict=True):
            on_host = sum((hosts[kind] for kind in offload), np.zeros(len(rows)))
            own = [np.full((2, len(meshes)), np.nan) for _ in hows]
            begin = 0
            for way, at in places:
                here = slice(begin, begin + len(at))
                both = np.stack([peaks[here], on_host[here]])
                own[way][:, at] = np.fmax(own[way][:, at], both)
                begin += len(at)
            found += [(peak, host) for peak, host in own]
        return found
