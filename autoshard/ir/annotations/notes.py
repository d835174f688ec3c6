"""Annotations that inputs carry: boxes, metadata and shardings, as `Note`s."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from flax.core import meta, spmd
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from autoshard.ir.annotations import linen, metadata
from autoshard.ir.annotations.calls import explicit_axes
from autoshard.ir.annotations.names import WORDS, Dims, Names, Words, spec_dims

SHARDING = "NamedSharding"


@dataclass(frozen=True, slots=True)
class Note:
    """What an annotation says of one leaf of an argument.

    Attributes:
        kind: The kind, in the user's words.
        logical: Logical axis per dim, or None when it names none.
        dims: Mesh axes per dim, or None when it names none.
        counted: Whether it is one the user wrote, rather than one that follows.
    """

    kind: str
    logical: Names | None
    dims: Dims | None
    counted: bool = True


@dataclass
class Reading:
    """The notes of a pytree.

    Attributes:
        notes: By flat index of the leaf.
        lost: Kind of what carries no meaning although it was meant to, and a sentence
            on how to keep it.
        hints: Spellings to change, in words.
    """

    notes: dict[int, list[Note]] = field(default_factory=dict)
    lost: list[tuple[str, str]] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def add(self, leaf: int, note: Note) -> None:
        """Adds a note of one leaf."""
        self.notes.setdefault(leaf, []).append(note)


def holders(tree: Any) -> Iterator[tuple[int, Any, Any]]:
    """The boxes and variables of a pytree: first flat leaf, key path, object."""
    at = 0

    def is_holder(x: Any) -> bool:
        return isinstance(x, meta.AxisMetadata | nnx.Variable)

    for path, item in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_holder)[0]:
        if is_holder(item):
            yield at, path, item
            at += len(jax.tree.leaves(item))
        else:
            at += 1


def read(
    tree: Any,
    prefix: str,
    words: Words = WORDS,
    *,
    factored: Callable[[str], bool] = lambda _: False,
) -> Reading:
    """Reads the annotations of a pytree of arguments, before it is made abstract.

    Args:
        tree: Any pytree; leaves are arrays or `jax.ShapeDtypeStruct`s.
        prefix: Path of the pytree, with a closing `/` unless empty.
        words: Which names are mesh axes.
        factored: Whether the leaf at a path may have other dims than its annotation,
            as the factored moments of an optimizer have. Such annotations say nothing.

    Raises:
        InputError: An annotation does not fit the array that carries it.
    """
    found = Reading()
    rules = tuple(spmd.get_logical_axis_rules())
    for first, path, holder in holders(tree):
        where = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
        loose = factored(where)
        for leaf, x in enumerate(jax.tree.leaves(holder), start=first):
            shape = tuple(getattr(x, "shape", ()))
            if isinstance(holder, nnx.Variable):
                entry = metadata.read_variable(
                    holder, where, shape, words, factored=loose
                )
            else:
                entry = linen.read_box(
                    holder, where, shape, rules, words, factored=loose
                )
            found.lost += entry.lost
            found.hints += entry.hints
            if entry.says:
                found.add(leaf, Note(entry.kind, entry.logical, entry.dims))
    for leaf, (path, x) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        where = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
        _read_sharding(found, leaf, where or "an argument", x)
    return found


def _read_sharding(found: Reading, leaf: int, where: str, x: Any) -> None:
    sharding: Any = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        if sharding.mesh.size == 1 or _by_default(x, sharding):
            return
        sharding = sharding.spec
    if isinstance(sharding, PartitionSpec):
        dims = spec_dims(sharding, len(x.shape), f"{SHARDING} of {where}")
        found.add(leaf, Note(SHARDING, None, dims))
    elif isinstance(sharding, Sharding) and sharding.num_devices > 1:
        sentence = (
            f"{where} has the sharding {sharding!r}, which names no mesh axes; give "
            "it a jax.sharding.NamedSharding."
        )
        found.lost.append((type(sharding).__name__, sentence))


def _by_default(x: Any, sharding: NamedSharding) -> bool:
    """Whether an array lies whole on every device without anybody having said so.

    That is where JAX puts what is made while a mesh is in force, and what it makes an
    abstract value's type on a mesh with Explicit axes.
    """
    if any(sharding.spec):
        return False
    return isinstance(x, jax.Array) or bool(explicit_axes(sharding.mesh))
