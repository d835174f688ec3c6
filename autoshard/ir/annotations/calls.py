"""Annotations made by calls while a function is traced.

`nn.with_logical_constraint` does nothing without rules and a mesh in the context, and
`jax.lax.with_sharding_constraint` and `jax.sharding.reshard` raise where the mesh does
not suit them. While a function is traced these calls are answered here instead, so
that each leaves an equation behind whatever the context is.

A function is answered for by exchanging its code object for the time of the trace: that
reaches every reference to it, `from flax.linen import with_logical_constraint`
included. Nothing that a trace cached before can be reused meanwhile, since a JAX user
context makes other cache keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, cast

import jax
from flax.core import spmd
from flax.linen import spmd as linen_spmd
from jax.experimental.layout import Format
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, Sharding

from autoshard.ir import _jaxcompat
from autoshard.ir.annotate import WATCHER, bind
from autoshard.ir.annotations.entry import mapped
from autoshard.ir.annotations.names import spec_dims
from autoshard.ir.errors import InputError

_jaxcompat.hide_from_source_lines(__file__)

CONSTRAINT = "with_sharding_constraint"
LOGICAL = "nn.with_logical_constraint"
RESHARD = "reshard"

_CONTEXT = jax.make_user_context(None)


@dataclass
class Calls:
    """The annotations that a trace came across.

    Attributes:
        sites: Kind and source line of each; the same line counts once however often
            it is traced.
        hints: What to tell the user, in words.
    """

    sites: dict[tuple[str, str], None] = field(default_factory=dict)
    hints: dict[str, None] = field(default_factory=dict)

    def add(self, kind: str, line: str) -> None:
        """Counts one call."""
        self.sites[kind, line] = None


@contextlib.contextmanager
def watched(*, explicit: bool = False) -> Iterator[Calls]:
    """While it is open, every annotating call leaves an equation and is counted.

    Args:
        explicit: Leave the mesh of the context as it is, and the calls that work only
            on a mesh with Explicit axes to JAX.
    """
    calls = Calls()
    with contextlib.ExitStack() as stack:
        token = WATCHER.set(calls.add)
        stack.callback(WATCHER.reset, token)
        stack.enter_context(_CONTEXT("explicit" if explicit else "auto"))
        if not explicit:
            stack.enter_context(_auto_mesh())
            for function, answer in (
                (jax.lax.with_sharding_constraint, _constraint),
                (jax.sharding.reshard, _reshard),
            ):
                stack.enter_context(answered(function, answer, calls))
        stack.enter_context(
            answered(linen_spmd.with_logical_constraint, _logical, calls)
        )
        yield calls


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """While it is open, every annotating call is the identity.

    Where parameters are made, what is done with them does not matter, and the mesh that
    the calls speak of need not exist.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_CONTEXT("silent"))
        for function in (
            jax.lax.with_sharding_constraint,
            jax.sharding.reshard,
            linen_spmd.with_logical_constraint,
        ):
            stack.enter_context(answered(function, _same))
        yield


