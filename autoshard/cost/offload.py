"""What is kept in the host's memory: what is moved for it, and what of that shows.

Three kinds can be kept there. Optimizer state comes in for the update and goes out
after it (ZeRO-Offload, Ren et al. 2021, arXiv:2101.06840; the update itself stays on
the chip). Parameters come in for every pass that uses them, in every microbatch, and
for the update, after which they go out (ZeRO-Infinity, Rajbhandari et al. 2021,
arXiv:2104.07857). Activations that are kept for the backward pass go out after the
forward pass of their block and come in for its backward pass.

Each is moved piece by piece: what one block has or, of what belongs to no block, what
one parameter has. The chip holds two pieces, one in use and one that is coming or
going, and three in the update, where state comes in and goes out at once.

A step has three phases: the forward passes, the backward passes, and the update. Within
one, pieces come in, are computed with, and go out, each of the three beside the other
two. With pieces that are alike that takes what the longest of the three takes, and of
the two others one piece each, before the first can be used and after the last has been:

    phase = longest + (compute + in + out - longest) * piece / whole

What a phase takes beyond its computation shows. Transfers are not set against
computation of another phase, nor against what collectives leave the chip waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autoshard.cost.collectives import Vector
from autoshard.cost.segments import BLOCK
from autoshard.cost.stages import PLACES, Table
from autoshard.cost.work import Work
from autoshard.ir.build import is_transposed
from autoshard.ir.trace import Traced
from autoshard.plan.cluster import Cluster

Offload = tuple[str, ...]
"""Kinds of `plan.strategy.OFFLOADABLE` that are kept in the host's memory."""

HOST_HEADROOM = 0.9
"""Share of the host's memory that may be used; the rest is the system, what feeds the
chips, and copies that are being saved."""

HELD_PIECES = 2
"""One in use, one on its way."""

UPDATED_PIECES = 3
"""One in use, one coming in, one going out."""


@dataclass(frozen=True, slots=True)
class Held:
    """One kind of what can be offloaded, on one device.

    Attributes:
        bytes_: All of it, of one microbatch, by place of `segments`, float64[place,
            candidate].
        forward: Of these, what the forward pass of one microbatch reads.
        backward: What its backward pass reads.
        of_block: Bytes of one block, float64[candidate].
        largest: Bytes of the largest piece that belongs to no block, by place.
    """

    bytes_: Table
    forward: Table
    backward: Table
    of_block: Vector
    largest: Table

    def host_bytes(
        self, share: Table | None = None, waiting: Vector | None = None
    ) -> Vector:
        """Bytes in the host's memory of a chip that has a share of each place.

        Args:
            share: Of a pipeline stage; everything where it is None.
            waiting: Microbatches beyond the current one of which there is the same.
        """
        held = self.bytes_ if share is None else self.bytes_ * share
        return held.sum(axis=0) * (1.0 if waiting is None else 1.0 + waiting)

    def piece(self, share: Table | None = None) -> Vector:
        """Bytes of the largest piece of a chip that has a share of each place."""
        largest = self.largest if share is None else self.largest * share
        return np.maximum(self.of_block, largest.max(axis=0))


def host_room_bytes(cluster: Cluster) -> float:
    """Bytes of the host's memory that a chip may use.

    Raises:
        InputError: The chip has no such figure.
    """
    return cluster.host_memory_bytes * HOST_HEADROOM


def host_bytes(
    held: Mapping[str, Held], share: Table | None = None, waiting: Vector | None = None
) -> dict[str, Vector]:
    """Bytes in the host's memory of one chip, by kind; see `Liveness.memory`."""
    return {
        kind: own.host_bytes(share, waiting if kind == "activations" else None)
        for kind, own in held.items()
    }


