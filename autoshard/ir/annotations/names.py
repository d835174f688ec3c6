"""Telling logical axes from mesh axes, and reading partition specs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import PartitionSpec

from autoshard.ir.errors import InputError
from autoshard.ir.mesh import ALIASES, AXES

Dims = tuple[tuple[str, ...] | None, ...]
"""Mesh axes per dim as a user named them; `()` is closed, `None` open."""

Names = tuple[str | None, ...]
"""Logical axis per dim."""

LOGICAL = frozenset(
    {
        "batch", "seq", "embed", "heads", "kv_heads", "head_dim", "qkv", "mlp", "vocab",
        "expert", "layers", "position",
    }
)  # fmt: skip
"""Logical axes that need no rule of a strategy; without one they shard nothing."""


@dataclass(frozen=True, slots=True)
class Words:
    """Which names are logical axes and which are mesh axes.

    Attributes:
        logical: Logical axes, beside `LOGICAL`.
        aliases: Names of mesh axes, beside `AXES` and `ALIASES`.

    >>> words = Words()
    >>> words.is_mesh("tp"), words.is_mesh("embed"), words.is_mesh("expert")
    (True, False, False)
    """

    logical: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def is_mesh(self, name: str, *, prefer_mesh: bool = False) -> bool:
        """Whether a name is a mesh axis.

        A name that could be either (`expert`) is logical, unless `prefer_mesh` says
        that it stands in a place for mesh axes.
        """
        mesh = name in AXES or name in ALIASES or name in self.aliases
        logical = name in LOGICAL or name in self.logical
        return (mesh or not logical) if prefer_mesh else (mesh and not logical)


WORDS = Words()
"""Those that autoshard knows by itself."""


def split_names(
    names: Sequence[Any],
    where: str,
    words: Words = WORDS,
    *,
    prefer_mesh: bool = False,
) -> tuple[Names, Dims | None]:
    """Splits the names of an array's dims into logical axes and mesh axes.

    Args:
        names: Per dim a name, None, `PartitionSpec.UNCONSTRAINED`, or several mesh
            axes as a tuple.
        where: What to name in the error.
        words: Which names are which.
        prefer_mesh: Whether a name that could be either is a mesh axis.

    Returns:
        Logical axis per dim, and mesh axes per dim. The latter is None when no name is
        a mesh axis; else a dim without a name is closed, one with a logical axis open.

    Raises:
        InputError: Two logical axes name one dim, or one names two dims.

    >>> split_names(("embed", "mlp"), "w")
    (('embed', 'mlp'), None)
    >>> split_names(("fsdp", None, "heads"), "w")
    ((None, None, 'heads'), (('fsdp',), (), None))
    """
    found: list[str | None] = []
    dims: list[tuple[str, ...] | None] = []
    for entry in names:
        several: tuple[str, ...] = _several(entry)
        mesh = [words.is_mesh(name, prefer_mesh=prefer_mesh) for name in several]
        if several and not any(mesh):
            if len(several) > 1:
                raise InputError(
                    f"{where} is annotated {tuple(names)}: {several} names one dim "
                    "twice. Give the dim one logical axis; which mesh axes shard it is "
                    "what a strategy's rule for that axis says."
                )
            found += several
            dims.append(None)
        elif not all(mesh):
            raise InputError(
                f"{where} is annotated {tuple(names)}: {several} mixes mesh axes with "
                "logical axes in one dim. Write one logical axis, or mesh axes only."
            )
        else:
            found.append(None)
            dims.append(None if entry is PartitionSpec.UNCONSTRAINED else several)
    given = [name for name in found if name is not None]
    if len(given) != len(set(given)):
        raise InputError(
            f"{where} is annotated {tuple(names)}: a logical axis names two dims; one "
            "mesh axis cannot shard two dims of one array. Rename one of them."
        )
    return tuple(found), tuple(dims) if any(dims) else None


def _several(entry: Any) -> tuple[str, ...]:
    if isinstance(entry, str):
        return (entry,)
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    if isinstance(entry, tuple | list) and all(isinstance(e, str) for e in entry):
        return tuple(entry)
    raise InputError(
        f"an annotation names a dim {entry!r}; a dim takes an axis, several as a "
        "tuple, None, or PartitionSpec.UNCONSTRAINED."
    )


def spec_dims(spec: Iterable[Any], rank: int, where: str) -> Dims:
    """Mesh axes per dim of a partition spec.

    Args:
        spec: A `PartitionSpec`, or its entries.
        rank: Number of dims of the array; missing entries are closed.
        where: What to name in the error.

    Raises:
        InputError: The spec has more entries than the array has dims, or leaves
            partial sums.

    >>> spec_dims(PartitionSpec(PartitionSpec.UNCONSTRAINED, ("fsdp", "tp")), 3, "w")
    (None, ('fsdp', 'tp'), ())
    """
    if getattr(spec, "unreduced", None):
        raise InputError(
            f"{where}: {spec} asks for partial sums. Leave `unreduced` out; where a "
            "sum is delayed is decided by the search."
        )
    entries = list(spec)
    if len(entries) > rank:
        raise InputError(
            f"{where}: {spec} has {len(entries)} entries, but the array has {rank} "
            "dims; give at most one entry per dim."
        )
    dims: list[tuple[str, ...] | None] = []
    for entry in entries:
        is_open = entry is PartitionSpec.UNCONSTRAINED
        dims.append(None if is_open else _several(entry))
    return (*dims, *[()] * (rank - len(dims)))
