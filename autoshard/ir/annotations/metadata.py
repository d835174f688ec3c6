"""NNX metadata: `out_sharding`, `sharding_rules`, `optimizer_sharding`."""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.core import spmd
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec

from autoshard.ir.annotations.entry import Entry, mapped
from autoshard.ir.annotations.names import WORDS, Words, spec_dims, split_names
from autoshard.ir.errors import InputError

PLAIN = "nnx out_sharding"
RULES = "nnx sharding_rules"
OPTIMIZER = "nnx optimizer_sharding"


def read_variable(
    variable: Any,
    path: str,
    shape: tuple[int, ...],
    words: Words = WORDS,
    *,
    factored: bool = False,
) -> Entry:
    """Reads the sharding metadata of a variable.

    Args:
        variable: An `nnx.Variable`.
        path: Its path.
        shape: Shape of its array.
        words: Which names are mesh axes.
        factored: Whether metadata that does not fit the array says nothing, rather
            than being an error.

    Raises:
        InputError: The annotation does not fit the array.
    """
    meta = variable.get_metadata()
    entry = Entry(PLAIN)
    if "sharding_metadata" in meta:
        given = meta["sharding_metadata"]
        sentence = (
            f"sharding_metadata={given!r} of {path}: flax stores it and reads it "
            f"nowhere. Write out_sharding={given!r}."
        )
        entry.lost.append(("nnx sharding_metadata", sentence))
    sharding = meta.get("out_sharding")
    if isinstance(variable, nnx.OptState) and "opt_sharding" in meta:
        sharding = meta["opt_sharding"]
        entry.kind = OPTIMIZER
    if sharding is None or (isinstance(sharding, tuple) and not sharding):
        if meta.get("sharding_rules"):
            sentence = (
                f"sharding_rules={meta['sharding_rules']!r} of {path} has no "
                "out_sharding whose names it could map. Add out_sharding=(...)."
            )
            entry.lost.append((RULES, sentence))
        return entry
    loose = factored or isinstance(variable, nnx.OptState)
    _read(entry, sharding, meta, path, shape, words, factored=loose)
    return entry


def read_optimizer(
    variable: Any, path: str, shape: tuple[int, ...], words: Words = WORDS
) -> Entry | None:
    """What the metadata of a parameter says of its optimizer state, or None."""
    meta = variable.get_metadata()
    for key in ("optimizer_sharding", "opt_sharding"):
        if meta.get(key) is not None:
            entry = Entry(OPTIMIZER)
            _read(entry, meta[key], meta, f"{key} of {path}", shape, words)
            entry.kind = OPTIMIZER
            if key == "opt_sharding":
                entry.hints.append(
                    f"opt_sharding of {path}: flax itself reads optimizer_sharding; "
                    "write that, and nnx.Optimizer honours it too."
                )
            return entry
    return None


def _read(
    entry: Entry,
    sharding: Any,
    meta: dict[str, Any],
    path: str,
    shape: tuple[int, ...],
    words: Words,
    *,
    factored: bool = False,
) -> None:
    if isinstance(sharding, Format):
        sharding = sharding.sharding
    rules = _rules(meta, path)
    if isinstance(sharding, NamedSharding | PartitionSpec):
        spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
        entry.dims = spec_dims([rules.get(a, a) for a in spec], len(shape), path)
    elif isinstance(sharding, tuple | list):
        if len(sharding) != len(shape):
            if factored:
                return
            raise InputError(
                f"annotation {tuple(sharding)} of parameter {path!r} names "
                f"{len(sharding)} dims, but its shape is {shape}; give one name per "
                "dim, None for a dim without a name."
            )
        _read_names(entry, tuple(sharding), rules, path, words)
    else:
        raise InputError(
            f"out_sharding={sharding!r} of {path}: write a tuple of names, a "
            "PartitionSpec, a NamedSharding or a Format."
        )
    if rules:
        entry.kind = RULES if meta.get("sharding_rules") else entry.kind
        entry.hints.append(mapped(entry.kind, tuple(rules.items())))


def _read_names(
    entry: Entry,
    names: tuple[Any, ...],
    rules: dict[Any, Any],
    path: str,
    words: Words,
) -> None:
    left = tuple(None if name in rules else name for name in names)
    logical, dims = split_names(left, path, words)
    if any(name in rules for name in names):
        mesh = dims or tuple(() if n is None else None for n in logical)
        aimed = spec_dims([rules.get(n) for n in names], len(names), path)
        dims = tuple(
            to if name in rules else old
            for name, old, to in zip(names, mesh, aimed, strict=True)
        )
    entry.logical = logical if any(logical) else None
    entry.dims = dims
    if entry.dims is None and entry.logical is None:
        entry.logical = logical


def _rules(meta: dict[str, Any], path: str) -> dict[Any, Any]:
    own, context = meta.get("sharding_rules") or (), spmd.get_logical_axis_rules()
    found = dict(context)
    for name, axes in own:
        if found.setdefault(name, axes) != axes:
            raise InputError(
                f"{path}: sharding_rules maps {name!r} to {axes!r}, the logical axis "
                f"rules in force to {found[name]!r}. Keep one of the two."
            )
    return found
