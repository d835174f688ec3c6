"""Linen's boxes: `nn.Partitioned`, `nn.LogicallyPartitioned`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from flax.linen import spmd

from autoshard.ir.annotations.entry import Entry, mapped
from autoshard.ir.annotations.names import WORDS, Words, spec_dims, split_names
from autoshard.ir.errors import InputError

MESH = "nn.Partitioned"
LOGICAL = "nn.LogicallyPartitioned"


def read_box(
    box: Any,
    path: str,
    shape: tuple[int, ...],
    rules: tuple[tuple[str, Any], ...],
    words: Words = WORDS,
    *,
    factored: bool,
) -> Entry:
    """Reads one box.

    Args:
        box: A `flax.core.meta.AxisMetadata`.
        path: Path of the boxed leaf.
        shape: Shape of the boxed array.
        rules: Flax rules in force, for boxes without rules of their own.
        words: Which names are mesh axes.
        factored: Whether a box that does not fit the array says nothing, rather than
            being an error.

    Raises:
        InputError: The box names more dims than the array has.
    """
    if not isinstance(box, nn.Partitioned):
        name = type(box).__name__
        sentence = (
            f"{path} is in a {name}, a box that autoshard does not know; use "
            "flax.linen.with_partitioning or with_logical_partitioning."
        )
        return Entry(name, lost=[(name, sentence)])
    logical = isinstance(box, nn.LogicallyPartitioned)
    kind = LOGICAL if logical else MESH
    names = tuple(box.names)
    if len(names) > len(shape):
        if factored:
            return Entry(kind)
        raise InputError(
            f"annotation {names} of {path!r} ({kind}) names {len(names)} dims, but its "
            f"shape is {shape}; give one name per dim, None for a dim without a name."
        )
    names += (None,) * (len(shape) - len(names))
    where = f"{path} ({kind})"
    if not logical:
        found, dims = split_names(names, where, words, prefer_mesh=True)
        if dims is None and not any(found):
            dims = spec_dims(names, len(shape), where)  # replicated, and meant to be
        return Entry(kind, found if any(found) else None, dims)
    own = tuple(getattr(box, "rules", None) or rules)
    if own:
        spec = spmd.logical_to_mesh_axes(names, own)
        assert spec is not None
        dims = spec_dims(spec, len(shape), where)
        return Entry(kind, None, dims, hints=[mapped(kind, own)])
    found, dims = split_names(names, where, words)
    return Entry(kind, found, dims)
