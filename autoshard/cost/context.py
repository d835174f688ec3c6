"""Attention over a sequence that several devices share: by a ring, or by its heads.

As a program is propagated, every device gathers the keys and values of the whole
sequence: `all_gather`. The other kinds keep them in parts.

- `ring` (Liu et al. 2023, arXiv:2310.01889): of n devices each computes with the keys
  and values of one after the other, which go round in n - 1 steps, each beside 1 / n of
  the kernels. Backward their gradients go round too, a step behind, and one step more
  to get home. Under a causal mask this is balanced if devices have stripes of the
  sequence (Brandon et al. 2023, arXiv:2311.09431), as is assumed.
- `ulysses` (Jacobs et al. 2023, arXiv:2309.14509): all-to-alls make of queries, keys
  and values with a part of the sequence those with a part of the heads, and back of the
  result; backward likewise of the gradients.
- `usp` (Fang and Zhao 2024, arXiv:2405.07719): both; neighbouring devices share the
  heads, and the ring goes over groups of them.

The kernels, and what they hold beside keys and values, are those that were traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoshard.cost.attention import CONTEXT, Pass, Side
from autoshard.cost.collectives import Meshes, Vector
from autoshard.cost.liveness import Buffer
from autoshard.cost.local import LocalBytes
from autoshard.cost.moves import axes_of
from autoshard.cost.work import Work
from autoshard.ir.mesh import AXES

ALL_GATHER, RING, ULYSSES, USP = "all_gather", "ring", "ulysses", "usp"
FREE = "free"
"""No kind, but what none of them is below: nothing is sent, and nothing more held."""
_AT, _BEFORE, _BEHIND = (AXES.index(a) for a in ("context", "expert", "tensor"))

Degrees = np.ndarray[Any, np.dtype[np.int64]]


def ring_s(
    kernels_s: Vector, keys_s: Vector, sums_s: Vector, degree: Vector
) -> tuple[Vector, Vector]:
    """Seconds of all transfers of a ring, and of these what kernels do not hide.

    Keys and values are sent beside the first n - 1 of n steps; their gradients,
    made in a step, beside the next one, and after the last one they go home.

    Args:
        kernels_s: Of the pass on one device.
        keys_s: Of one transfer of keys and values to the next device.
        sums_s: Of one of their gradients; 0 in a forward pass.
        degree: Devices of the ring.

    >>> one = np.ones(1)
    >>> sent, shown = ring_s(4 * one, 3 * one, 0 * one, 4 * one)
    >>> float(sent[0]), float(shown[0])
    (9.0, 6.0)
    """
    step = kernels_s / degree
    late = (
        np.maximum(keys_s - step, 0.0)
        + (degree - 2) * np.maximum(keys_s + sums_s - step, 0.0)
        + np.maximum(sums_s - step, 0.0)
        + sums_s
    )
    sent = (degree - 1) * keys_s + degree * sums_s
    several = degree > 1
    return np.where(several, sent, 0.0), np.where(several, late, 0.0)


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a pass of attention sends in a step of training.

    Attributes:
        op: Its first product.
        kind: `permute` or `all_to_all`.
        value: What is sent, in words.
        bytes_: Of one run on one device.
        runs: Per step.
        time_s: Of all runs.
        shown_s: Of these, what kernels do not hide.
    """

    op: int
    kind: str
    value: str
    bytes_: Vector
    runs: Vector
    time_s: Vector
    shown_s: Vector


