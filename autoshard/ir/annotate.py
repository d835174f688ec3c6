"""`annotate`: the identity that names the dims of a value for autoshard.

It is a primitive of its own, so that it survives tracing, differentiation and
batching, and so that a reader of the jaxpr can count the annotations that arrived.
On a single device it lowers to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from autoshard.ir import _jaxcompat
from autoshard.ir.errors import InputError

_jaxcompat.hide_from_source_lines(__file__)

Watcher = Callable[[str, str], None]
"""Told the kind and the source line of each annotation that a trace comes across."""

WATCHER: ContextVar[Watcher | None] = ContextVar("autoshard_watcher", default=None)

annotate_p = Primitive("autoshard_annotate")
annotate_p.def_impl(lambda x, **_: x)
annotate_p.def_abstract_eval(lambda x, **_: x)


def _batch(args: Any, batched: Any, **params: Any) -> Any:
    (x,), (dim,) = args, batched
    for key in ("names", "mesh_axes"):
        entries = params[key]
        if entries is not None:
            params[key] = (*entries[:dim], None, *entries[dim:])
    return annotate_p.bind(x, **params), dim


ad.deflinear2(annotate_p, lambda ct, _, **params: [annotate_p.bind(ct, **params)])
batching.primitive_batchers[annotate_p] = _batch
mlir.register_lowering(annotate_p, mlir.lower_fun(lambda x, **_: x, False))


def annotate(x: jax.Array, *names: str | None) -> jax.Array:
    """Names the dims of `x` with logical axes; the identity on one device.

    Args:
        x: Any array.
        *names: One logical axis per dim, such as `"batch", "seq", "embed"`; `None`
            for a dim without a name.

    Returns:
        `x` itself.

    Raises:
        InputError: The number of names is not the rank of `x`, or a name is given to
            two dims.

    >>> import jax.numpy as jnp
    >>> annotate(jnp.ones((2, 3)), "batch", "embed").shape
    (2, 3)
    """
    if len(names) != x.ndim:
        raise InputError(
            f"annotate got {len(names)} names {names} for an array of shape {x.shape}; "
            f"give one name per dim ({x.ndim}), None for a dim without a name."
        )
    given = [name for name in names if name is not None]
    if len(given) != len(set(given)):
        raise InputError(
            f"annotate got {names} for shape {x.shape}: a logical axis names two dims; "
            "one mesh axis cannot shard two dims of one array. Rename one of them."
        )
    return bind(x, "annotate", names=names)


def bind(
    x: jax.Array,
    kind: str,
    *,
    names: tuple[Any, ...] | None = None,
    dims: tuple[tuple[str, ...] | None, ...] | None = None,
) -> jax.Array:
    """Leaves an annotation of `x` in the jaxpr.

    Args:
        x: Any array.
        kind: The kind of annotation, in the user's words.
        names: Names per dim, of logical axes or of mesh axes.
        dims: Mesh axes per dim; `()` is closed, `None` open.

    Returns:
        `x` itself.
    """
    watcher = WATCHER.get()
    if watcher is not None:
        watcher(kind, _jaxcompat.here())
    return annotate_p.bind(x, names=names, mesh_axes=dims, role="", path="", kind=kind)


def mark(x: jax.Array, role: str, path: str) -> jax.Array:
    """Marks `x` as the `role` ("gradient") of the parameter at `path`."""
    return annotate_p.bind(
        x, names=None, mesh_axes=None, role=role, path=path, kind="mark"
    )
