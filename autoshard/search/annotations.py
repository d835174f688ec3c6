"""Annotations that cannot be honoured are errors, with path or source line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any

from autoshard.ir.annotations.names import LOGICAL
from autoshard.ir.errors import InputError, NameUnknownError
from autoshard.ir.mesh import AXES
from autoshard.ir.seeds import Seed, written
from autoshard.ir.trace import Traced
from autoshard.plan.sharded import RESIDUAL
from autoshard.plan.strategy import Strategy


def _annotated(traced: Traced) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    for info in traced.inputs:
        if info.state != "data" and any(info.logical):
            yield f"parameter {info.path}", info.shape, info.logical
    for op in traced.program.ops:
        if op.primitive == "autoshard_annotate" and op.params["names"] is not None:
            shape = traced.program.values[op.outputs[0]].shape
            where = f"{op.params['kind']} at {op.source or op.address}"
            yield where, shape, op.params["names"]


def check_annotations(traced: Traced, strategy: Strategy) -> tuple[str, ...]:
    """Checks every annotation of a program against a strategy.

    Returns:
        What annotations ask for and the strategy's mesh does not have, in words.

    Raises:
        NameUnknownError: A logical axis that neither the strategy nor autoshard knows,
            or a mesh axis that stands for none.
        InputError: An annotation did not reach the jaxpr; two dims of one array want
            the same mesh axis; a fixed size of the mesh does not divide an input.
    """
    traced.annotations.check()
    _check_names(traced, strategy)
    return tuple(dict.fromkeys(_check_seeds(traced, strategy)))


def _check_seeds(traced: Traced, strategy: Strategy) -> Iterator[str]:
    inputs = dict(zip(traced.program.inputs, traced.inputs, strict=True))
    for given in traced.seeds:
        seed = given.canonical(strategy.aliases)
        if seed.value in inputs:
            _check_divides(given, seed, inputs[seed.value].shape, strategy)
        for axis in (axis for dim in seed.dims for axis in dim or ()):
            if strategy.mesh.get(axis, 1) == 1:
                yield (
                    f"{given.origin} asks for mesh axis {axis!r}, which strategy "
                    f"{strategy.name!r} leaves at size 1"
                )


def _check_divides(
    given: Seed, seed: Seed, shape: tuple[int, ...], strategy: Strategy
) -> None:
    for d, (axes, size) in enumerate(zip(seed.dims, shape, strict=True)):
        fixed = {
            a: n for a in axes or () if isinstance(n := strategy.mesh.get(a, 1), int)
        }
        ways = math.prod(fixed.values())
        if size % ways:
            listed = " x ".join(f"{a} = {n}" for a, n in fixed.items())
            raise InputError(
                f"{given.origin} of shape {tuple(shape)} asks for "
                f"{written(given.dims)}: dim {d} of size {size} is not divisible by "
                f"{ways} ({listed} in strategy {strategy.name!r}), and an input cannot "
                "be padded. Change the size of the dim or of the axis, or leave the "
                "dim out of the annotation."
            )


def _check_names(traced: Traced, strategy: Strategy) -> None:
    rules = {
        r.logical: r.axes for r in strategy.rules if not r.logical.endswith(RESIDUAL)
    }
    bases = {r.logical.removesuffix(RESIDUAL) for r in strategy.rules}
    known = LOGICAL | bases
    for where, shape, names in _annotated(traced):
        taken: dict[str, str] = {}
        for name in names:
            if name is None:
                continue
            if name not in known:
                raise NameUnknownError(
                    _unknown(where, shape, names, name, known, strategy)
                )
            axes = rules.get(name, ())
            for axis in () if axes == "auto" else axes:
                if axis in taken and strategy.mesh.get(axis) != 1:
                    raise InputError(
                        f"{where} of shape {tuple(shape)} is annotated {names}: "
                        f"{taken[axis]!r} and {name!r} both shard over mesh axis "
                        f"{axis!r} (strategy {strategy.name!r}), and an axis can shard "
                        "only one dim of an array. Rename one dim, or give one of "
                        "them another rule."
                    )
                taken[axis] = name


def _unknown(
    where: str,
    shape: Any,
    names: Any,
    name: str,
    known: frozenset[str],
    strategy: Strategy,
) -> str:
    close = difflib.get_close_matches(name, sorted({*known, *AXES}), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"{where} of shape {tuple(shape)} is annotated {names}, but no rule of "
        f"strategy {strategy.name!r} names the logical axis {name!r}, and it is none "
        f"of {', '.join(sorted(known))}.{hint} If the dim is never sharded, annotate "
        f"it None, or say so in the strategy: [rules] {name} = []. If it is a mesh "
        f'axis, say which one: [aliases] {name} = "data".'
    )
