"""Blocks: the repeated units of a model, found in its loss.

A scanned model shows its block as a loop body. In an unrolled model the block is found
as the longest run of equations that repeats back to back, cut where the fewest bytes
cross from one copy to the next: between layers that is the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend import core

from autoshard.ir import _jaxcompat

_jaxcompat.hide_from_source_lines(__file__)

_ODD = np.uint64(0x9E3779B97F4A7C15)
"""Mixes codes into hashes; any odd number with many bits would do."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """Equations `start : start + period * count` are `count` copies of one block."""

    start: int
    period: int
    count: int


def _inline(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    opened, consts = _jaxcompat.open_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(opened.invars, args, strict=True))
    env.update(zip(opened.constvars, consts, strict=True))
    for eqn in opened.eqns:
        values = [a.val if _jaxcompat.is_literal(a) else env[a] for a in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit"):
            results = _inline(eqn.params["jaxpr"], values)
        else:
            results = _jaxcompat.eval_equation(eqn, values)
        env.update(zip(eqn.outvars, results, strict=True))
    return [a.val if _jaxcompat.is_literal(a) else env[a] for a in opened.outvars]


def _inline_args(jaxpr: Any, *args: Any) -> list[Any]:
    return _inline(jaxpr, args)


def _signature(eqn: Any) -> str:
    avals = [str(v.aval) for v in (*eqn.invars, *eqn.outvars)]
    params = [
        f"{key}={value}"
        for key, value in sorted(eqn.params.items())
        if key
        not in ("start_indices", "limit_indices")  # which layer, not what it does
        and not callable(value)
        and not hasattr(value, "eqns")
        and not isinstance(value, core.ClosedJaxpr)
    ]
    return f"{eqn.primitive.name}|{avals}|{params}"


def likely_periods(codes: np.ndarray, *, per_window: int = 32) -> list[int]:
    """Distances at which a sequence often equals itself.

    Equal elements may stand many times in one copy, so single elements say little in a
    long sequence; windows of a few are rarer, and the nearest equal ones lie a period
    apart.

    Args:
        codes: int64[n]; a negative one is equal to no other.
        per_window: How many distances to keep for each width of window.

    Returns:
        Distances, at most `n // 2`, without order.

    >>> likely_periods(np.array([0, 1, 2, 0, 1, 2]))
    [3]
    """
    found: set[int] = set()
    width = 1
    windows = codes.astype(np.uint64)
    alone = codes < 0
    while width <= 64 and len(windows) > 1:
        order = np.flatnonzero(~alone)
        order = order[np.argsort(windows[order], kind="stable")]
        ranked = windows[order]
        near = np.zeros(len(codes) // 2 + 1, dtype=np.int64)
        for lag in range(1, min(8, len(order) - 1) + 1):
            apart = (order[lag:] - order[:-lag])[ranked[lag:] == ranked[:-lag]]
            apart = apart[apart < len(near)]
            near += np.bincount(apart, minlength=len(near))
        most = np.argsort(-near, kind="stable")[:per_window]
        found.update(most[near[most] > 0].tolist())
        for _ in range(3):  # eight times as wide
            if width < len(windows):
                windows = windows[:-width] * _ODD + windows[width:] + np.uint64(1)
                alone = alone[:-width] | alone[width:]
            width *= 2
    return sorted(found)


def equal_runs(codes: np.ndarray, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a sequence repeats itself at a distance, two copies or more.

    Args:
        codes: int64[n]; a negative one is equal to no other.
        period: The distance.

    Returns:
        `(begin, end)` of each stretch, partial copies at either end included.

    >>> begin, end = equal_runs(np.array([9, 0, 1, 0, 1, 0, 8]), 2)
    >>> begin.tolist(), end.tolist()
    ([1], [6])
    """
    same = (codes[:-period] == codes[period:]) & (codes[:-period] >= 0)
    edges = np.flatnonzero(np.diff(same.astype(np.int8), prepend=0, append=0))
    begin, end = edges[::2], edges[1::2]
    enough = end - begin >= period
    return begin[enough], end[enough] + period