class Offloading:
    """Finds what of a program could be offloaded.

    Args:
        traced: The program, traced without microbatches.
        work: Its facts, from `analyse`.
    """

    def __init__(self, traced: Traced, work: Work) -> None:
        self.work = work
        self.program = traced.program
        self.inputs = list(zip(self.program.inputs, traced.inputs, strict=True))

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of which the program has something."""
        states = {info.state for _, info in self.inputs}
        found = states & {"params", "optimizer"}
        return frozenset(found | ({"activations"} if self.stashed else set()))

    @property
    def stashed(self) -> frozenset[int]:
        """Values that blocks keep for the backward pass."""
        return self.work.segments.stashed

    def leaves(self, kind: str) -> list[int]:
        """The arguments of a state."""
        return [v for v, info in self.inputs if info.state == kind]

    def held(self, sizes: Mapping[int, Vector], count: int) -> Held:
        """What values of one kind take and how they are moved.

        Args:
            sizes: Bytes of each on one device, by value, float64[candidate].
            count: Candidates.
        """
        segments = self.work.segments
        blocks = segments.blocks if not segments.why else 0
        bytes_, forward, backward, largest = np.zeros((4, PLACES, count))
        of_block = np.zeros(count)
        whole: dict[str, tuple[int, Vector]] = {}
        for v, size in sizes.items():
            place, all_bytes = segments.of_value[v], size * self.work.alike[v]
            bytes_[place] += all_bytes
            forward[place] += all_bytes * self._passes[v, False]
            backward[place] += all_bytes * self._passes[v, True]
            if place == BLOCK and blocks:
                of_block += all_bytes / blocks
            else:
                key = self._parameter.get(v, str(v))
                _, before = whole.get(key, (place, 0.0))
                whole[key] = place, before + size
        for place, size in whole.values():
            largest[place] = np.maximum(largest[place], size)
        return Held(bytes_, forward, backward, of_block, largest)

    @cached_property
    def _parameter(self) -> dict[int, str]:
        """The parameter that an argument is, or that optimizer state is of, by path."""
        names = [
            info.path.removeprefix("params").removeprefix("/")
            for _, info in self.inputs
            if info.state == "params"
        ]
        found: dict[int, str] = {}
        for v, info in self.inputs:
            # A model may be one array, which has no name.
            ends = [n for n in names if not n or f"/{info.path}".endswith(f"/{n}")]
            if ends and info.state in ("params", "optimizer"):
                found[v] = max(ends, key=len)
        return found

    @cached_property
    def _passes(self) -> Mapping[tuple[int, bool], bool]:
        """Whether a value is read forward, or backward, by value and direction.

        What is handed on in another dtype or layout is read where that is.
        """
        found = {
            (v, back): False
            for v in range(len(self.program.values))
            for back in (False, True)
        }
        passing = (
            *("convert_element_type", "transpose", "copy", "optimization_barrier"),
            *("link", "autoshard_annotate"),
        )
        for op in reversed(self.program.ops):
            if self.work.update[op.index]:
                continue
            back = is_transposed(op)
            for v in op.inputs:
                if v < 0:
                    continue
                if op.primitive in passing:
                    for way in (False, True):
                        found[v, way] |= any(found[out, way] for out in op.outputs)
                else:
                    found[v, back] = True
        return found


def shown_s(compute_s: Vector, in_s: Vector, out_s: Vector, part: Vector) -> Vector:
    """Seconds by which transfers make a phase longer than its computation.

    Args:
        compute_s: Of the phase's computation.
        in_s: Of what comes in.
        out_s: Of what goes out.
        part: Share of one piece in the whole.

    >>> one = np.ones(1)
    >>> shown_s(one, 3 * one, 0 * one, one / 2).tolist()
    [2.5]
    """
    longest = np.maximum(np.maximum(compute_s, in_s), out_s)
    return longest - compute_s + part * (compute_s + in_s + out_s - longest)


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of a step's computation.

    Attributes:
        forward: Of the forward passes of all microbatches, float64[candidate].
        backward: Of the backward passes, what they recompute included.
        update: Of the update.
    """

    forward: Vector
    backward: Vector
    update: Vector


def transfers_s(
    held: Mapping[str, Held],
    phases: Phases,
    cluster: Cluster,
    cuts: Vector,
    stages: Vector,
) -> tuple[Table, Table]:
    """Seconds of a step in which transfers show, by place: [place, candidate].

    What shows of a phase is spread over the places in proportion to what they move.
    While data comes or goes, the chip's own memory serves it rather than the kernels.

    Args:
        held: What is offloaded, by kind.
        phases: Of the computation, all blocks on every chip.
        cluster: Where.
        cuts: Microbatches.
        stages: Of a pipeline: each has its own first piece to wait for.

    Returns:
        Of all phases; of these, of the update.
    """
    nothing = np.zeros((PLACES, len(cuts)))

    def bytes_of(kind: str, field: str) -> Table:
        return getattr(held[kind], field) if kind in held else nothing

    params, state = bytes_of("params", "bytes_"), bytes_of("optimizer", "bytes_")
    kept = bytes_of("activations", "bytes_") * cuts
    forward = bytes_of("params", "forward") * cuts
    backward = bytes_of("params", "backward") * cuts
    steps = (
        (phases.forward, forward, kept, ("params", "activations")),
        (phases.backward, backward + kept, nothing, ("params", "activations")),
        (phases.update, params + state, params + state, ("params", "optimizer")),
    )
    found = []
    for compute_s, into, out, kinds in steps:
        moved = into + out
        whole = np.maximum(moved.sum(axis=0), np.finfo(float).tiny)
        slower_s = compute_s + whole / cluster.hbm_bytes_per_s
        shown = slower_s - compute_s
        shown += shown_s(
            slower_s,
            into.sum(axis=0) / cluster.host_bytes_per_s,
            out.sum(axis=0) / cluster.host_bytes_per_s,
            _part([held[kind] for kind in kinds if kind in held], stages),
        )
        found.append(moved / whole * shown)
    return np.asarray(sum(found)), found[-1]


def _part(held: Sequence[Held], stages: Vector) -> Vector:
    """Share of a piece in what a stage has of its kind, at most."""
    parts = np.zeros(len(stages))
    for kind in held:
        whole = np.maximum(kind.bytes_.sum(axis=0), np.finfo(float).tiny)
        parts = np.maximum(parts, np.minimum(kind.piece() * stages / whole, 1.0))
    return parts
