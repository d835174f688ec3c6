"""Blocks: the repeated units of a model, and rematerialising them one by one.

A scanned model shows its block as a loop body. In an unrolled model the block is found
as the longest run of equations that repeats back to back, cut where the fewest bytes
cross from one copy to the next: between layers that is the residual stream.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend import core

from autoshard.ir import _jaxcompat
from autoshard.ir.errors import InputError

_jaxcompat.hide_from_source_lines(__file__)


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
    codes = np.array([ids.setdefault(s, len(ids)) for s in signatures])
    # A block may hold several copies of each of its equations, so the nearest equal one
    # need not be a period away.
    recent: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=8))
    distances: Counter[int] = Counter()
    for i, code in enumerate(codes.tolist()):
        distances.update(i - before for before in recent[code])
        recent[code].append(i)
    best: tuple[tuple[int, int], Repeat] | None = None
    for period, _ in distances.most_common(32):
        same = np.concatenate([[False], codes[:-period] == codes[period:], [False]])
        edges = np.flatnonzero(np.diff(same.astype(np.int8)))
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            run = end - begin
            if run < period:
                continue
            # Judged before the cut, which may cost a copy: else a block of two layers
            # could win over one layer.
            covered = ((run // period + 1) * period, -period)
            if best is not None and covered <= best[0]:
                continue
            cut = min(
                range(begin, begin + min(period, run - period + 1)),
                key=lambda at: (crossing[at], at),
            )
            best = (covered, Repeat(cut, period, (end - cut) // period + 1))
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


def checkpoint_blocks(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `fn` so that each of its blocks is rematerialised in the backward pass.

    Args:
        fn: A function of pytrees of arrays.

    Returns:
        The same function; differentiated, it keeps only what crosses block borders.

    Raises:
        InputError: No block repeats in `fn`.

    >>> import jax.numpy as jnp
    >>> def fn(w, x):
    ...     for i in range(3):
    ...         x = jnp.tanh(jnp.sin(x) @ w[i])
    ...     return x.sum()
    >>> w, x = jnp.ones((3, 2, 2)), jnp.ones((2, 2))
    >>> bool(jnp.allclose(jax.grad(fn)(w, x), jax.grad(checkpoint_blocks(fn))(w, x)))
    True
    """

    def wrapped(*args: Any) -> Any:
        flat, tree = jax.tree.flatten(args)
        shapes = [jax.typeof(x) for x in flat]
        jaxpr, out = jax.make_jaxpr(
            lambda *xs: fn(*jax.tree.unflatten(tree, xs)), return_shape=True
        )(*(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in shapes))
        return jax.tree.unflatten(
            jax.tree.structure(out), _run_checkpointed(jaxpr, flat)
        )

    return wrapped


def _run_checkpointed(jaxpr: Any, args: list[Any]) -> list[Any]:
    opened, consts = _jaxcompat.open_jaxpr(jaxpr)
    scans = [e for e in opened.eqns if e.primitive.name == "scan"]
    repeat = None
    if not any(e.params["length"] > 1 for e in scans):
        structs = [
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in opened.invars
        ]
        jaxpr = jax.make_jaxpr(partial(_inline_args, jaxpr))(*structs)
        opened, consts = _jaxcompat.open_jaxpr(jaxpr)
        repeat = find_repeat(
            [_signature(e) for e in opened.eqns], _crossing_bytes(opened)
        )
        if repeat is None:
            raise InputError(
                "remat = 'full' rematerialises the repeated blocks of a model, but no "
                "block repeats in this loss function; use remat = 'none'."
            )
    env: dict[Any, Any] = dict(zip(opened.invars, args, strict=True))
    env.update(zip(opened.constvars, consts, strict=True))
    eqns = list(opened.eqns)
    at = 0
    while at < len(eqns):
        block = repeat and repeat.start <= at < repeat.start + repeat.period * (
            repeat.count
        )
        if block:
            assert repeat is not None
            _run_block(eqns, at, at + repeat.period, opened.outvars, env)
            at += repeat.period
            continue
        eqn = eqns[at]
        values = [a.val if _jaxcompat.is_literal(a) else env[a] for a in eqn.invars]
        if eqn.primitive.name == "scan" and eqn.params["length"] > 1:
            results = _run_scan(eqn, values)
        else:
            results = _jaxcompat.eval_equation(eqn, values)
        env.update(zip(eqn.outvars, results, strict=True))
        at += 1
    return [a.val if _jaxcompat.is_literal(a) else env[a] for a in opened.outvars]


def _run_block(
    eqns: list[Any], begin: int, end: int, outvars: Any, env: dict[Any, Any]
) -> None:
    inside = eqns[begin:end]
    made = {var for eqn in inside for var in eqn.outvars}
    read = [
        atom
        for eqn in inside
        for atom in eqn.invars
        if not _jaxcompat.is_literal(atom) and atom not in made
    ]
    inputs = list(dict.fromkeys(read))
    later = {
        atom
        for eqn in eqns[end:]
        for atom in eqn.invars
        if not _jaxcompat.is_literal(atom)
    } | {a for a in outvars if not _jaxcompat.is_literal(a)}
    outputs = [var for eqn in inside for var in eqn.outvars if var in later]

    def run(values: list[Any]) -> list[Any]:
        local = dict(zip(inputs, values, strict=True))
        for eqn in inside:
            operands = [
                a.val if _jaxcompat.is_literal(a) else local[a] for a in eqn.invars
            ]
            results = _jaxcompat.eval_equation(eqn, operands)
            local.update(zip(eqn.outvars, results, strict=True))
        return [local[var] for var in outputs]

    results = jax.checkpoint(run)([env[var] for var in inputs])
    env.update(zip(outputs, results, strict=True))


def _run_scan(eqn: Any, values: list[Any]) -> list[Any]:
    params = eqn.params
    n_consts, n_carry = _jaxcompat.scan_counts(params)
    consts = values[:n_consts]
    run = core.jaxpr_as_fun(params["jaxpr"])

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = list(run(*consts, *carry, *xs))
        return results[:n_carry], results[n_carry:]

    carry, stacked = jax.lax.scan(
        jax.checkpoint(body, prevent_cse=False),
        list(values[n_consts : n_consts + n_carry]),
        list(values[n_consts + n_carry :]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]
