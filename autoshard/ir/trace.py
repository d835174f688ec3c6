"""Tracing a function into a `Program` that knows what each argument is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoshard.ir.errors import InputError
from autoshard.ir.program import Program, build
from autoshard.ir.train_step import TrainStep, path_string


@dataclass(frozen=True, slots=True)
class InputInfo:
    """What a flat argument is.

    Attributes:
        path: `params/blocks/q`, `opt_state/0/mu/...`, `batch/tokens`, ...
        shape: Global shape.
        dtype: Element type's name.
        state: `params`, `optimizer`, `data` or `other`.
        logical: Name per dim where the user or the role gave one.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    state: str
    logical: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Traced:
    """A traced function.

    Attributes:
        program: Its ops.
        jaxpr: The closed jaxpr they were read from.
        inputs: One entry per flat argument.
        out_tree: Structure of the results.
        out_source: Per flat result, the flat argument it replaces, or -1.
        args: The abstract arguments.
    """

    program: Program
    jaxpr: Any
    inputs: tuple[InputInfo, ...]
    out_tree: Any
    out_source: tuple[int, ...]
    args: tuple[Any, ...]


def data_names(shape: tuple[int, ...], dtype: Any) -> tuple[str | None, ...]:
    """Names of the dims of a data input, by role.

    The leading dim is the batch; the second dim of an integer array (token ids) is the
    sequence.

    >>> data_names((8, 128), np.int32)
    ('batch', 'seq')
    >>> data_names((8, 32, 32, 3), np.float32)
    ('batch', None, None, None)
    """
    names: list[str | None] = [None] * len(shape)
    if shape:
        names[0] = "batch"
    if len(shape) > 1 and np.issubdtype(dtype, np.integer):
        names[1] = "seq"
    return tuple(names)


def abstract(tree: Any) -> Any:
    """The same pytree with `jax.ShapeDtypeStruct` leaves."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        held = isinstance(x, np.ndarray | np.generic)
        if held or not hasattr(x, "shape") or not hasattr(x, "dtype"):
            x = jax.typeof(np.asarray(x))  # as JAX takes it: float64 as float32
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    return jax.tree.map(one, tree)


def trace(fn: Callable[..., Any], args: Sequence[Any]) -> Traced:
    """Traces `fn`; nothing is computed and no device is needed.

    Args:
        fn: A `TrainStep`, or any function whose last argument is the batch and whose
            other arguments are state.
        args: Arrays or `jax.ShapeDtypeStruct`s. For a `TrainStep` the batch alone is
            enough.

    Returns:
        The traced program.

    Raises:
        InputError: The arguments do not fit the function.

    >>> import jax.numpy as jnp
    >>> traced = trace(lambda w, x: (x @ w).sum(), [jnp.ones((4, 2)), jnp.ones((8, 4))])
    >>> [i.path for i in traced.inputs], len(traced.program.ops)
    (['0', 'batch'], 2)
    """
    abstract_args = tuple(abstract(a) for a in args)
    logical: dict[str, tuple[str | None, ...]] = {}
    if isinstance(fn, TrainStep):
        if len(abstract_args) == 1:
            abstract_args = (fn.abstract_state(), *abstract_args)
        if len(abstract_args) != 2:
            raise InputError(
                f"a TrainStep takes (batch) or (state, batch); got {len(args)} "
                "arguments."
            )
        logical = fn.logical_axes
    elif not abstract_args:
        raise InputError(
            "trace needs the function's abstract arguments, the batch last; got none."
        )
    jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(*abstract_args)
    inputs = tuple(_inputs(fn, abstract_args, logical))
    program = build(jaxpr, [i.path for i in inputs])
    if not isinstance(fn, TrainStep):
        inputs = _with_optimizer_states(program, inputs)
    return Traced(
        program=program,
        jaxpr=jaxpr,
        inputs=inputs,
        out_tree=jax.tree.structure(out),
        out_source=_out_source(abstract_args, out),
        args=abstract_args,
    )


def _inputs(
    fn: Any, args: tuple[Any, ...], logical: dict[str, Any]
) -> Iterator[InputInfo]:
    for number, arg in enumerate(args):
        is_batch = number == len(args) - 1
        for path, leaf in jax.tree_util.tree_flatten_with_path(arg)[0]:
            name = path_string(path)
            if is_batch:
                name = f"batch/{name}" if name else "batch"
                state, names = "data", data_names(leaf.shape, leaf.dtype)
            elif isinstance(fn, TrainStep):
                head = name.split("/")[0]
                state = {"params": "params", "opt_state": "optimizer"}.get(
                    head, "other"
                )
                names = logical.get(name, (None,) * leaf.ndim)
                if len(names) != leaf.ndim:
                    raise InputError(
                        f"annotation {names} of parameter {name!r} names "
                        f"{len(names)} dims, but its shape is {leaf.shape}; give one "
                        "name per dim, None for a dim without a name."
                    )
            else:
                name = f"{number}/{name}" if name else str(number)
                inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
                state = "params" if inexact and leaf.ndim else "other"
                names = (None,) * leaf.ndim
            yield InputInfo(name, tuple(leaf.shape), str(leaf.dtype), state, names)


_SAME_SHAPE = frozenset({"convert_element_type", "copy", "mul", "add", "sub", "square"})


def _with_optimizer_states(
    program: Program, inputs: tuple[InputInfo, ...]
) -> tuple[InputInfo, ...]:
    """In a plain function, states touched only point by point are optimizer state.

    A parameter takes part in a product, a lookup or a broadcast somewhere; a moment
    of an optimizer never does.
    """
    consumers: dict[int, set[str]] = {}
    for op in program.ops:
        for value in op.inputs:
            consumers.setdefault(value, set()).add(op.primitive)
    return tuple(
        InputInfo(i.path, i.shape, i.dtype, "optimizer", i.logical)
        if i.state == "params"
        and consumers.get(v, set()) <= _SAME_SHAPE
        and consumers.get(v)
        else i
        for i, v in zip(inputs, program.inputs, strict=True)
    )


def _out_source(args: tuple[Any, ...], out: Any) -> tuple[int, ...]:
    """Pairs each top-level result with the state argument of the same structure."""
    starts, at = [], 0
    for arg in args:
        starts.append(at)
        at += len(jax.tree.leaves(arg))
    free = dict(enumerate(args[:-1]))
    results = out if isinstance(out, tuple) and not hasattr(out, "_fields") else (out,)
    source: list[int] = []
    for result in results:
        leaves, tree = jax.tree.flatten(result)
        match = next(
            (
                number
                for number, arg in free.items()
                if jax.tree.structure(arg) == tree
                and [(x.shape, x.dtype) for x in jax.tree.leaves(arg)]
                == [(x.shape, x.dtype) for x in leaves]
            ),
            None,
        )
        if match is None or not leaves:
            source += [-1] * len(leaves)
        else:
            del free[match]
            source += range(starts[match], starts[match] + len(leaves))
    return tuple(source)
