"""Seconds of a step by what belongs together, all blocks on every chip.

What a stage of a pipeline takes is a part of these, see `autoshard.cost.stages`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from autoshard.cost.collectives import Meshes, Vector
from autoshard.cost.compute import Compute
from autoshard.cost.constants import Constants
from autoshard.cost.context import Context, Transfer
from autoshard.cost.local import LocalBytes
from autoshard.cost.moved import Moved
from autoshard.cost.moves import axes_of
from autoshard.cost.overlap import exposed_s, least_exposed_s
from autoshard.cost.rates import Rates
from autoshard.cost.segments import BOTH
from autoshard.cost.stages import PLACES, Kernels, Parts, Table
from autoshard.cost.work import Work
from autoshard.ir.build import is_transposed
from autoshard.plan.sharded import ShardedProgram


class Timing:
    """Prices the kernels and the transfers of a program with a layout.

    Args:
        sharded: The program.
        work: Its facts, from `analyse`.
        moved: What is sent.
        context: How attention over a sequence in parts is done.
        compute: Gives its kernels, which take long to find.
        constants: Of the cost model.
    """

    def __init__(
        self,
        sharded: ShardedProgram,
        work: Work,
        moved: Moved,
        context: Context,
        compute: Callable[[], Compute],
        constants: Constants,
    ) -> None:
        self._sharded, self._work, self._moved = sharded, work, moved
        self._context, self._compute, self._constants = context, compute, constants
        self._local_bytes = LocalBytes(sharded, work)

    def parts(self, meshes: Meshes, microbatches: Vector) -> Parts:
        """Seconds of a step by what belongs together, all blocks on every chip."""
        kernels = self.kernels(meshes, microbatches)
        return self.placed(kernels, meshes, microbatches, None)[0]

    def placed(
        self,
        kernels: Kernels,
        meshes: Meshes,
        microbatches: Vector,
        free: Meshes | None,
    ) -> tuple[Parts, Vector | None]:
        """Kernels with collectives, and what of these shows at least in any order."""
        kind, constants = meshes.cluster.kind, self._constants
        sums = np.zeros((3, PLACES, len(meshes)))
        least = np.zeros((3, len(meshes)))
        for when, place, name, axes, time, size, runs in self._moved.sent(
            meshes, microbatches
        ):
            sums[when, place] += time
            if free is not None:
                least[when] += runs * free.time_s(name, frozenset(axes), size)
        of_op = self._work.segments.of_op
        sent, heads = self._context.transfers(meshes, microbatches, kernels.attention)
        beside, late = (np.zeros((PLACES, len(meshes))) for _ in range(2))
        for each in sent:
            beside[of_op[each.op]] += each.time_s
            late[of_op[each.op]] += each.shown_s
        collective = sums.sum(axis=0)
        work = (kernels.matmul + kernels.other).sum(axis=0)
        exposed = exposed_s(kind, constants, work, *sums.sum(axis=1))
        whole = np.maximum(collective.sum(axis=0), np.finfo(float).tiny)
        parts = Parts(
            kernels.matmul,
            kernels.other,
            kernels.update,
            collective + beside,
            collective / whole * exposed + late,
            heads,
        )
        if free is None:
            return parts, None
        # Attention sends in one order alone, see `Placing`.
        shown = least_exposed_s(kind, constants, work, *least) + late.sum(axis=0)
        return parts, shown

    def sent(self, meshes: Meshes, microbatches: Vector) -> list[Transfer]:
        """What attention sends where its keys and values stay in parts."""
        attention = self.kernels(meshes, microbatches).attention
        return self._context.transfers(meshes, microbatches, attention)[0]

    def compute_s(
        self, meshes: Meshes, cuts: Vector, rates: Rates
    ) -> tuple[Vector, Vector]:
        """Seconds in products, and in all else that a chip computes, at some rates."""
        found = self.kernels(meshes, cuts, rates)
        return found.matmul.sum(axis=0), found.other.sum(axis=0)

    def kernels(
        self, meshes: Meshes, cuts: Vector, rates: Rates | None = None
    ) -> Kernels:
        """The same by what belongs together, by default at the rates of the cluster."""
        rates = rates or Rates.of(meshes.cluster, self._constants)
        matmul, other, forward, update = np.zeros((4, PLACES, len(meshes)))
        places, of_op = self._work.segments, self._context.of_op
        attention = [np.zeros(len(meshes)) for _ in self._context.passes]
        for time in self._compute().times(meshes, cuts, rates):
            place = places.of_op[time.kernel.op]
            of_kind = matmul if time.kernel.kind == "product" else other
            of_kind[place] += time.total_s
            if self._work.update[time.kernel.op]:
                update[place] += time.total_s
            elif not is_transposed(self._sharded.traced.program.ops[time.kernel.op]):
                forward[place] += time.total_s
            if time.kernel.op in of_op:
                attention[of_op[time.kernel.op]] += time.total_s
        other += self.summed_s(meshes, cuts, rates)
        return Kernels(matmul, other, forward, update, tuple(attention))

    def summed_s(self, meshes: Meshes, cuts: Vector, rates: Rates) -> Table:
        """Seconds in sums of gradients over microbatches, float64[place, candidate]."""
        found = np.zeros((PLACES, len(meshes)))
        # The sum is read, the new gradient is read, the sum is written.
        passes = np.where(cuts > 1, 3 * cuts / rates.hbm_bytes_per_s, 0.0)
        for value in self._work.gradient_leaves:
            axes = axes_of(self._sharded.specs[value])
            size = self._local_bytes(value, axes, meshes, np.ones(1))
            place = self._work.segments.of_value[value]
            found[place] += size * self._work.alike[value] * passes
        return found

    def sent_bytes(self, meshes: Meshes, microbatches: Vector) -> Vector:
        """Bytes that one microbatch hands from block to block, on one device."""
        sent = np.zeros(len(meshes))
        for v in self._work.segments.sent:
            axes = axes_of(self._sharded.specs[v])
            sent += self._local_bytes(v, axes, meshes, microbatches)
        return sent

    def shared_bytes(self, meshes: Meshes) -> Vector:
        """Bytes of gradients that both ends have, on one device."""
        shared = np.zeros(len(meshes))
        for v in self._work.gradient_leaves:
            if self._work.segments.of_value[v] == BOTH:
                axes = axes_of(self._sharded.specs[v])
                shared += self._local_bytes(v, axes, meshes, np.ones(1))
        return shared
