"""The only place that touches JAX internals or tells JAX versions apart.

JAX 0.11 merged `ClosedJaxpr` and `Jaxpr` into one class; before that a closed jaxpr
wraps an open one and carries its constants. Source positions of equations have no
public reader at all.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import jax
from jax._src import source_info_util
from jax.extend import core

CALL_JAXPR_PARAM = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_lin": "call_jaxpr",
}
"""Primitives that call one inner jaxpr once, and the parameter that holds it."""

REMAT_PRIMITIVES = frozenset({"remat2", "checkpoint"})

_MERGED = core.ClosedJaxpr is core.Jaxpr


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Returns the jaxpr with `eqns` and the constants bound to its `constvars`."""
    if _MERGED:
        return jaxpr, list(getattr(jaxpr, "consts", None) or ())
    if isinstance(jaxpr, core.ClosedJaxpr):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, []


def like(new_closed: Any, old: Any) -> Any:
    """Gives a freshly traced closed jaxpr the open or closed form that `old` has."""
    if _MERGED or isinstance(old, core.ClosedJaxpr):
        return new_closed
    if new_closed.consts:
        raise AssertionError("an open jaxpr cannot carry constants")
    return new_closed.jaxpr


def is_literal(atom: Any) -> bool:
    """Whether an operand of an equation is a constant written in place."""
    return isinstance(atom, core.Literal)


def source_line(eqn: Any) -> str:
    """The user's `file:line (function)` an equation came from, or an empty string.

    The file is named as it is imported, `package/module.py`, so that the same program
    gives the same plan on every machine.
    """
    line = source_info_util.summarize(eqn.source_info)
    for root in _import_roots(tuple(sys.path)):
        if line.startswith(root):
            return line[len(root) :]
    return line


@functools.cache
def _import_roots(path: tuple[str, ...]) -> list[str]:
    roots = {os.path.join(os.path.abspath(entry), "") for entry in path}
    return sorted(roots, key=lambda root: (-len(root), root))


def name_stack(eqn: Any) -> str:
    """The `named_scope` path of an equation, transformations included."""
    return str(eqn.source_info.name_stack)


def hide_from_source_lines(file: str) -> None:
    """Makes source lines skip the frames of `file` and name its caller instead."""
    source_info_util.register_exclusion(file)


def has_sharding_params(eqn: Any) -> bool:
    """Whether an inner `jit` fixes shardings of its own."""
    shardings = (
        *eqn.params.get("in_shardings", ()),
        *eqn.params.get("out_shardings", ()),
    )
    return any(isinstance(s, jax.sharding.Sharding) for s in shardings)


def eval_equation(eqn: Any, values: list[Any]) -> list[Any]:
    """Applies one equation to values, keeping its source line and name stack."""
    scope = source_info_util.current_name_stack() + eqn.source_info.name_stack
    params = eqn.primitive.get_bind_params(eqn.params)
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=scope),
        eqn.ctx.manager,
    ):
        out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """`(num_consts, num_carry)` of a scan; JAX 0.12 keeps them in a tree."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    flat = list(range(len(params["jaxpr"].in_avals)))
    consts, carry, _ = params["ft_in"].update(flat).unpack()
    return len(list(consts)), len(list(carry))
