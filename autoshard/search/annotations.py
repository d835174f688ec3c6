"""Annotations that cannot be honoured are errors, with the parameter's path."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from autoshard.ir.errors import InputError, NameUnknownError
from autoshard.ir.mesh import AXES
from autoshard.ir.trace import Traced
from autoshard.plan.schema import Strategy
from autoshard.plan.sharded import RESIDUAL

KNOWN = frozenset(
    {
        "batch", "seq", "embed", "heads", "kv_heads", "head_dim", "qkv", "mlp", "vocab",
        "expert", "layers", "position",
    }
)  # fmt: skip
"""Logical axes that strategies may leave without a rule, which then shards nothing."""


def _annotated(traced: Traced) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    for info in traced.inputs:
        if info.state != "data" and any(info.logical):
            yield f"parameter {info.path}", info.shape, info.logical
    for op in traced.program.ops:
        if op.primitive == "autoshard_annotate" and op.params["names"] is not None:
            shape = traced.program.values[op.outputs[0]].shape
            yield f"annotate at {op.source or op.address}", shape, op.params["names"]


def check_annotations(traced: Traced, strategy: Strategy) -> None:
    """Checks every annotation of a program against a strategy.

    Raises:
        NameUnknownError: A logical axis that neither the strategy nor autoshard knows.
        InputError: Two dims of one array want the same mesh axis.
    """
    rules = {
        r.logical: r.axes for r in strategy.rules if not r.logical.endswith(RESIDUAL)
    }
    bases = {r.logical.removesuffix(RESIDUAL) for r in strategy.rules}
    known = KNOWN | bases
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
    if name in AXES:
        hint = (
            f" {name!r} is a mesh axis; annotate with a logical axis and let the "
            "strategy's [rules] map it."
        )
    else:
        close = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"{where} of shape {tuple(shape)} is annotated {names}, but no rule of "
        f"strategy {strategy.name!r} names the logical axis {name!r}, and it is none "
        f"of {', '.join(sorted(known))}.{hint} If the dim is never sharded, annotate "
        f"it None, or say so in the strategy: [rules] {name} = []."
    )
