"""What is in a device's memory at the peak of a step, for many meshes at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from autoshard.cost.collectives import Meshes, Vector
from autoshard.cost.local import LocalBytes
from autoshard.cost.moves import axes_of, key_of, places_of
from autoshard.cost.offload import (
    HELD_PIECES,
    UPDATED_PIECES,
    Held,
    Offload,
    Offloading,
)
from autoshard.cost.segments import BLOCK
from autoshard.cost.tiles import filled
from autoshard.cost.work import Work
from autoshard.ir.program import LINK
from autoshard.plan.sharded import OUTPUT, Dims, Reshard, ShardedProgram

_ALIGNED = 8
"""Elements, of two bytes, in what a GPU's tensor cores read at once.

NVIDIA, "Matrix Multiplication Background User's Guide", section on requirements."""

_SPLIT_BELOW = 128 * 128 * 128
"""Elements of a product's result below which XLA splits its sum on GPUs: a tile of 128
by 128 for each of the 108 (A100) to 148 (B200) cores."""

KINDS = ("gradients", "activations")
_STASH = "kept for the backward pass"


@dataclass(frozen=True, slots=True)
class Buffer:
    """A stretch of memory, and when it is in use.

    Attributes:
        value: What it holds.
        spec: Mesh axes that divide it, per dim.
        begin: First position of the schedule at which it is in use.
        end: Last one.
        kind: Of `KINDS`.
        needs: Of these axes one must have several devices, or there is no copy; empty
            where it is always there.
        only: Chips whose compiler makes it, `gpu` or `tpu`; empty for both.
        tpu_share: Part of the value's bytes that it takes on TPUs.
        result: Of a product that is split along its summed dim if this result is too
            small to be cut into work for all cores; only then is there such a buffer.
            -1 where it does not depend on that.
        alike: How many there are of it.
    """

    value: int
    spec: Dims
    begin: int
    end: int
    kind: str
    needs: frozenset[str] = frozenset()
    only: str = ""
    tpu_share: float = 1.0
    result: int = -1
    alike: int = 1


Share = np.ndarray[Any, np.dtype[np.float64]]
"""Part that a stage has, by place."""

_Key = tuple[tuple[int, ...], int, Dims]


class Liveness:
    """Follows the values of a program with a layout from birth to death.

    Args:
        sharded: The program, traced without microbatches.
        work: Its facts, from `analyse`.
        moves: Its moves, each once.
        local_bytes: Of its values.
        more: Buffers of what is sent in other ways than by moves.
    """

    def __init__(
        self,
        sharded: ShardedProgram,
        work: Work,
        moves: Sequence[Reshard],
        local_bytes: LocalBytes,
        more: Sequence[Buffer] = (),
    ) -> None:
        self._more = tuple(more)
        self.sharded = sharded
        self.work = work
        self.moves = moves
        self.program = sharded.traced.program
        self._local_bytes = local_bytes
        self.offloading = Offloading(sharded.traced, work)

    def state_bytes(
        self, meshes: Meshes, share: Share | None = None
    ) -> dict[str, Vector]:
        """Bytes of the arguments on one device, by state.

        Args:
            meshes: The candidates.
            share: As in `memory`.
        """
        table: dict[str, Vector] = {}
        tiles: dict[_Key, Vector | float] = {}
        for value, info in zip(
            self.program.inputs, self.sharded.traced.inputs, strict=True
        ):
            size = self._whole(value, self.sharded.specs[value], meshes, tiles)
            size = size * self.work.alike[value]
            size = size if share is None else size * share[self._place[value]]
            table[info.state] = table.get(info.state, np.zeros(len(meshes))) + size
        return table

    def summed_bytes(
        self, meshes: Meshes, cuts: Vector, share: Share | None = None
    ) -> Vector:
        """Bytes of gradients on one device in which microbatches are summed.

        Args:
            meshes: The candidates.
            cuts: float64[candidate]; microbatches of each.
            share: As in `memory`.
        """
        tiles: dict[_Key, Vector | float] = {}
        whole = np.zeros(len(meshes))
        for value in self.work.gradient_leaves:
            size = self._whole(value, self.sharded.specs[value], meshes, tiles)
            size = size * self.work.alike[value]
            whole += size if share is None else size * share[self._place[value]]
        return np.where(cuts > 1, whole, 0.0)

    def held(self, kind: str, meshes: Meshes, cuts: Vector) -> Held:
        """What of a kind can be offloaded, see `plan.strategy.OFFLOADABLE`."""
        tiles: dict[_Key, Vector | float] = {}
        sizes: dict[int, Vector] = {}
        if kind == "activations":
            for buffer in self.buffers:
                if self.is_stash(buffer) and buffer.value not in sizes:
                    size = self._size(buffer, meshes, cuts, tiles)
                    sizes[buffer.value] = size
        else:
            for v in self.offloading.leaves(kind):
                sizes[v] = self._whole(v, self.sharded.specs[v], meshes, tiles)
        return self.offloading.held(sizes, len(meshes))

    def memory(
        self,
        meshes: Meshes,
        cuts: Vector,
        share: Share | None = None,
        waiting: Vector | None = None,
        held: Mapping[str, Held] = MappingProxyType({}),
    ) -> tuple[Vector, dict[str, Vector]]:
        """Peak bytes per device, and what is alive at the peak, by kind.

        Arguments are donated and live throughout; other values live from the op that
        makes them to the last that needs them.

        Args:
            meshes: The candidates.
            cuts: float64[candidate]; microbatches of each.
            share: What a pipeline stage has of what belongs to each place of
                `segments`, float64[place, candidate]; everything where it is None.
            waiting: Microbatches beyond the current one whose activations are kept for
                their backward pass.
            held: What is in the host's memory, by kind, but for the pieces of it that
                are in use or on their way.
        """
        deltas = self._deltas(meshes, cuts, share, waiting)
        stash = deltas.pop(_STASH)
        if "activations" not in held:
            deltas["activations"] += stash
        for kind, own in held.items():
            delta = deltas.setdefault(kind, np.zeros_like(stash))
            for pieces, begin, end in self._windows(kind):
                delta[begin] += pieces * own.piece(share)
                delta[end] -= pieces * own.piece(share)
        totals = {kind: np.cumsum(delta, axis=0) for kind, delta in deltas.items()}
        whole = np.asarray(sum(totals.values()))
        whole[sorted(self.work.amid)] = 0.0
        at = np.argmax(whole, axis=0)
        columns = np.arange(len(meshes))
        table = self.state_bytes(meshes, share)
        table.update({kind: total[at, columns] for kind, total in totals.items()})
        return np.asarray(sum(table.values())), table

    def peaks(
        self,
        meshes: Meshes,
        cuts: Vector,
        share: Share | None,
        waiting: Vector | None,
        held: Mapping[str, Held],
        offloads: Sequence[Offload],
    ) -> list[Vector]:
        """The peaks of `memory` with several sets of what is offloaded.

        Between two of the positions at which some piece comes or goes, what is
        offloaded adds the same everywhere; so the peaks of these stretches are enough.

        Args:
            meshes: As in `memory`.
            cuts: As in `memory`.
            share: As in `memory`.
            waiting: As in `memory`.
            held: What can be offloaded, by kind.
            offloads: The sets.
        """
        deltas = self._deltas(meshes, cuts, share, waiting)
        windows = {kind: list(self._windows(kind)) for kind in held}
        turns = {at for own in windows.values() for _, *ends in own for at in ends}
        begins = sorted({0, *turns} - {len(deltas[_STASH])})
        stash = np.cumsum(deltas.pop(_STASH), axis=0)
        rest = np.cumsum(sum(deltas.values()), axis=0)
        amid = sorted(self.work.amid)

        def highest(whole: np.ndarray) -> np.ndarray:
            whole[amid] = 0.0
            return np.maximum.reduceat(whole, begins, axis=0)

        stretches = {False: highest(rest + stash)}
        if any("activations" in offload for offload in offloads):
            stretches[True] = highest(rest)
        states = self.state_bytes(meshes, share)
        found = []
        for offload in offloads:
            peaks = stretches["activations" in offload].copy()
            for kind in offload:
                for pieces, begin, end in windows[kind]:
                    inside = [begin <= at < end for at in begins]
                    peaks[inside] += pieces * held[kind].piece(share)
            own = sum(size for kind, size in states.items() if kind not in offload)
            found.append(peaks.max(axis=0) + own)
        return found

    def _deltas(
        self,
        meshes: Meshes,
        cuts: Vector,
        share: Share | None,
        waiting: Vector | None,
    ) -> dict[str, np.ndarray]:
        """By kind, by how much more is alive at each position than at the one before.

        What is kept for the backward pass is a kind of its own.
        """
        count = len(self.program.ops) + 2
        deltas = {kind: np.zeros((count, len(meshes))) for kind in (*KINDS, _STASH)}
        tiles: dict[_Key, Vector | float] = {}

        def live(kind: str, size: Vector, begin: int, end: int) -> None:
            deltas[kind][begin] += size
            deltas[kind][end + 1] -= size

        for buffer in self.buffers:
            if buffer.only in ("", meshes.cluster.kind):
                size = self._size(buffer, meshes, cuts, tiles) * buffer.alike
                size = (
                    size if share is None else size * share[self._place[buffer.value]]
                )
                kept = self.is_stash(buffer)
                if waiting is not None and kept:
                    deltas[_STASH][0] += size * waiting
                live(_STASH if kept else buffer.kind, size, buffer.begin, buffer.end)
        live("gradients", self.summed_bytes(meshes, cuts, share), 0, count - 3)
        return deltas

    def _windows(self, kind: str) -> Iterator[tuple[int, int, int]]:
        """How many pieces of what is offloaded are there, from when, and until when."""
        if kind == "activations":
            lives = [(b.begin, b.end) for b in self.buffers if self.is_stash(b)]
            yield HELD_PIECES, min(b for b, _ in lives), max(e for _, e in lives) + 1
            return
        ops, at = self.program.ops, self.work.at
        updates = [at[op.index] for op in ops if self.work.update[op.index]]
        begin = min(updates, default=len(ops))
        if kind == "params":
            yield HELD_PIECES, 0, begin
        yield UPDATED_PIECES, begin, len(ops) + 1

    def activations(
        self, meshes: Meshes, cuts: Vector
    ) -> Iterator[tuple[Buffer, Vector, bool]]:
        """What is made of the batch alone, however state is stored.

        Args:
            meshes: The candidates.
            cuts: float64[candidate]; microbatches of each.

        Yields:
            Each buffer, its bytes on one device, and whether it belongs to the blocks.
        """
        tiles: dict[_Key, Vector | float] = {}
        for buffer in self.buffers:
            depends = buffer.needs or buffer.only or buffer.result >= 0
            batched = self.work.batched[buffer.value]
            if batched and buffer.kind == "activations" and not depends:
                size = self._size(buffer, meshes, cuts, tiles) * buffer.alike
                yield buffer, size, bool(self._place[buffer.value] == BLOCK)

    @property
    def _place(self) -> np.ndarray:
        """Where each value belongs when the program is cut into stages."""
        return self.work.segments.of_value

    def is_stash(self, buffer: Buffer) -> bool:
        """Whether a buffer keeps what the backward pass needs of a microbatch."""
        whole = not buffer.needs and buffer.result < 0
        return whole and buffer.value in self.work.segments.stashed

    def _size(
        self,
        buffer: Buffer,
        meshes: Meshes,
        cuts: Vector,
        tiles: dict[_Key, Vector | float],
    ) -> Vector:
        """Bytes of a buffer on one device."""
        axes = axes_of(buffer.spec)
        size = self._local_bytes(buffer.value, axes, meshes, cuts)
        if meshes.cluster.kind == "tpu":
            size = size * buffer.tpu_share
            size = size * self._filled(buffer.value, buffer.spec, meshes, tiles)
        if buffer.needs:
            size = np.where(meshes.product(buffer.needs) > 1, size, 0.0)
        if buffer.result >= 0:
            result = self.program.values[buffer.result]
            axes = axes_of(self.sharded.specs[buffer.result])
            held = self._local_bytes(buffer.result, axes, meshes, cuts)
            small = held < _SPLIT_BELOW * result.dtype.itemsize
            size = np.where(small, size, 0.0)
        return size

    def _whole(
        self,
        value: int,
        spec: Dims,
        meshes: Meshes,
        tiles: dict[_Key, Vector | float],
    ) -> Vector:
        """Bytes on one device of what no microbatch holds only a part of."""
        size = self.program.values[value].bytes_ / meshes.product(axes_of(spec))
        if meshes.cluster.kind == "tpu":
            size = size * self._filled(value, spec, meshes, tiles)
        return size

    def _filled(
        self,
        value: int,
        spec: Dims,
        meshes: Meshes,
        tiles: dict[_Key, Vector | float],
    ) -> Vector | float:
        """By which factor a TPU's tiles make a value larger, each type only once."""
        shape, dtype = (
            self.program.values[value].shape,
            self.program.values[value].dtype,
        )
        key = (shape, dtype.itemsize, spec)
        if key not in tiles:
            dims = [
                np.ceil(size / meshes.product(frozenset(axes)))
                for size, axes in zip(shape, spec, strict=True)
            ]
            tiles[key] = filled(dims, dtype.itemsize) if 0 not in shape else 1.0
        return tiles[key]

    @cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        """All that is neither an argument nor written over one."""
        found = (*self._values(), *self._copies(), *self._slices(), *self._padded())
        found += self._more
        inner = self.work.inner
        if not inner:
            return found
        apart: list[Buffer] = []
        for buffer in found:
            one = replace(buffer, alike=1)
            begin, end = (inner.get(at, at) for at in (buffer.begin, buffer.end))
            rest = replace(buffer, begin=begin, end=end, alike=buffer.alike - 1)
            apart += [one, rest] if rest.alike else [one]
        return tuple(apart)

    def _kind(self, value: int) -> str:
        return KINDS[value not in self.work.gradients]

    def _values(self) -> list[Buffer]:
        found = []
        work, specs = self.work, self.sharded.specs
        for v, (begin, end) in enumerate(zip(work.birth, work.death, strict=True)):
            if begin < 0 or not work.materialised[v] or v in self.sharded.free:
                continue
            share = 0.5 if v in self._rounded else 1.0
            buffer = Buffer(
                v,
                specs[v],
                begin,
                end,
                self._kind(v),
                tpu_share=share,
                alike=work.alike[v],
            )
            found.append(buffer)
        return found

    @cached_property
    def _rounded(self) -> set[int]:
        """What TPUs keep in bfloat16: float32 made for products alone.

        Products of default precision round their operands to bfloat16, and the
        compiler has what makes them do so.
        """
        program, rules = self.program, self.sharded.classes.rules
        found: set[int] = set()
        other: set[int] = set()
        for op, rule in zip(program.ops, rules, strict=True):
            kept = other if rule.op_kind != "matmul" else found
            kept.update(v for v in op.inputs if v >= 0)
        values = program.values
        return {
            v
            for v in found - other - self.work.over
            if values[v].producer >= 0
            and values[v].dtype == np.float32
            and rules[values[v].producer].op_kind == "elementwise"
        }

    def _copies(self) -> list[Buffer]:
        found = []
        for move in self.moves:
            source, target = axes_of(move.source), axes_of(move.target)
            if move.op == OUTPUT:
                if source - target:  # gathered beside what is left to do
                    maker = self.program.values[move.value].producer
                    begin, end = self.work.at[maker], len(self.program.ops)
                    buffer = Buffer(
                        move.value,
                        move.target,
                        begin,
                        end,
                        "activations",
                        source - target,
                        alike=self.work.alike[move.value],
                    )
                    found.append(buffer)
                continue
            alike = self.work.alike_ops[move.op]
            if move.slot.startswith("in"):
                first, last = self.uses[key_of(self.sharded, move)]
                needs = places_of(move.source, move.target)
                buffer = Buffer(
                    move.value,
                    move.target,
                    first,
                    last,
                    "activations",
                    needs,
                    alike=alike,
                )
                found.append(buffer)
            elif move.unreduced and target - source:
                # The whole partial sum exists before its pieces are scattered, and
                # while they are: the next product runs beside that.
                now = self.work.at[move.op]
                then = self._next_product[now]
                kind = self._kind(move.value)
                buffer = Buffer(
                    move.value,
                    move.source,
                    now,
                    then,
                    kind,
                    target - source,
                    alike=alike,
                )
                found.append(buffer)
        return found

    def _slices(self) -> list[Buffer]:
        """What products read of a stack, which on GPUs they do not do in place."""
        program, work = self.program, self.work
        found: dict[int, Buffer] = {}
        slices = {
            op.outputs[0]
            for op in program.ops
            if op.primitive == LINK and op.params["kind"] == "slice"
        }
        first: dict[int, int] = {}
        by_product: set[int] = set()
        for op, rule in zip(program.ops, self.sharded.classes.rules, strict=True):
            for v in slices.intersection(op.inputs):
                first[v] = min(first.get(v, work.at[op.index]), work.at[op.index])
                if rule.op_kind == "matmul":
                    by_product.add(v)
        for v in by_product:
            kind = self._kind(v)
            spec = self.sharded.specs[v]
            found[v] = Buffer(
                v, spec, first[v], work.death[v], kind, only="gpu", alike=work.alike[v]
            )
        return list(found.values())

    def _padded(self) -> list[Buffer]:
        """Copies of operands whose summed dims GPUs' products cannot split.

        A product with a small result is split along its summed dim to have work for
        all cores. One that is no multiple of 8 elements, which tensor cores read at
        once, is padded for that, in the wider type of the two operands.
        """
        program = self.program
        found = []
        for op, rule in zip(program.ops, self.sharded.classes.rules, strict=True):
            if rule.op_kind != "matmul" or len(rule.operands) != 2:
                continue
            results = {f for dims in rule.results for d in dims for f in d}
            summed = {f for dims in rule.operands for d in dims for f in d} - results
            if prod(rule.sizes[f] for f in summed) % _ALIGNED == 0:
                continue
            now = self.work.at[op.index]
            widest = max(program.values[v].dtype.itemsize for v in op.inputs)
            for v in op.inputs:
                times = widest // program.values[v].dtype.itemsize
                copy = Buffer(
                    v,
                    self.sharded.specs[v],
                    now,
                    now,
                    "activations",
                    only="gpu",
                    result=op.outputs[0],
                )
                found += [copy] * times
        return found

    @cached_property
    def _next_product(self) -> list[int]:
        """Per position that of the next product or scatter of the same body.

        The position itself where there is none.
        """
        ops = sorted(self.program.ops, key=lambda op: self.work.at[op.index])
        found = list(range(len(ops)))
        after: dict[int, int] = {}
        for position in reversed(range(len(ops))):
            op = ops[position]
            found[position] = after.get(op.region, position)
            if self.sharded.classes.rules[op.index].op_kind in ("matmul", "scatter"):
                after[op.region] = position
        return found

    @cached_property
    def uses(self) -> dict[tuple[Any, ...], tuple[int, int]]:
        """First and last position at which each resharded copy is used."""
        found: dict[tuple[Any, ...], tuple[int, int]] = {}
        for reshard in self.sharded.reshards:
            if reshard.op == OUTPUT:
                continue
            key = key_of(self.sharded, reshard)
            now = self.work.at[reshard.op]
            first, last = found.get(key, (now, now))
            found[key] = (min(first, now), max(last, now))
        return found
