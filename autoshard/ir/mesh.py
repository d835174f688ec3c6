"""Mesh axes and specs: how a value lies on a mesh."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jax.sharding import PartitionSpec

from autoshard.ir.errors import NameUnknownError

AXES: tuple[str, ...] = ("stage", "data", "fsdp", "expert", "context", "tensor")
"""Canonical mesh axes, the one on the slowest network first."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "batch": "data",
        "cp": "context",
        "dp": "data",
        "ep": "expert",
        "model": "tensor",
        "mp": "tensor",
        "pipe": "stage",
        "pp": "stage",
        "replica": "data",
        "seq": "context",
        "sequence": "context",
        "sp": "context",
        "tp": "tensor",
    }
)
"""What other code calls the canonical axes."""


def check_axis(axis: str, where: str) -> None:
    """Raises `NameUnknownError` when `axis` is not a canonical mesh axis."""
    if axis not in AXES:
        raise NameUnknownError(
            f"{where}: unknown mesh axis {axis!r}; the mesh axes are {', '.join(AXES)}."
        )


def arranged(order: Iterable[str]) -> tuple[str, ...]:
    """All axes as they are laid out, the outermost first.

    Args:
        order: Some of them, in the order wanted. They share the places that they have
            in `AXES`; all others stay where they are there.

    >>> arranged(["tensor", "fsdp"])
    ('stage', 'data', 'tensor', 'expert', 'context', 'fsdp')
    """
    wanted = list(order)
    named = iter(wanted)
    return tuple(next(named) if axis in wanted else axis for axis in AXES)


def canonical_axis(axis: str, aliases: Mapping[str, str], where: str) -> str:
    """The canonical mesh axis a user's name stands for.

    Args:
        axis: The name the user wrote.
        aliases: The strategy's own names, which go before `ALIASES`.
        where: What to name in the error.

    Returns:
        One of `AXES`.

    Raises:
        NameUnknownError: Neither an axis nor an alias, or an alias of no axis.

    >>> canonical_axis("tp", {}, "params/w"), canonical_axis("x", {"x": "data"}, "w")
    ('tensor', 'data')
    """
    if axis in aliases:
        target = aliases[axis]
        check_axis(target, f"{where}: mesh axis {axis!r} stands for {target!r}")
        return target
    if axis in AXES:
        return axis
    if axis in ALIASES:
        return ALIASES[axis]
    known = sorted({*AXES, *ALIASES, *aliases})
    close = difflib.get_close_matches(axis, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise NameUnknownError(
        f"{where}: unknown mesh axis {axis!r}; the mesh axes are {', '.join(AXES)}, "
        f"and {', '.join(sorted(ALIASES))} are known to stand for one of them.{hint} "
        f'Say what it is in the strategy: [aliases] {axis} = "data".'
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
