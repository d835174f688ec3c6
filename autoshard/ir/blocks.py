"""Blocks: the repeated units of a model, and rematerialising them one by one.

A scanned model shows its block as a loop body. In an unrolled model the block is found
as the longest run of equations that repeats back to back, cut where the fewest bytes
cross from one copy to the next: between layers that is the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax.extend import core

from autoshard.ir import _jaxcompat
from autoshard.ir.errors import InputError
from autoshard.ir.remat import check_names, checkpoint, parts_of

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


def checkpoint_blocks(
    fn: Callable[..., Any], remat: str = "full"
) -> Callable[..., Any]:
    """Wraps `fn` so that each of its blocks is rematerialised in the backward pass.

    Where a loop over blocks has two policies or more it becomes as many loops. Each
    takes a part of the stacked parameters, and compilers copy what a loop takes: beside
    the parameters their copies are in memory until the backward pass is through, and
    the parts of their gradients until they are joined. Blocks that are unrolled have
    nothing stacked.

    Args:
        fn: A function of pytrees of arrays.
        remat: What is recomputed, as in `autoshard.ir.remat.saved_by`; or a mix of
            policies, `"full=8,none=24"`, in the order in which blocks run. Its counts
            come to the number of blocks, those of all loops together.

    Returns:
        The same function; differentiated, it keeps only what crosses block borders, and
        what `remat` says.

    Raises:
        InputError: No block repeats in `fn`, it has no value of a name, or not as many
            blocks as a mix is for.

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
        check_names(remat, jaxpr)
        results = _run_checkpointed(jaxpr, flat, remat)
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return wrapped


def count_blocks(fn: Callable[..., Any], *args: Any) -> int:
    """How many blocks `checkpoint_blocks` finds in a function; 0 where nothing repeats.

    Args:
        fn: As there.
        *args: Arrays, or `jax.ShapeDtypeStruct`s.

    >>> import jax.numpy as jnp
    >>> def fn(w, x):
    ...     return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()
    >>> count_blocks(fn, jnp.ones((6, 2, 2)), jnp.ones((2, 2)))
    6
    """
    return sum(_lengths(*_with_blocks(jax.make_jaxpr(fn)(*args))))


def _with_blocks(jaxpr: Any) -> tuple[Any, Repeat | None]:
    """A jaxpr in which blocks are seen: loops, or else a repeat if there is one."""
    opened, _ = _jaxcompat.open_jaxpr(jaxpr)
    if any(map(_is_loop, opened.eqns)):
        return jaxpr, None
    structs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in opened.invars]
    jaxpr = jax.make_jaxpr(partial(_inline_args, jaxpr))(*structs)
    opened, _ = _jaxcompat.open_jaxpr(jaxpr)
    signatures = [_signature(e) for e in opened.eqns]
    return jaxpr, find_repeat(signatures, _crossing_bytes(opened))


def _lengths(jaxpr: Any, repeat: Repeat | None) -> list[int]:
    """How many blocks each loop and the repeat have, in order."""
    opened, _ = _jaxcompat.open_jaxpr(jaxpr)
    found = []
    for at, eqn in enumerate(opened.eqns):
        if repeat and 0 <= at - repeat.start < repeat.period * repeat.count:
            found += [repeat.count] if at == repeat.start else []
        elif _is_loop(eqn):
            found.append(eqn.params["length"])
    return found


def _run_checkpointed(jaxpr: Any, args: list[Any], remat: str) -> list[Any]:
    jaxpr, repeat = _with_blocks(jaxpr)
    opened, consts = _jaxcompat.open_jaxpr(jaxpr)
    policies = _policies(remat, sum(_lengths(jaxpr, repeat)))
    env: dict[Any, Any] = dict(zip(opened.invars, args, strict=True))
    env.update(zip(opened.constvars, consts, strict=True))
    eqns = list(opened.eqns)
    last = _last_uses(opened)
    known: dict[Any, Callable[..., Any]] = {}
    at = 0
    while at < len(eqns):
        block = repeat and repeat.start <= at < repeat.start + repeat.period * (
            repeat.count
        )
        if block:
            assert repeat is not None
            end = at + repeat.period
            _run_block(
                eqns[at:end],
                lambda v, end=end: last.get(v, -1) >= end,
                env,
                known,
                policies.pop(0),
            )
            at += repeat.period
            continue
        eqn = eqns[at]
        values = [a.val if _jaxcompat.is_literal(a) else env[a] for a in eqn.invars]
        if _is_loop(eqn):
            length = eqn.params["length"]
            own, policies = policies[:length], policies[length:]
            results = _run_scan(eqn, values, own)
        else:
            results = _jaxcompat.eval_equation(eqn, values)
        env.update(zip(eqn.outvars, results, strict=True))
        at += 1
    return [a.val if _jaxcompat.is_literal(a) else env[a] for a in opened.outvars]


def _is_loop(eqn: Any) -> bool:
    """Whether an equation runs blocks one after the other."""
    return eqn.primitive.name == "scan" and eqn.params["length"] > 1