class Context:
    """Prices one kind of attention over a sequence in parts.

    Args:
        kind: One of those above; of `all_gather` there are no passes.
        heads: Devices that share heads under `usp`; 0 for as many as is fastest.
        passes: Of attention.
        work: Facts of their program.
        local_bytes: Of a value on one device.
    """

    def __init__(
        self,
        kind: str,
        heads: int,
        passes: Sequence[Pass],
        work: Work,
        local_bytes: LocalBytes,
    ) -> None:
        self.kind = kind
        self.passes = tuple(passes)
        self.heads = heads
        self._work = work
        self._local_bytes = local_bytes
        self.of_op = {op: k for k, one in enumerate(self.passes) for op in one.ops}

    # -- which devices share heads -------------------------------------------------

    def divides(self, sizes: Degrees) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which meshes the heads divide over, bool[mesh].

        Args:
            sizes: int64[mesh, axis] in the order of `AXES`.
        """
        found = np.full(len(sizes), self.kind == FREE)
        for degree in self._degrees(sizes):
            found |= self._can(sizes, degree)
        return found | (sizes[:, _AT] == 1)

    @property
    def heads_and_axes(self) -> tuple[int, tuple[str, ...]]:
        """The fewest heads of a pass, and the mesh axes that divide them anyway."""
        fewest = min(self.passes, key=lambda one: one.heads)
        return fewest.heads, fewest.head_axes

    def _degrees(self, sizes: Degrees) -> Iterator[Degrees]:
        """How many devices may share heads, per mesh, one choice after the other."""
        context = sizes[:, _AT]
        if self.kind == RING:
            yield np.ones_like(context)
        elif self.kind == ULYSSES:
            yield context
        elif self.kind == USP:
            fewest, _ = self.heads_and_axes
            ways = [n for n in range(2, fewest + 1) if fewest % n == 0]
            for degree in [self.heads] if self.heads else ways:
                if ((context % degree == 0) & (context > degree)).any():
                    yield np.full_like(context, degree)

    def _can(
        self, sizes: Degrees, degree: Degrees
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        context = sizes[:, _AT]
        found = context % degree == 0
        if self.kind == USP:
            found &= (degree > 1) & (degree < context)
        for one in self.passes if self.kind != RING else ():
            columns = [AXES.index(axis) for axis in one.head_axes]
            ways = sizes[:, columns].prod(axis=1) * degree
            found &= one.heads % ways == 0
        return found

    # -- time ------------------------------------------------------------------------

    def transfers(
        self, meshes: Meshes, cuts: Vector, kernels_s: Sequence[Vector]
    ) -> tuple[list[Transfer], Degrees]:
        """What is sent, and how many devices share heads.

        Of several numbers of these the fastest is taken, and of those the smallest.

        Args:
            meshes: The candidates.
            cuts: Microbatches of each.
            kernels_s: Seconds in a step of the kernels of each pass.
        """
        best: list[Transfer] = []
        if not self.passes:
            return best, np.ones(len(meshes), dtype=np.int64)
        least = np.full(len(meshes), np.inf)
        chosen = np.ones(len(meshes), dtype=np.int64)
        for degree in self._degrees(meshes.sizes):
            possible = self._can(meshes.sizes, degree) | (meshes.sizes[:, _AT] == 1)
            safe = np.where(possible, degree, 1)
            found = list(self._sent(meshes, cuts, kernels_s, safe))
            shown = sum((each.shown_s for each in found), np.zeros(len(meshes)))
            better = possible & (shown < least)
            least = np.where(better, shown, least)
            chosen = np.where(better & (meshes.sizes[:, _AT] > 1), degree, chosen)
            best = [
                _where(better, new, old)
                for new, old in zip(found, best or found, strict=True)
            ]
        return best, chosen

    def _sent(
        self, meshes: Meshes, cuts: Vector, kernels_s: Sequence[Vector], degree: Degrees
    ) -> Iterator[Transfer]:
        ring = meshes.sizes[:, _AT] // degree
        among = _regrouped(meshes, degree, _BEFORE, ring)
        around = _regrouped(meshes, ring, _BEHIND, degree)

        def bytes_of(side: Side) -> Vector:
            return self._local_bytes(side.value, axes_of(side.spec), meshes, cuts)

        for one, kernels in zip(self.passes, kernels_s, strict=True):
            runs = cuts * self._work.runs[one.op]
            if self.kind != RING:
                for side in one.exchanged:
                    size = bytes_of(side)
                    time = runs * among.time_s("all_to_all", CONTEXT, size)
                    yield Transfer(
                        one.op, "all_to_all", side.name, size, runs, time, time
                    )
            if self.kind != ULYSSES:
                yield from self._ring(one, kernels, runs, ring, around, bytes_of)

    def _ring(
        self,
        one: Pass,
        kernels_s: Vector,
        runs: Vector,
        ring: Degrees,
        around: Meshes,
        bytes_of: Callable[[Side], Vector],
    ) -> Iterator[Transfer]:
        keys, sums = (
            sum(map(bytes_of, sides), np.zeros(len(around)))
            for sides in (one.keys, one.sums)
        )
        keys_s, sums_s = (
            np.where(size > 0, around.time_s("permute", CONTEXT, size), 0.0)
            for size in (keys, sums)
        )
        sent, late = ring_s(kernels_s / runs, keys_s, sums_s, ring.astype(float))
        if around.cluster.kind == "cpu":  # its collectives block
            late = sent
        # Of what does not show both have a part.
        share = np.divide(late, sent, out=np.zeros(len(around)), where=sent > 0)
        home = np.where(ring > 1, ring, 0)
        for name, size, time, steps in (
            ("keys and values", keys, keys_s, ring - 1),
            ("gradients of keys and values", sums, sums_s, home),
        )[: 2 if one.sums else 1]:
            total = runs * steps * time
            yield Transfer(
                one.op, "permute", name, size, runs * steps, total, total * share
            )

    # -- memory ----------------------------------------------------------------------

    def buffers(self) -> tuple[Buffer, ...]:
        """What there is besides keys and values as they lie.

        What was exchanged is held as long as the pass takes it. A ring holds what it
        computes with and what arrives.
        """
        found = []
        for one in self.passes:
            alike = self._work.alike_ops[one.op]

            def held(side: Side, begin: int, end: int, alike: int = alike) -> Buffer:
                ends = self._work.at[begin], self._work.at[end]
                kind = "activations"
                return Buffer(side.value, side.spec, *ends, kind, CONTEXT, alike=alike)

            if self.kind in (ULYSSES, USP):
                found += [held(s, s.first, s.last) for s in one.exchanged]
            if self.kind in (RING, USP):
                last = max(one.ops, key=lambda op: self._work.at[op])
                first = min(one.ops, key=lambda op: self._work.at[op])
                found += [held(s, first, last) for s in (*one.keys, *one.sums)] * 2
        return tuple(found)


def _regrouped(meshes: Meshes, degree: Degrees, beside: int, rest: Degrees) -> Meshes:
    """Meshes with so many devices along `context`, the rest along a neighbour."""
    if (rest == 1).all():
        return meshes
    sizes = meshes.sizes.copy()
    sizes[:, _AT] = degree
    sizes[:, beside] *= rest
    return Meshes(meshes.cluster, sizes)


def _where(rows: Any, new: Transfer, old: Transfer) -> Transfer:
    return Transfer(
        new.op,
        new.kind,
        new.value,
        *(
            np.where(rows, getattr(new, name), getattr(old, name))
            for name in ("bytes_", "runs", "time_s", "shown_s")
        ),
    )