def find_repeat(signatures: Sequence[object], crossing: Sequence[int]) -> Repeat | None:
    """Finds the block that repeats back to back and covers the most equations.

    Args:
        signatures: One hashable per equation; equal ones may be copies of each other.
        crossing: For each position, the bytes alive between it and the one before.

    Returns:
        The repeat, or None when nothing repeats.

    >>> find_repeat("xabcabcaby", [9, 9, 1, 5, 5, 1, 5, 5, 1, 9])
    Repeat(start=2, period=3, count=2)
    """
    ids: dict[object, int] = {}
    codes = np.array([ids.setdefault(s, len(ids)) for s in signatures], dtype=np.int64)
    best: tuple[tuple[int, int], Repeat] | None = None
    for period in likely_periods(codes):
        for begin, end in zip(*equal_runs(codes, period), strict=True):
            begin, end = int(begin), int(end)
            run = end - period - begin
            # Judged before the cut, which may cost a copy: else a block of two layers
            # could win over one layer.
            covered = ((run // period + 1) * period, -period)
            if best is not None and covered <= best[0]:
                continue
            cut = min(
                range(begin, begin + min(period, run - period + 1)),
                key=lambda at: (crossing[at], at),
            )
            count = (end - period - cut) // period + 1
            best = (covered, Repeat(cut, period, count))
    return best[1] if best else None


def _crossing_bytes(opened: Any) -> list[int]:
    first: dict[Any, int] = {}
    last: dict[Any, int] = {}
    for i, eqn in enumerate(opened.eqns):
        for var in eqn.outvars:
            first[var] = i
        for atom in eqn.invars:
            if not _jaxcompat.is_literal(atom) and atom in first:
                last[atom] = i
    delta = np.zeros(len(opened.eqns) + 1, dtype=np.int64)
    for var, end in last.items():
        size = int(np.prod(var.aval.shape, dtype=np.int64)) * var.aval.dtype.itemsize
        delta[first[var] + 1] += size
        delta[end + 1 if end + 1 < len(delta) else -1] -= size
    return np.cumsum(delta)[:-1].tolist()


def count_blocks(fn: Callable[..., Any], *args: Any) -> int:
    """How many blocks `ir.checkpointing` finds in a function; 0 where nothing repeats.

    Args:
        fn: A function of pytrees of arrays.
        *args: Arrays, or `jax.ShapeDtypeStruct`s.

    >>> import jax.numpy as jnp
    >>> def fn(w, x):
    ...     return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()
    >>> count_blocks(fn, jnp.ones((6, 2, 2)), jnp.ones((2, 2)))
    6
    """
    return sum(lengths(*with_blocks(jax.make_jaxpr(fn)(*args))))


def with_blocks(jaxpr: Any) -> tuple[Any, Repeat | None]:
    """A jaxpr in which blocks are seen: loops, or else a repeat if there is one."""
    opened, _ = _jaxcompat.open_jaxpr(jaxpr)
    if any(map(is_loop, opened.eqns)):
        return jaxpr, None
    structs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in opened.invars]
    jaxpr = jax.make_jaxpr(partial(_inline_args, jaxpr))(*structs)
    opened, _ = _jaxcompat.open_jaxpr(jaxpr)
    signatures = [_signature(e) for e in opened.eqns]
    return jaxpr, find_repeat(signatures, _crossing_bytes(opened))


def lengths(jaxpr: Any, repeat: Repeat | None) -> list[int]:
    """How many blocks each loop and the repeat have, in order."""
    opened, _ = _jaxcompat.open_jaxpr(jaxpr)
    found = []
    for at, eqn in enumerate(opened.eqns):
        if repeat and 0 <= at - repeat.start < repeat.period * repeat.count:
            found += [repeat.count] if at == repeat.start else []
        elif is_loop(eqn):
            found.append(eqn.params["length"])
    return found


def is_loop(eqn: Any) -> bool:
    """Whether an equation runs blocks one after the other."""
    return eqn.primitive.name == "scan" and eqn.params["length"] > 1