def _policies(remat: str, blocks: int) -> list[str]:
    """The policy of each block, in the order in which they run.

    Raises:
        InputError: There are none, or a mix is for another number of them.
    """
    if not blocks:
        raise InputError(
            f"remat = {remat!r} rematerialises the repeated blocks of a model, but "
            "no block repeats in this loss function; use remat = 'none'."
        )
    parts = parts_of(remat) or ((remat, blocks),)
    policies = [policy for policy, count in parts for _ in range(count)]
    if len(policies) != blocks:
        raise InputError(
            f"remat = {remat!r} is for {len(policies)} blocks, and the loss function "
            f"has {blocks}; give counts that come to {blocks}."
        )
    return policies


def _last_uses(opened: Any) -> dict[Any, int]:
    """The last equation that reads each variable; their number for a result."""
    last = {
        atom: i
        for i, eqn in enumerate(opened.eqns)
        for atom in eqn.invars
        if not _jaxcompat.is_literal(atom)
    }
    results = [a for a in opened.outvars if not _jaxcompat.is_literal(a)]
    return last | dict.fromkeys(results, len(opened.eqns))


def _run_block(
    inside: list[Any],
    is_used_later: Callable[[Any], bool],
    env: dict[Any, Any],
    known: dict[Any, Callable[..., Any]],
    policy: str,
) -> None:
    """Runs one copy; copies that are equal in all are traced and differentiated once.

    Args:
        inside: Its equations.
        is_used_later: Whether a result of one of them is read by what follows.
        env: The value of each variable so far; those of the copy are added.
        known: What runs a copy, by all that matters of it; added to.
        policy: What of it is recomputed.
    """
    made = {var for eqn in inside for var in eqn.outvars}
    read = [
        atom
        for eqn in inside
        for atom in eqn.invars
        if not _jaxcompat.is_literal(atom) and atom not in made
    ]
    inputs = list(dict.fromkeys(read))
    outputs = [v for eqn in inside for v in eqn.outvars if is_used_later(v)]

    def run(values: list[Any]) -> list[Any]:
        local = dict(zip(inputs, values, strict=True))
        for eqn in inside:
            operands = [
                a.val if _jaxcompat.is_literal(a) else local[a] for a in eqn.invars
            ]
            results = _jaxcompat.eval_equation(eqn, operands)
            local.update(zip(eqn.outvars, results, strict=True))
        return [local[var] for var in outputs]

    # What runs a copy is only made anew where it does something else: JAX keeps what it
    # makes of a function, and that is most of the time that differentiating takes.
    key = policy, _identity(inside, inputs, outputs)
    checkpointed = known.setdefault(key, checkpoint(policy)(run))
    results = checkpointed([env[var] for var in inputs])
    env.update(zip(outputs, results, strict=True))


def _identity(inside: list[Any], inputs: list[Any], outputs: list[Any]) -> Any:
    """Equal only for copies of which one can run in the place of the other.

    What cannot be compared by value is only equal to itself.
    """
    number: dict[Any, int] = {}
    for var in (*inputs, *(var for eqn in inside for var in eqn.outvars)):
        number.setdefault(var, len(number))

    def value(x: Any) -> Any:
        try:
            hash(x)
        except TypeError:
            return id(x)
        return type(x), x

    def operand(atom: Any) -> Any:
        if not _jaxcompat.is_literal(atom):
            return number[atom]
        held = atom.val
        if isinstance(held, np.ndarray) and not held.ndim:
            held = held.tobytes()
        return str(atom.aval), value(held)

    ops = tuple(
        (
            eqn.primitive,
            tuple((key, value(param)) for key, param in eqn.params.items()),
            tuple(operand(atom) for atom in eqn.invars),
            eqn.ctx,
            _jaxcompat.name_stack(eqn),
            _jaxcompat.source_line(eqn),
        )
        for eqn in inside
    )
    types = tuple(str(var.aval) for var in inputs)
    return ops, types, tuple(number[var] for var in outputs)


def _run_scan(eqn: Any, values: list[Any], policies: list[str]) -> list[Any]:
    """Runs a loop over blocks; as several, one after the other, if policies differ."""
    params = eqn.params
    n_consts, n_carry = _jaxcompat.scan_counts(params)
    consts = values[:n_consts]
    run = core.jaxpr_as_fun(params["jaxpr"])

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = list(run(*consts, *carry, *xs))
        return results[:n_carry], results[n_carry:]

    runs = [(policy, len(list(same))) for policy, same in groupby(policies)]
    # Slices are taken from the other end where the loop goes backwards.
    way = -1 if params["reverse"] else 1
    sizes = [size for _, size in runs[::way]]
    cut = [_cut(x, sizes) for x in values[n_consts + n_carry :]]
    carry = list(values[n_consts : n_consts + n_carry])
    stacked: list[list[Any]] = []
    for k, (policy, length) in enumerate(runs):
        carry, made = jax.lax.scan(
            checkpoint(policy)(body, prevent_cse=False),
            carry,
            [parts[::way][k] for parts in cut],
            length=length,
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        stacked.append(made)
    joined = [_joined(parts[::way]) for parts in zip(*stacked, strict=True)]
    return [*carry, *joined]


def _cut(x: Any, sizes: list[int]) -> list[Any]:
    """Parts of an array along its leading dim; itself where that is one part."""
    return list(jax.lax.split(x, sizes)) if len(sizes) > 1 else [x]


def _joined(parts: Sequence[Any]) -> Any:
    return jax.lax.concatenate(parts, 0) if len(parts) > 1 else parts[0]
