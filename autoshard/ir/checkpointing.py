"""Rematerialising the blocks of a model one by one, each with a policy of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax.extend import core

from autoshard.ir import _jaxcompat
from autoshard.ir.blocks import is_loop, lengths, with_blocks
from autoshard.ir.errors import InputError
from autoshard.ir.remat import check_names, checkpoint, parts_of

_jaxcompat.hide_from_source_lines(__file__)


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


def _run_checkpointed(jaxpr: Any, args: list[Any], remat: str) -> list[Any]:
    jaxpr, repeat = with_blocks(jaxpr)
    opened, consts = _jaxcompat.open_jaxpr(jaxpr)
    policies = _policies(remat, sum(lengths(jaxpr, repeat)))
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
        if is_loop(eqn):
            length = eqn.params["length"]
            own, policies = policies[:length], policies[length:]
            results = _run_scan(eqn, values, own)
        else:
            results = _jaxcompat.eval_equation(eqn, values)
        env.update(zip(eqn.outvars, results, strict=True))
        at += 1
    return [a.val if _jaxcompat.is_literal(a) else env[a] for a in opened.outvars]


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
