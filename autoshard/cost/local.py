"""Bytes of a program's values on one device."""

from __future__ import annotations

import numpy as np

from autoshard.cost.collectives import Meshes, Vector
from autoshard.cost.work import Work
from autoshard.plan.sharded import ShardedProgram

_Padding = tuple[tuple[int, tuple[str, ...]], ...]
"""Sizes of dims that are padded, and the axes that shard them."""


class LocalBytes:
    """Bytes of a value on one device, in one microbatch, padding included.

    Args:
        sharded: The program with a layout.
        work: Its facts, from `analyse`.
    """

    def __init__(self, sharded: ShardedProgram, work: Work) -> None:
        self._values, self._batched = sharded.traced.program.values, work.batched
        self._padded = _padded(sharded)

    def __call__(
        self, value: int, axes: frozenset[str], meshes: Meshes, cuts: Vector
    ) -> Vector:
        """Of some meshes.

        Args:
            value: Its index.
            axes: That shard it.
            meshes: The candidates.
            cuts: float64[candidate]; microbatches of each.
        """
        whole = self.unpadded(value, axes, meshes, cuts)
        for size, dim in self._padded.get(value, ()):
            rest = frozenset(dim) - axes
            if len(rest) < len(dim):
                ways = meshes.product(frozenset(dim))
                larger = np.ceil(size / ways) * ways / size
                # Of the whole dim, but for axes of one device.
                whole = whole * np.where(meshes.product(rest) > 1, 1.0, larger)
        return whole

    def unpadded(
        self, value: int, axes: frozenset[str], meshes: Meshes, cuts: Vector
    ) -> Vector:
        """The same without padding."""
        whole = self._values[value].bytes_ / meshes.product(axes)
        return whole / cuts if self._batched[value] else whole

    def like(self, value: int) -> object:
        """What those of a value hang on, beside axes, meshes and microbatches."""
        whole = self._values[value].bytes_, self._batched[value]
        return *whole, self._padded.get(value, ())


def _padded(sharded: ShardedProgram) -> dict[int, _Padding]:
    """Dims per value that some mesh does not divide: those of no power of two."""
    loose = {(n, axes) for n, axes in sharded.padded if n & (n - 1)}
    found: dict[int, _Padding] = {}
    if not loose:
        return found
    values = sharded.traced.program.values
    for value, spec in zip(values, sharded.specs, strict=True):
        pads = [p for p in zip(value.shape, spec, strict=True) if p in loose]
        if pads:
            found[value.index] = tuple(pads)
    return found
