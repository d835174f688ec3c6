"""Evaluating a jaxpr again with constraints placed at given addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from autoshard.ir import _jaxcompat
from autoshard.ir.walk import Addresser, inlined

_jaxcompat.hide_from_source_lines(__file__)

Place = Callable[[str, str, Any], Any]
"""`(address, slot, value) -> value`; slot is `"in0"`, `"in1"`, ... or `"out0"`, ..."""


def evaluate(closed_jaxpr: Any, args: Sequence[Any], place: Place) -> list[Any]:
    """Evaluates a jaxpr, passing operands and results of each op through `place`.

    Calls are written in place, loops and rematerialised regions are traced again, so
    `place` reaches every value. Derivative rules of custom functions are dropped: the
    jaxpr must already be differentiated.

    Args:
        closed_jaxpr: What `jax.make_jaxpr` returned.
        args: Its flat arguments.
        place: Called with the address, the slot and the value; returns the value to
            go on with. For a loop the addresses `...:in1`, `...:out0` and `...:carry0`
            are those of the links.

    Returns:
        The flat results.

    >>> import jax.numpy as jnp
    >>> jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x) * 2)(1.0)
    >>> seen = []
    >>> [y] = evaluate(jaxpr, [0.0], lambda a, s, v: (seen.append((a, s)), v)[1])
    >>> seen
    [('sin#0', 'in0'), ('sin#0', 'out0'), ('mul#0', 'in0'), ('mul#0', 'out0')]
    """
    return _evaluate(closed_jaxpr, args, place, Addresser(), "")


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False)
    )


def _evaluate(
    jaxpr: Any, args: Sequence[Any], place: Place, addresses: Addresser, path: str
) -> list[Any]:
    opened, consts = _jaxcompat.open_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(opened.invars, args, strict=True))
    env.update(zip(opened.constvars, consts, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if _jaxcompat.is_literal(atom) else env[atom]

    last_use = {
        atom: i
        for i, eqn in enumerate(opened.eqns)
        for atom in eqn.invars
        if not _jaxcompat.is_literal(atom)
    }
    kept = {atom for atom in opened.outvars if not _jaxcompat.is_literal(atom)}
    for i, eqn in enumerate(opened.eqns):
        values = [read(atom) for atom in eqn.invars]
        inner = inlined(eqn)
        if eqn.primitive.name in _jaxcompat.REMAT_PRIMITIVES:
            traced = jax.make_jaxpr(
                lambda *xs, inner=inner: _evaluate(inner, xs, place, addresses, path)
            )(*(_struct(atom.aval) for atom in eqn.invars))
            params = {**eqn.params, "jaxpr": _jaxcompat.like(traced, inner)}
            results = eqn.primitive.bind(*values, **params)
        elif inner is not None:
            results = _evaluate(inner, values, place, addresses, path)
        elif eqn.primitive.name == "scan":
            results = _scan(eqn, values, place, addresses, path)
        else:
            address = addresses.next(path, eqn)
            for slot, atom in enumerate(eqn.invars):
                if not _jaxcompat.is_literal(atom):
                    values[slot] = place(address, f"in{slot}", values[slot])
            results = _jaxcompat.eval_equation(eqn, values)
            results = [place(address, f"out{k}", r) for k, r in enumerate(results)]
        env.update(zip(eqn.outvars, results, strict=True))
        for atom in eqn.invars:  # free what eager evaluation would otherwise hold
            if _jaxcompat.is_literal(atom) or atom in kept or last_use[atom] != i:
                continue
            env.pop(atom, None)
    return [read(atom) for atom in opened.outvars]


def _scan(
    eqn: Any, values: list[Any], place: Place, addresses: Addresser, path: str
) -> list[Any]:
    params = eqn.params
    n_consts, n_carry = _jaxcompat.scan_counts(params)
    address = addresses.next(path, eqn)
    for i in range(n_consts, len(values)):
        if not _jaxcompat.is_literal(eqn.invars[i]):
            values[i] = place(f"{address}:in{i}", "in0", values[i])

    def body(*xs: Any) -> list[Any]:
        inputs = list(xs)
        for i in range(n_consts, len(inputs)):
            if not _jaxcompat.is_literal(eqn.invars[i]):
                inputs[i] = place(f"{address}:in{i}", "out0", inputs[i])
        outputs = _evaluate(params["jaxpr"], inputs, place, addresses, f"{address}/")
        for i, output in enumerate(outputs):
            if i < n_carry:
                output = place(f"{address}:carry{i}", "in0", output)
                outputs[i] = place(f"{address}:carry{i}", "out0", output)
            else:
                outputs[i] = place(f"{address}:out{i}", "in0", output)
        return outputs

    opened, _ = _jaxcompat.open_jaxpr(params["jaxpr"])
    traced = jax.make_jaxpr(body)(*(_struct(var.aval) for var in opened.invars))
    closed = _jaxcompat.like(traced, params["jaxpr"])
    results = eqn.primitive.bind(*values, **{**params, "jaxpr": closed})
    return [place(f"{address}:out{i}", "out0", r) for i, r in enumerate(results)]
