"""The only place that touches JAX internals or tells JAX versions apart.

JAX 0.11 merged `ClosedJaxpr` and `Jaxpr` into one class; before that a closed jaxpr
wraps an open one and carries its constants. Source positions of equations have no
public reader at all.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import mesh as mesh_lib
from jax._src import source_info_util
from jax._src.interpreters import partial_eval
from jax.core import Tracer
from jax.extend import core
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec, Sharding

_MERGED = core.ClosedJaxpr is core.Jaxpr

CALL_JAXPR_PARAM = {
    "call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "composite": "call_jaxpr" if _MERGED else "jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "jit": "jaxpr",
    "linear_call": "callee",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "remat_opt": "fwd_jaxpr",
}
"""Primitives that call one inner jaxpr once, and the parameter that holds it."""

CALLS = frozenset({*CALL_JAXPR_PARAM, "custom_linear_solve"})
"""The same, and those that call one of several inner jaxprs."""

LITERAL = core.Literal
"""The class of operands that are constants written in place."""

KERNEL_NAME_PARAM = {"ffi_call": "target_name", "pallas_call": "name"}
"""Primitives that run a kernel of the user, and the parameter that names it."""

REMAT_PRIMITIVES = frozenset({"remat2", "checkpoint"})

NO_MESH = jax.sharding.AbstractMesh((), ())

PLACEMENTS = frozenset({"sharding_constraint", "reshard", "mesh_cast"})
"""Primitives that say where a value lies and are the identity otherwise."""


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Returns the jaxpr with `eqns` and the constants bound to its `constvars`."""
    if _MERGED:
        return jaxpr, list(getattr(jaxpr, "consts", None) or ())
    if isinstance(jaxpr, core.ClosedJaxpr):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, []


def without_dead(closed: Any) -> Any:
    """A closed jaxpr without the equations whose results nothing uses."""
    opened, _ = open_jaxpr(closed)
    live, _ = partial_eval.dce_jaxpr(opened, [True] * len(opened.outvars), True)
    return live if _MERGED else core.ClosedJaxpr(live, closed.consts)


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


def callee(eqn: Any) -> tuple[Any, list[int] | None] | None:
    """The inner jaxpr of a call, and which operands it takes (None for all).

    Returns:
        None where the equation calls no jaxpr exactly once.
    """
    name = eqn.primitive.name
    if name not in CALLS:
        return None
    if name in CALL_JAXPR_PARAM:
        return eqn.params[CALL_JAXPR_PARAM[name]], None
    # A linear solve has the constants of matvec, vecmat, solve and transpose_solve as
    # operands, then the right-hand sides.
    lengths = list(eqn.params["const_lengths"])
    before = sum(lengths[:2])
    taken = list(range(before, before + lengths[2]))
    taken += range(sum(lengths), len(eqn.invars))
    return eqn.params["jaxprs"].solve, taken


def shape_of(aval: Any) -> tuple[int, ...]:
    """Shape of an abstract value; a token has none."""
    return getattr(aval, "shape", ())


def source_line(eqn: Any) -> str:
    """The user's `file:line (function)` an equation came from, or an empty string.

    The file is named as it is imported, `package/module.py`, so that the same program
    gives the same plan on every machine.
    """
    return _line_of(eqn.source_info.traceback, tuple(sys.path))


def here() -> str:
    """The line of the user's code that is running, as `source_line` writes it."""
    return _line_of(source_info_util.current().traceback, tuple(sys.path))


@functools.lru_cache(maxsize=65536)
def _line_of(traceback: Any, path: tuple[str, ...]) -> str:
    info = source_info_util.SourceInfo(traceback, source_info_util.NameStack())
    line = source_info_util.summarize(info)
    for root in _import_roots(path):
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


def legacy_mesh() -> jax.sharding.Mesh:
    """The mesh of the deprecated `with mesh:`, empty outside of one."""
    return mesh_lib.thread_resources.env.physical_mesh


def hide_from_source_lines(file: str) -> None:
    """Makes source lines skip the frames of `file` and name its caller instead."""
    source_info_util.register_exclusion(file)


hide_from_source_lines(__file__)


@contextmanager
def quick_to_refuse() -> Iterator[None]:
    """While it is open, a tracer that is asked for its sharding says no at once.

    Flax asks every value that it stores, and JAX goes through all that was traced so
    far to say in its answer where the tracer comes from.
    """
    held = Tracer.__dict__["sharding"]

    def refuse(tracer: Any) -> Any:
        raise AttributeError(f"'sharding' is not known of {tracer!r} while tracing.")

    Tracer.sharding = property(refuse)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        Tracer.sharding = held  # type: ignore[assignment, misc]


def call_shardings(eqn: Any) -> tuple[list[Any], list[Any]]:
    """The user's `NamedSharding`s of an inner `jit`, per operand and per result."""

    def named(key: str, count: int) -> list[Any]:
        given = eqn.params.get(key) or (None,) * count
        return [s if isinstance(s, NamedSharding) else None for s in given]

    return (
        named("in_shardings", len(eqn.invars)),
        named("out_shardings", len(eqn.outvars)),
    )


def kernel_name(eqn: Any) -> str:
    """The name of the kernel that a foreign call runs."""
    return str(eqn.params[KERNEL_NAME_PARAM[eqn.primitive.name]] or "unnamed")


