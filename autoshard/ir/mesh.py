"""Mesh axes and specs: how a value lies on a mesh."""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import PartitionSpec

from autoshard.ir.errors import NameUnknownError

AXES: tuple[str, ...] = ("stage", "data", "fsdp", "expert", "context", "tensor")
"""Canonical mesh axes, the one on the slowest network first."""


def check_axis(axis: str, where: str) -> None:
    """Raises `NameUnknownError` when `axis` is not a canonical mesh axis."""
    if axis not in AXES:
        raise NameUnknownError(
            f"{where}: unknown mesh axis {axis!r}; the mesh axes are {', '.join(AXES)}."
        )


@dataclass(frozen=True, slots=True)
class Spec:
    """Mesh axes per dim of one value.

    Attributes:
        dims: For each dim, the axes that shard it, major first.
        unreduced: Axes over which partial sums are still pending.

    >>> Spec((("data",), (), ("tensor",)))
    Spec[data, -, tensor]
    """

    dims: tuple[tuple[str, ...], ...]
    unreduced: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        used = [axis for dim in self.dims for axis in dim] + list(self.unreduced)
        if len(used) != len(set(used)):
            raise ValueError(f"an axis is used twice in {self!r}")

    @property
    def axes(self) -> frozenset[str]:
        """Every axis that shards some dim."""
        return frozenset(axis for dim in self.dims for axis in dim)

    def to_partition_spec(self) -> PartitionSpec:
        """The same spec in JAX's words; `unreduced` must be empty."""
        assert not self.unreduced, self
        entries = [
            None if not dim else dim[0] if len(dim) == 1 else dim for dim in self.dims
        ]
        while entries and entries[-1] is None:
            entries.pop()
        return PartitionSpec(*entries)

    def __repr__(self) -> str:
        body = ", ".join("+".join(dim) if dim else "-" for dim in self.dims)
        tail = f"; unreduced {'+'.join(self.unreduced)}" if self.unreduced else ""
        return f"Spec[{body}{tail}]"


def replicated(rank: int) -> Spec:
    """A spec of the given rank that shards nothing."""
    return Spec(((),) * rank)
