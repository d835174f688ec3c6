"""Pricing many meshes of one sharded program at once.

One `Pricer` holds a program with a layout; `price` evaluates any number of mesh sizes
and microbatch counts as NumPy vectors, so thousands of candidates cost what one does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autoshard.cost.collectives import Meshes, Vector
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
from autoshard.cost.overlap import prefetched, trailing
from autoshard.cost.rates import Rates
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
    """

    matmul_s: Vector
    other_s: Vector
    collective_s: Vector
    peak_bytes: Vector
    hidden_s: Vector

    @property
    def step_s(self) -> Vector:
        """Seconds per step."""
        return self.matmul_s + self.other_s + self.collective_s


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
        self._prefetched, self._trailing = moves_of_state(sharded, work, self.moves)
        self.liveness = Liveness(sharded, work, self.moves, self.local_bytes)

    @cached_property
    def compute(self) -> Compute:
        """Its kernels, which take longer to find than all else."""
        return Compute(self.sharded, self.work, self.local_bytes)

    def price(
        self,
        cluster: Cluster,
        sizes: np.ndarray[Any, np.dtype[np.int64]],
        microbatches: Vector,
    ) -> Prices:
        """Prices candidates.

        Args:
            cluster: Where they run.
            sizes: int64[candidate, axis] in the order of `AXES`.
            microbatches: float64[candidate]; pieces the batch is cut into.

        Returns:
            Costs per candidate.

        Raises:
            InputError: The chip has no peak for a dtype the program multiplies in.
        """
        meshes = Meshes(cluster, sizes)
        rates = Rates.of(cluster, self.constants)
        matmul, other = self.compute_s(meshes, microbatches, rates)
        ahead, after, between = (np.zeros(len(meshes)) for _ in range(3))
        for index in range(len(self.moves)):
            where = (
                ahead
                if index in self._prefetched
                else after
                if index in self._trailing
                else between
            )
            for _, time, _, _ in self.collective(index, meshes, microbatches):
                where += time
        for exchange in self.sharded.exchanges:
            between += self.exchange(exchange, meshes, microbatches)[0]
        shown = self._exposed(cluster, matmul + other, ahead, after, between)
        peak, _ = self.liveness.memory(meshes, microbatches)
        hidden = ahead + after + between - shown
        return Prices(matmul, other, shown, peak, hidden)

    def floor_s(
        self,
        cluster: Cluster,
        sizes: np.ndarray[Any, np.dtype[np.int64]],
        microbatches: Vector,
    ) -> Vector:
        """Seconds that a step takes at least, however state is stored.

        The kernels of the forward and backward passes and the collectives on
        activations depend on rules and remat alone: no storage of parameters, gradients
        and optimizer state makes a candidate with the same rules faster.

        Args:
            cluster: As in `price`.
            sizes: As in `price`.
            microbatches: As in `price`.
        """
        meshes = Meshes(cluster, sizes)
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
        return found + self._exposed(cluster, none, none, none, between)

    def _exposed(
        self,
        cluster: Cluster,
        work: Vector,
        ahead: Vector,
        after: Vector,
        between: Vector,
    ) -> Vector:
        """Seconds of collectives that computation does not hide.

        Args:
            cluster: Where.
            work: Seconds of computation.
            ahead: Of gathers of parameters, which XLA starts ahead of their use.
            after: Of sums of gradients, which end beside the rest of the backward pass.
            between: Of collectives on activations, which the next op waits for; the
                TPU compiler runs pieces of them beside the product.
        """
        c = self.constants
        if cluster.kind == "cpu":  # its collectives block
            return ahead + after + between
        if cluster.kind == "tpu":
            between = between * c["tensor.compiler"]
            rest = work + between
            return between + prefetched(
                ahead + after, rest, c["gather.interference_tpu"]
            )
        rest = work + between
        # Two thirds of the work are the backward pass.
        cover = c["data.hidden"] * rest * 2 / 3
        return (
            between
            + prefetched(ahead, rest, c["gather.interference"])
            + trailing(after, cover, c["data.exposed"])
        )

    def local_bytes(
        self, value: int, axes: frozenset[str], meshes: Meshes, cuts: Vector
    ) -> Vector:
        """Bytes of a value on one device, in one microbatch, padding included."""
        whole = self.program.values[value].bytes_ / meshes.product(axes)
        for size, dim in self._padded.get(value, ()):
            if axes.issuperset(dim):
                ways = meshes.product(frozenset(dim))
                whole = whole * (np.ceil(size / ways) * ways / size)
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
        matmul, other = np.zeros(len(meshes)), np.zeros(len(meshes))
        for time in self.compute.times(meshes, cuts, rates):
            if time.kernel.kind == "product":
                matmul += time.total_s
            else:
                other += time.total_s
        # Microbatches: read the sum, read the new gradient, write the sum.
        for value in self._gradient_leaves():
            size = self.local_bytes(
                value, axes_of(self.sharded.specs[value]), meshes, np.ones(1)
            )
            moved = 3 * size / rates.hbm_bytes_per_s
            moved = moved * self.work.alike[value]
            other += np.where(cuts > 1, cuts * moved, 0.0)
        return matmul, other

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
        for step in steps_of(reshard):
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