def is_placement(eqn: Any) -> bool:
    """Whether an equation only says over which devices of a mesh a value lies."""
    if eqn.primitive.name == "device_put":
        return all(_is_plain(d) for d in eqn.params["devices"])
    return eqn.primitive.name in PLACEMENTS


def _is_plain(target: Any) -> bool:
    on_mesh = isinstance(target, NamedSharding)
    return on_mesh and target.memory_kind in (None, "device")


def at_source_line(eqn: Any) -> AbstractContextManager[None]:
    """A context in which everything that is traced has the equation's source line."""
    return source_info_util.user_context(_traceback(eqn))


def _traceback(eqn: Any) -> Any:
    """Where an equation came from; within a library function, where that was called.

    What JAX traces on its own, as the body of `jnp.cumsum`, has no line of the user's.
    """
    own = eqn.source_info.traceback
    if own is not None and _line_of(own, tuple(sys.path)):
        return own
    return source_info_util.current().traceback if _within() else own


def _within() -> bool:
    """Whether the line of an equation is set, as `at_source_line` does."""
    return source_info_util._source_info_context.context.traceback is not None


def eval_equation(
    eqn: Any, values: list[Any], params: dict[str, Any] | None = None
) -> list[Any]:
    """Applies one equation to values, keeping its source line and name stack.

    Shardings that the equation carries are on the user's mesh and are left out, and so
    is that mesh: the one of the caller's context holds.

    Args:
        eqn: The equation.
        values: Its operands.
        params: What to take in place of its own parameters.
    """
    scope = source_info_util.current_name_stack() + eqn.source_info.name_stack
    given: dict[str, Any] = eqn.params if params is None else params
    if any(isinstance(value, Sharding) for value in given.values()):
        given = {
            key: None if isinstance(value, Sharding) else value
            for key, value in given.items()
        }
    given = eqn.primitive.get_bind_params(given)
    mesh = jax.sharding.get_abstract_mesh()
    with (
        source_info_util.user_context(_traceback(eqn), name_stack=scope),
        eqn.ctx.manager,
        # From one mesh to another of a different size there is only a way through none.
        jax.sharding.use_abstract_mesh(NO_MESH),
        jax.sharding.use_abstract_mesh(mesh),
    ):
        out = eqn.primitive.bind(*values, **given)
    return list(out) if eqn.primitive.multiple_results else [out]


def context_here(eqn: Any) -> Any:
    """The context of an equation, but for the mesh, which is that of the caller."""
    mesh = jax.sharding.get_abstract_mesh()
    with (
        eqn.ctx.manager,
        jax.sharding.use_abstract_mesh(NO_MESH),
        jax.sharding.use_abstract_mesh(mesh),
    ):
        return type(eqn.ctx)()


def renamed_kind(kind: Any, rename: dict[str, str]) -> Any:
    """Which mesh axes a type varies over, with those axes renamed."""
    if kind is None or not rename:
        return kind

    def over(axes: frozenset[str]) -> frozenset[str]:
        return frozenset(rename.get(axis, axis) for axis in axes)

    return ManualAxisType(
        varying=over(kind.varying),
        unreduced=over(kind.unreduced),
        reduced=over(kind.reduced),
    )


def struct(aval: Any, rename: dict[str, str] | None = None) -> jax.ShapeDtypeStruct:
    """What `jax.make_jaxpr` takes to make an argument of this type.

    A sharding that is part of the type is left out: it is the user's.
    """
    kind = renamed_kind(getattr(aval, "manual_axis_type", None), rename or {})
    mesh = jax.sharding.get_abstract_mesh()
    return jax.ShapeDtypeStruct(
        aval.shape,
        aval.dtype,
        weak_type=getattr(aval, "weak_type", False),
        manual_axis_type=kind,
        # In a manual region every type holds the region's mesh.
        sharding=NamedSharding(mesh, PartitionSpec()) if mesh.manual_axes else None,
    )


def unbound(content: Any) -> Any:
    """A literal or constant whose type does not name the user's mesh."""
    if isinstance(content, Tracer):
        return content
    sharding = getattr(getattr(content, "aval", None), "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return content
    if isinstance(content, np.ndarray):
        return content.view()  # a view keeps the content and weak type alone
    if jnp.issubdtype(content.dtype, jax.dtypes.extended):
        return content
    return np.asarray(content)


def retrace(
    fn: Callable[..., Any], structs: Sequence[jax.ShapeDtypeStruct], old: Any
) -> tuple[Any, list[Any]]:
    """Traces `fn` into a jaxpr of the form of `old`, and the constants it closes over.

    Returns:
        The jaxpr, which takes the constants as first arguments, and the constants.
    """
    traced = jax.make_jaxpr(fn)(*structs)
    _, consts = open_jaxpr(traced)
    if not consts:
        return like(traced, old), []
    count = len(consts)

    def lifted(*args: Any) -> Any:
        with_consts = (
            traced.replace(consts=list(args[:count]))
            if _MERGED
            else core.ClosedJaxpr(traced.jaxpr, list(args[:count]))
        )
        return core.jaxpr_as_fun(with_consts)(*args[count:])

    extra = [struct(jax.typeof(c)) for c in consts]
    return like(jax.make_jaxpr(lifted)(*extra, *structs), old), consts


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """`(num_consts, num_carry)` of a scan; JAX 0.12 keeps them in a tree."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    flat = list(range(len(params["jaxpr"].in_avals)))
    consts, carry, _ = params["ft_in"].update(flat).unpack()
    return len(list(consts)), len(list(carry))
