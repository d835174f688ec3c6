"""Giving the mesh axes that equations of a manual region speak of their new names."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.core import AbstractValue
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from autoshard.ir import _jaxcompat

_AXIS_PARAMS = frozenset({"axes", "axis_name", "axis_names"})


def renamed_params(params: dict[str, Any], rename: dict[str, str]) -> dict[str, Any]:
    """Parameters of an equation with mesh axes renamed, in nested jaxprs too.

    Args:
        params: Parameters of a collective, a kernel, or any other equation.
        rename: New name per axis; others keep theirs.

    >>> renamed_params({"axes": ("dp", 0), "name": "dp"}, {"dp": "data"})
    {'axes': ('data', 0), 'name': 'dp'}
    """
    return {
        key: _renamed(value, rename, key in _AXIS_PARAMS)
        for key, value in params.items()
    }


def renamed_spec(spec: Any, rename: dict[str, str]) -> Any:
    """A partition spec with its mesh axes renamed.

    >>> tuple(renamed_spec(PartitionSpec(("dp", "mp"), None), {"dp": "data"}))
    (('data', 'mp'), None)
    """

    def new(axis: str) -> str:
        return rename.get(axis, axis)

    def one(entry: Any) -> Any:
        if isinstance(entry, tuple):
            return tuple(map(new, entry))
        return new(entry) if isinstance(entry, str) else entry

    return PartitionSpec(
        *map(one, spec),
        unreduced=frozenset(map(new, spec.unreduced)),
        reduced=frozenset(map(new, spec.reduced)),
    )


def _renamed(value: Any, rename: dict[str, str], names: bool) -> Any:
    """A parameter or a part of one; the same object where there is nothing to rename.

    Args:
        value: The parameter.
        rename: New name per axis.
        names: Whether a string in it is the name of an axis.
    """
    if names and isinstance(value, str):
        return rename.get(value, value)
    if type(value) in (tuple, list, frozenset):
        parts = [_renamed(item, rename, names) for item in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(parts)
    if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
        return _renamed_jaxpr(value, rename)
    if isinstance(value, AbstractValue):
        return _renamed_type(value, rename)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {}
        for field in dataclasses.fields(value):
            old = getattr(value, field.name)
            new = _renamed(old, rename, names=False)
            if new is not old:
                changed[field.name] = new
        return dataclasses.replace(value, **changed) if changed else value
    return value


def _renamed_type(aval: Any, rename: dict[str, str]) -> Any:
    inner = getattr(aval, "inner_aval", None)
    if inner is not None:  # a reference
        return aval.update(inner_aval=_renamed_type(inner, rename))
    kind = getattr(aval, "manual_axis_type", None)
    if kind is None or aval.sharding.mesh.empty:
        return aval
    here = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
    kind = _jaxcompat.renamed_kind(kind, rename)
    return aval.update(manual_axis_type=kind, sharding=here)


def _renamed_jaxpr(jaxpr: Any, rename: dict[str, str]) -> Any:
    opened, _ = _jaxcompat.open_jaxpr(jaxpr)
    new: dict[Any, Any] = {}

    def atom(old: Any) -> Any:
        aval = _renamed_type(old.aval, rename)
        if _jaxcompat.is_literal(old):
            return core.Literal(_jaxcompat.unbound(old.val), aval)
        if old not in new:
            new[old] = type(old)(aval)
        return new[old]

    def atoms(old: Any) -> list[Any]:
        return [atom(a) for a in old]

    result = opened.replace(
        constvars=atoms(opened.constvars),
        invars=atoms(opened.invars),
        eqns=[
            eqn.replace(
                invars=atoms(eqn.invars),
                outvars=atoms(eqn.outvars),
                params=renamed_params(eqn.params, rename),
                ctx=_jaxcompat.context_here(eqn),
            )
            for eqn in opened.eqns
        ],
        outvars=atoms(opened.outvars),
    )
    return jaxpr.replace(jaxpr=result) if opened is not jaxpr else result