def _same(before: Any, *args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("x", kwargs.get("xs"))


def _answer(*args: Any, _with: Any, **kwargs: Any) -> Any:
    return _with(*args, **kwargs)


@contextlib.contextmanager
def answered(
    function: Any, answer: Callable[..., Any], *first: Any
) -> Iterator[FunctionType]:
    """While it is open, calls of a function go to another one.

    Args:
        function: A plain Python function without a closure.
        answer: Called with what the function did before, `first`, and the arguments.
        *first: Passed on.
    """
    assert isinstance(function, FunctionType), function
    held = (function.__code__, function.__defaults__, function.__kwdefaults__)
    before = FunctionType(held[0], function.__globals__, function.__name__, held[1])
    before.__kwdefaults__ = cast("dict[str, Any]", held[2])

    def reply(*args: Any, **kwargs: Any) -> Any:
        return answer(before, *first, *args, **kwargs)

    function.__code__ = _answer.__code__
    function.__defaults__ = None
    function.__kwdefaults__ = {"_with": reply}
    try:
        yield before
    finally:
        function.__code__, function.__defaults__, kwdefaults = held
        function.__kwdefaults__ = cast("dict[str, Any]", kwdefaults)


# -- meshes ----------------------------------------------------------------------


def explicit_axes(mesh: Any) -> tuple[str, ...]:
    """The Explicit axes of a mesh."""
    if mesh.empty:
        return ()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _auto_mesh() -> Any:
    """The mesh of the context with Auto in place of Explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if not explicit_axes(mesh):
        return contextlib.nullcontext()
    types = tuple(
        AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types
    )
    return jax.sharding.use_abstract_mesh(
        AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)
    )


# -- answers ---------------------------------------------------------------------


def _is_target(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | Sharding | Format)


def _spec_of(target: Any, kind: str) -> PartitionSpec:
    if isinstance(target, Format):
        target = target.sharding
    if isinstance(target, PartitionSpec):
        return target
    if isinstance(target, NamedSharding):
        return target.spec
    raise InputError(
        f"{kind} at {_jaxcompat.here()} got {target!r}, which names no mesh axes; give "
        "it a PartitionSpec or a NamedSharding."
    )


def _bound(kind: str, x: Any, targets: Any) -> Any:
    """Leaves mesh axes with every array of `x`; `targets` is a prefix of it."""

    def one(target: Any, part: Any) -> Any:
        spec = _spec_of(target, kind)
        return jax.tree.map(
            lambda leaf: bind(
                leaf,
                kind,
                dims=spec_dims(
                    spec, jax.numpy.ndim(leaf), f"{kind} at {_jaxcompat.here()}"
                ),
            ),
            part,
        )

    return jax.tree.map(one, targets, x, is_leaf=_is_target)


def _constraint(before: Any, calls: Calls, x: Any, shardings: Any) -> Any:
    context = jax.sharding.get_abstract_mesh()
    if context.empty:
        context = _jaxcompat.legacy_mesh()

    def suits(target: Any) -> bool:
        if isinstance(target, Format):
            target = target.sharding
        if isinstance(target, PartitionSpec):
            return not context.empty and not explicit_axes(context)
        if isinstance(target, NamedSharding):
            return not explicit_axes(target.mesh)
        return True

    if all(map(suits, jax.tree.leaves(shardings, is_leaf=_is_target))):
        calls.add(CONSTRAINT, _jaxcompat.here())
        return before(x, shardings)
    return _bound(CONSTRAINT, x, shardings)


def _reshard(before: Any, calls: Calls, xs: Any, out_shardings: Any) -> Any:
    return _bound(RESHARD, xs, out_shardings)


def _is_names(x: Any) -> bool:
    if x is None or isinstance(x, PartitionSpec):
        return True
    plain = isinstance(x, tuple) and not hasattr(x, "_fields")
    return plain and all(
        e is None or isinstance(e, str) or e is PartitionSpec.UNCONSTRAINED for e in x
    )


def _logical(
    before: Any,
    calls: Calls,
    x: Any,
    logical_axis_resources: Any,
    rules: Any = None,
    mesh: Any = None,
    fallback: Any = linen_spmd.RulesFallback.AXIS_IS_UNSHARDED,
) -> Any:
    in_force = tuple(spmd.get_logical_axis_rules() if rules is None else rules)
    keys = {name for name, _ in in_force}

    def one(names: Any, leaf: Any) -> Any:
        if names is None:
            return leaf
        where = f"{LOGICAL} at {_jaxcompat.here()}"
        names = tuple(names)
        if len(names) > leaf.ndim:
            raise InputError(
                f"{where}: {names} names {len(names)} dims, but the array has shape "
                f"{leaf.shape}; give one name per dim."
            )
        if not in_force:
            names = tuple(
                None if n is PartitionSpec.UNCONSTRAINED else n for n in names
            )
            names += (None,) * (leaf.ndim - len(names))
            return bind(leaf, LOGICAL, names=names)
        unknown = [n for n in names if isinstance(n, str) and n not in keys]
        if unknown and fallback != linen_spmd.RulesFallback.AXIS_IS_UNSHARDED:
            if fallback == linen_spmd.RulesFallback.RAISE_ERROR:
                raise InputError(
                    f"{where}: the flax logical axis rules in force have none for "
                    f"{unknown}, and the call says fallback=RAISE_ERROR. Add one."
                )
            calls.hints[
                f"{where} asks for no constraint where a name has no rule, and "
                f"{unknown} have none."
            ] = None
            return leaf
        calls.hints[mapped(LOGICAL, in_force)] = None
        spec = linen_spmd.logical_to_mesh_axes(names, in_force)
        assert spec is not None
        return bind(leaf, LOGICAL, dims=spec_dims(spec, leaf.ndim, where))

    return jax.tree.map(one, logical_axis_resources, x, is_leaf=_is_names)
