"""Pricing many meshes of one sharded program at once.

One `Pricer` holds a program with a layout; `price` evaluates any number of mesh sizes
and microbatch counts as NumPy vectors, so thousands of candidates cost what one does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from autoshard.cost.collectives import Meshes, Vector
from autoshard.cost.constants import Constants
from autoshard.cost.kernels import HBM_EFFICIENCY, busy_share, share_of_peak
from autoshard.cost.liveness import Liveness
from autoshard.cost.moves import (
    Step,
    axes_of,
    moves_of_state,
    steps_of,
    unique_moves,
)
from autoshard.cost.overlap import prefetched, trailing
from autoshard.cost.work import Work
from autoshard.ir.program import BARRIER, Op, Program
from autoshard.plan.cluster import Cluster
from autoshard.plan.sharded import OUTPUT, Dims, Exchange, ShardedProgram

MEMORY_HEADROOM = 0.94
"""Share of memory that a program may use; the rest is runtime, communication buffers
and fragmentation."""


def product_dtype(program: Program, op: Op) -> str:
    """The dtype in which a matrix product is done.

    Integers have no published peak of their own; they are priced as float32.
    """
    dtype = jnp.result_type(*(program.values[v].dtype for v in op.inputs if v >= 0))
    return str(dtype) if jnp.issubdtype(dtype, jnp.inexact) else "float32"


def _product_dims(rule: Any) -> tuple[tuple[int, ...], ...] | None:
    """Factors of the dims m, k and n of a product of two operands, else None.

    A factor in both operands and the result is a batch of products and no dim of one.
    """
    if rule.op_kind != "matmul" or len(rule.operands) != 2:
        return None
    left, right = ({f for d in dims for f in d} for dims in rule.operands)
    result = {f for dims in rule.results for d in dims for f in d}
    m = tuple(sorted((left & result) - right))
    n = tuple(sorted((right & result) - left))
    k = tuple(sorted((left | right) - result))
    return tuple(dim for dim in (m, k, n) if dim) or None


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
        self._products = [_product_dims(rule) for rule in sharded.classes.rules]
        self._prefetched, self._trailing = moves_of_state(sharded, work, self.moves)
        self.liveness = Liveness(sharded, work, self.moves, self.local_bytes)

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
        matmul, other = self._compute(meshes, microbatches)
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

    def _compute(self, meshes: Meshes, cuts: Vector) -> tuple[Vector, Vector]:
        cluster, work, c = meshes.cluster, self.work, self.constants
        chip = cluster.chip
        share = chip.hbm_efficiency.value if chip.hbm_efficiency else HBM_EFFICIENCY
        rate = cluster.hbm_bytes_per_s * share
        share = share_of_peak(chip.generation or "other", cluster.kind, c)
        half_dim = c["matmul.half_dim"]
        if chip.matmul_efficiency:  # measured on average shapes
            share, half_dim = chip.matmul_efficiency.value, 0.0
        matmul, other = np.zeros(len(meshes)), np.zeros(len(meshes))
        for op, rule, axes in zip(
            self.program.ops,
            self.sharded.classes.rules,
            self.sharded.factor_axes,
            strict=True,
        ):
            if rule.op_kind in ("link", "data", "collective") or (
                op.primitive == BARRIER
            ):
                continue
            repeats = work.runs[op.index] * (1.0 if work.update[op.index] else cuts)
            moved = self._op_bytes(op, rule, axes, meshes, cuts)
            traffic = moved / rate
            if rule.op_kind == "matmul" or (
                rule.op_kind == "foreign" and rule.flops_per_point
            ):
                split = meshes.product(axes_of(axes))
                flops = work.flops[op.index] / split
                if work.batched_op[op.index]:
                    flops = flops / cuts
                dtype = product_dtype(self.program, op)
                peak = cluster.peak_flops_per_s(dtype)
                reached = peak * share
                smallest = self._smallest_dim(op, rule, axes, meshes, cuts)
                if smallest is not None:
                    reached = reached * busy_share(smallest, peak, half_dim)
                matmul += repeats * np.maximum(flops / reached, traffic)
            else:
                other += repeats * traffic
        # Microbatches: read the sum, read the new gradient, write the sum.
        for value in self._gradient_leaves():
            size = self.local_bytes(
                value, axes_of(self.sharded.specs[value]), meshes, np.ones(1)
            )
            other += np.where(cuts > 1, cuts * 3 * size / rate, 0.0)
        return matmul, other

    def _smallest_dim(
        self, op: Op, rule: Any, axes: Dims, meshes: Meshes, cuts: Vector
    ) -> Vector | None:
        """Smallest of the dims m, k and n of a product on one device."""
        dims = self._products[op.index]
        if dims is None:
            return None
        found: Vector | None = None
        batched = self.work.batched_op[op.index]
        batch = {c for c, n in self.sharded.classes.names.items() if "batch" in n}
        of_factor = self.sharded.classes.of_factor[op.index]
        for factors in dims:
            size = np.full(len(meshes), float(prod(rule.sizes[f] for f in factors)))
            size = size / meshes.product(axes_of(tuple(axes[f] for f in factors)))
            if batched and any(of_factor[f] in batch for f in factors):
                size = size / cuts
            found = size if found is None else np.minimum(found, size)
        return found

    def _op_bytes(
        self, op: Any, rule: Any, axes: Dims, meshes: Meshes, cuts: Vector
    ) -> Vector | float:
        """HBM traffic of one run: what is read from and written to memory."""
        total: Vector | float = 0.0
        if rule.op_kind in ("gather", "scatter"):
            # Only the rows touched move, not the table.
            touched = op.outputs[0] if rule.op_kind == "gather" else op.inputs[2]
            held = axes_of(self.sharded.specs[touched])
            return 2 * self.local_bytes(touched, held, meshes, cuts)
        slots = (
            *zip(op.inputs, rule.operands, strict=True),
            *zip(op.outputs, rule.results, strict=True),
        )
        for value, dims in slots:
            if value < 0 or not self.work.materialised[value]:
                continue
            held = axes_of(tuple(axes[d[0]] if d else () for d in dims))
            total = total + self.local_bytes(value, held, meshes, cuts)
        return total

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
        if reshard.op != OUTPUT:
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
