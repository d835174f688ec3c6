"""Path maps: regular expressions over paths of inputs to mesh axes per dim."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jax.sharding import PartitionSpec

from autoshard.ir.annotations.names import Dims, spec_dims
from autoshard.ir.errors import InputError, NameUnknownError
from autoshard.ir.seeds import Count, Seed

if TYPE_CHECKING:
    from autoshard.ir.trace import InputInfo, Traced

KIND = "path map"
OPEN, REST = "*", "..."

SpecMap = Mapping[str, Any]
"""Regular expression to a `PartitionSpec`, or to one entry per dim: a mesh axis, a list
of them, `""` or `[]` for a closed dim, `"*"` for an open one. A last entry `"..."`
closes all dims that follow, as a `PartitionSpec` does by ending early."""


def seeds_of_paths(inputs: Sequence[InputInfo], specs: SpecMap) -> tuple[Seed, ...]:
    """Seeds of the inputs whose path a regular expression finds.

    Each expression is searched for anywhere in the path, `re.search`; the first that is
    found decides. It holds for the optimizer's state of a parameter too, where the path
    of the parameter is part of its own and the rank is the same.

    Args:
        inputs: The inputs, in the order of the program's.
        specs: Expressions, in order of precedence.

    Returns:
        One seed per input found; its `value` is the position of the input.

    Raises:
        NameUnknownError: An expression finds no path.
        InputError: It is no regular expression, or its entry does not fit an input.

    >>> from autoshard.ir.trace import InputInfo
    >>> w = InputInfo("params/attn/q", (8, 4), "float32", "params", (None, None))
    >>> [seed] = seeds_of_paths([w], {r"attn/(q|k|v)$": PartitionSpec(None, "tensor")})
    >>> seed.dims
    ((), ('tensor',))
    """
    patterns = [(_compiled(text), entry) for text, entry in specs.items()]
    seeds: list[Seed] = []
    found = dict.fromkeys(specs, 0)
    ranks = {
        info.path.removeprefix("params"): len(info.shape)
        for info in inputs
        if info.state == "params"
    }
    for number, info in enumerate(inputs):
        first, rank = True, len(info.shape)
        for pattern, entry in patterns:
            if not pattern.search(info.path):
                continue
            found[pattern.pattern] += 1
            if not first:
                continue
            first = False
            where = f"{KIND} {pattern.pattern!r} of {info.path}"
            if info.state == "optimizer" and any(
                ranks.get(tail, rank) != rank for tail in _tails(info.path)
            ):
                continue  # factored moments have other dims than their parameter
            dims = _dims(entry, info, where)
            if dims is not None:
                seeds.append(Seed(number, dims, KIND, where))
    for text in specs:
        if not found[text]:
            raise NameUnknownError(_nothing(text, inputs))
    return tuple(seeds)


def with_specs(traced: Traced, specs: SpecMap) -> Traced:
    """The same program with the seeds of a path map, counted in its report.

    Raises:
        NameUnknownError: An expression finds no path.
        InputError: See `seeds_of_paths`.
    """
    if not specs:
        return traced
    seeds = tuple(
        replace(seed, value=traced.program.inputs[seed.value])
        for seed in seeds_of_paths(traced.inputs, specs)
    )
    others = [c for c in traced.annotations.counts if c.kind != KIND]
    total = traced.annotations.reached.get(KIND, 0) + len(seeds)
    counts = (*others, Count(KIND, total, total))
    return replace(
        traced,
        # What is said last and from outside of the program goes first.
        seeds=(*seeds, *traced.seeds),
        annotations=replace(traced.annotations, counts=counts),
    )


def _tails(path: str) -> Iterator[str]:
    """A path from each of its slashes on, and nothing of it."""
    at = path.find("/")
    while at >= 0:
        yield path[at:]
        at = path.find("/", at + 1)
    yield ""


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(
            f"the path map's {text!r} is no regular expression: {error}."
        ) from error


def _dims(entry: Any, info: InputInfo, where: str) -> Dims | None:
    if not isinstance(entry, PartitionSpec):
        if isinstance(entry, str) or not isinstance(entry, Sequence):
            raise InputError(
                f"{where}: {entry!r} is no list; give one entry per dim, such as "
                f'["", "tensor"].'
            )
        if entry and entry[-1] == REST:
            entry = (*entry[:-1], *[""] * (len(info.shape) - len(entry) + 1))
        entry = [
            PartitionSpec.UNCONSTRAINED if e == OPEN else (e if e else None)
            for e in entry
        ]
    elif len(entry) < len(info.shape):  # JAX leaves the dims that follow whole
        entry = (*entry, *[None] * (len(info.shape) - len(entry)))
    given = len(entry)
    if given and given != len(info.shape):
        if info.state == "optimizer":
            return None  # factored moments have other dims than their parameter
        raise InputError(
            f"{where} has {given} entries, but the array has shape {info.shape}: give "
            f"{len(info.shape)}, one per dim, or a narrower expression."
        )
    return spec_dims(entry, len(info.shape), where)


def _nothing(text: str, inputs: Sequence[InputInfo]) -> str:
    paths = [info.path for info in inputs]
    close = difflib.get_close_matches(text, paths, n=3, cutoff=0.3) or paths[:3]
    return (
        f"the path map's {text!r} finds no input. It is searched for anywhere in the "
        f"path of each (re.search). Close paths: {', '.join(close)}."
    )
