"""Seconds that a program's kernels take, for many meshes at once.

Every kernel takes the larger of its arithmetic and its memory traffic (the roofline of
Williams et al. 2009, doi:10.1145/1498765.1498785); `autoshard.cost.fusion` says what
its traffic is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from autoshard.cost.active import Moves
from autoshard.cost.collectives import Meshes, Vector
from autoshard.cost.fusion import Kernel
from autoshard.cost.kernels import busy_share
from autoshard.cost.local import LocalBytes
from autoshard.cost.moves import axes_of
from autoshard.cost.rates import Rates
from autoshard.cost.work import Work
from autoshard.ir.program import Op, Program
from autoshard.plan.sharded import Dims, ShardedProgram

_FLOAT32_BYTES = 4


def product_dtype(program: Program, op: Op) -> str:
    """The dtype in which a matrix product is done.

    Integers have no published peak of their own; they are priced as float32.
    """
    return _together(*(program.values[v].dtype for v in op.inputs if v >= 0))


@cache
def _together(*dtypes: Any) -> str:
    dtype = jnp.result_type(*dtypes)
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
class KernelTime:
    """What one kernel takes in a step of training.

    Attributes:
        kernel: The kernel.
        arithmetic_s: Seconds of its product, zero where it has none.
        traffic_s: Seconds of its memory traffic.
        total_s: Seconds of both, as far as one does not hide the other.
        least_s: No less than this of `total_s` is there however state is stored: of
            what is not made of the batch only parameters that products read count, in
            their narrowest form.
    """

    kernel: Kernel
    arithmetic_s: Vector
    traffic_s: Vector
    total_s: Vector
    least_s: Vector


@dataclass(frozen=True, slots=True)
class _Moved:
    """One value that a kernel moves.

    Attributes:
        value: The value.
        axes: That shard it there.
        passes: How often it is read or written.
        scratch: Passes over it, in float32, through the kernel's own memory.
    """

    value: int
    axes: frozenset[str]
    passes: float = 1.0
    scratch: float = 0.0


class Compute:
    """Prices the kernels of a program with a layout.

    Args:
        sharded: The program.
        work: Its facts, from `analyse`.
        moves: What it moves.
        local_bytes: Of its values.
    """

    def __init__(
        self,
        sharded: ShardedProgram,
        work: Work,
        moves: Moves,
        local_bytes: LocalBytes,
    ) -> None:
        self.sharded = sharded
        self.work = work
        self.moves = moves
        self.program = sharded.traced.program
        self.local_bytes = local_bytes
        self._products = [_product_dims(rule) for rule in sharded.classes.rules]
        names = sharded.classes.names
        self._batch = {c for c, n in names.items() if "batch" in n}
        self._kernels: dict[frozenset[str], tuple[Kernel, ...]] = {}
        self._moved: dict[int, list[_Moved]] = {}
        self._least: dict[int, list[_Moved]] = {}
        values = self.program.values
        self._narrow = min((values[v].dtype.itemsize for v in work.params), default=0)

    def kernels(self, active: frozenset[str]) -> tuple[Kernel, ...]:
        """The kernels on meshes where only these axes have several devices."""
        active &= self.moves.axes
        if active not in self._kernels:
            found = self.work.fusions.kernels(self.moves.values(active))
            self._kernels[active] = found
        return self._kernels[active]

    def _shares(self, meshes: Meshes) -> Iterator[tuple[Kernel, Vector | float]]:
        """Every kernel that some candidate has, and how often each has it."""
        groups = [(self.kernels(active), rows) for active, rows in meshes.by_active]
        if len({id(kernels) for kernels, _ in groups}) == 1:
            yield from ((kernel, 1.0) for kernel in groups[0][0])
            return
        found: dict[int, tuple[Kernel, Vector]] = {}
        for kernels, rows in groups:
            for kernel in kernels:
                if id(kernel) not in found:
                    found[id(kernel)] = kernel, np.zeros(len(meshes))
                found[id(kernel)][1][rows] += 1.0
        yield from found.values()

    def times(
        self, meshes: Meshes, cuts: Vector, rates: Rates, update: bool | None = None
    ) -> Iterator[KernelTime]:
        """Every kernel, and what all of its runs in a step take.

        A candidate that does not have a kernel does not take its time.

        Args:
            meshes: The candidates.
            cuts: float64[candidate]; pieces the batch is cut into.
            rates: Of the chip.
            update: Whether only those of the optimizer are asked for, or only the
                others; all are by default.

        Raises:
            InputError: The chip has no peak for a dtype the program multiplies in.
        """
        work = self.work
        for kernel, share in self._shares(meshes):
            if kernel.kind == "copy" and meshes.cluster.kind != "tpu":
                continue
            if update not in (None, work.update[kernel.op]):
                continue
            moved = self._moved.get(id(kernel))
            if moved is None:
                moved = self._moved[id(kernel)] = self._traffic(kernel)
                self._least[id(kernel)] = self._of_state(kernel)
            repeats = share * work.runs[kernel.op]
            if not work.update[kernel.op]:
                repeats = repeats * cuts
            bytes_, least_bytes = np.zeros((2, len(meshes)))
            for part in moved:
                size = self.local_bytes(part.value, part.axes, meshes, cuts)
                passes = part.passes
                if part.scratch and rates.scratch_bytes:
                    width = self.program.values[part.value].dtype.itemsize
                    passes += part.scratch * rates.scratch_bytes / width
                bytes_ += size * passes
                if work.batched[part.value]:
                    least_bytes += size * passes
            for part in self._least[id(kernel)]:
                # How it is stored may say that it is not padded.
                size = self.local_bytes.unpadded(part.value, part.axes, meshes, cuts)
                least_bytes += size * part.passes
            turned = kernel.kind == "copy"
            rate = rates.copy_bytes_per_s if turned else rates.hbm_bytes_per_s
            traffic = bytes_ / rate
            if rates.window_s and kernel.kind == "loop" and kernel.ops == 1:
                written = self.program.values[moved[-1].value]
                size = self.local_bytes(written.index, moved[-1].axes, meshes, cuts)
                elements = size / written.dtype.itemsize
                traffic += elements / rates.window_elements * rates.window_s
            arithmetic = np.zeros(len(meshes))
            if kernel.kind == "product":
                arithmetic = self._arithmetic(kernel.op, meshes, cuts, rates)
            total = np.maximum(arithmetic, traffic)
            total += rates.exposed * np.minimum(arithmetic, traffic)
            least_traffic = least_bytes / rate
            least = np.maximum(arithmetic, least_traffic)
            least += rates.exposed * np.minimum(arithmetic, least_traffic)
            yield KernelTime(
                kernel,
                repeats * arithmetic,
                repeats * traffic,
                repeats * total,
                repeats * least,
            )

    def _arithmetic(
        self, index: int, meshes: Meshes, cuts: Vector, rates: Rates
    ) -> Vector:
        op = self.program.ops[index]
        if not self.work.flops[index]:  # of a dim of size 0
            return np.zeros(len(meshes))
        axes = self.sharded.factor_axes[index]
        flops = self.work.flops[index] / meshes.product(axes_of(axes))
        if self.work.batched_op[index]:
            flops = flops / cuts
        peak = meshes.cluster.peak_flops_per_s(product_dtype(self.program, op))
        reached = peak * rates.product_share
        smallest = self._smallest_dim(op, axes, meshes, cuts)
        if smallest is not None:
            reached = reached * busy_share(smallest, peak, rates.half_dim)
        return np.asarray(flops / reached)

    def _smallest_dim(
        self, op: Op, axes: Dims, meshes: Meshes, cuts: Vector
    ) -> Vector | None:
        """Smallest of the dims m, k and n of a product on one device."""
        dims, rule = self._products[op.index], self.sharded.classes.rules[op.index]
        if dims is None:
            return None
        found: Vector | None = None
        batched = self.work.batched_op[op.index]
        of_factor = self.sharded.classes.of_factor[op.index]
        for factors in dims:
            size = np.full(len(meshes), float(prod(rule.sizes[f] for f in factors)))
            size = size / meshes.product(axes_of(tuple(axes[f] for f in factors)))
            if batched and any(of_factor[f] in self._batch for f in factors):
                size = size / cuts
            found = size if found is None else np.minimum(found, size)
        return found

    def _traffic(self, kernel: Kernel) -> list[_Moved]:
        op = self.program.ops[kernel.op]
        rule = self.sharded.classes.rules[kernel.op]
        if rule.op_kind in ("gather", "scatter"):
            # Only the rows touched move, not the table.
            touched = op.outputs[0] if rule.op_kind == "gather" else op.inputs[2]
            held = axes_of(self.sharded.specs[touched])
            return [_Moved(touched, held, 2.0)]
        if kernel.kind == "copy":
            (v,) = kernel.reads
            place = kernel.reads[v]
            held = self._used(*place) if place[0] >= 0 else self._made(v)
            return [_Moved(v, held, 2.0)]
        found = [_Moved(v, self._used(*place)) for v, place in kernel.reads.items()]
        space = self.program.values[kernel.space]
        if (
            kernel.reduces
            and kernel.kind != "product"
            and not any(
                self.program.values[v].shape == space.shape for v in kernel.writes
            )
        ):
            found.append(_Moved(kernel.space, self._used(kernel.op, 0), 0.0, 1.0))
        for v in kernel.writes:
            value = self.program.values[v]
            narrow = value.dtype.itemsize < _FLOAT32_BYTES
            full = value.bytes_ * space.dtype.itemsize == (
                space.bytes_ * value.dtype.itemsize
            )
            scratch = float(narrow and full and kernel.kind in ("loop", "product"))
            found.append(_Moved(v, self._made(v), 1.0, scratch))
        return found

    def _of_state(self, kernel: Kernel) -> list[_Moved]:
        """What a product moves of state at least, however that is stored."""
        if kernel.kind != "product":
            return []
        op, work, values = self.program.ops[kernel.op], self.work, self.program.values
        # What a product reads twice it may read once, where it has the least of it.
        read: dict[int, tuple[int, frozenset[str]]] = {}
        for slot, v in enumerate(op.inputs):
            if v in work.params and not work.batched[v]:
                root, axes = work.params[v], self._used(op.index, slot)
                other, more = read.get(root, (v, axes))
                small = min(v, other, key=lambda each: values[each].bytes_)
                read[root] = small, axes | more
        return [
            _Moved(v, axes, self._narrow / values[v].dtype.itemsize)
            for v, axes in read.values()
        ]

    def _made(self, v: int) -> frozenset[str]:
        """Axes that shard a value where it is made."""
        op = self.program.ops[self.program.values[v].producer]
        axes = self.sharded.factor_axes[op.index]
        dims = self.sharded.classes.rules[op.index].results[op.outputs.index(v)]
        return axes_of(tuple(axes[d[0]] if d else () for d in dims))

    def _used(self, index: int, slot: int) -> frozenset[str]:
        """Axes that shard a value where it is an operand."""
        axes = self.sharded.factor_axes[index]
        dims = self.sharded.classes.rules[index].operands[slot]
        return axes_of(tuple(axes[d[0]] if d else () for d in dims))
