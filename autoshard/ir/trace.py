"""Tracing a function into a `Program` that knows what each argument is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoshard.ir import _jaxcompat
from autoshard.ir.annotations import metadata
from autoshard.ir.annotations.account import Account
from autoshard.ir.annotations.calls import Calls, explicit_axes, watched
from autoshard.ir.annotations.names import Words
from autoshard.ir.annotations.notes import Note, Reading, read
from autoshard.ir.errors import (
    AutoshardError,
    InputError,
    NoForwardDerivativeError,
)
from autoshard.ir.program import Program, build, no_collection
from autoshard.ir.seeds import AnnotationReport, Seed
from autoshard.ir.ties import Blocks, find_blocks
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
        blocks: What repeats in the program.
        seeds: What annotations fix in mesh axes.
        annotations: How many annotations were found and how many reached the jaxpr.
        mesh_sizes: Size of each of the user's mesh axes that a manual region fixes.
    """

    program: Program
    jaxpr: Any
    inputs: tuple[InputInfo, ...]
    out_tree: Any
    out_source: tuple[int, ...]
    args: tuple[Any, ...]
    blocks: Blocks
    seeds: tuple[Seed, ...] = ()
    annotations: AnnotationReport = field(default_factory=AnnotationReport)
    mesh_sizes: dict[str, int] = field(default_factory=dict)


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
    if len(shape) > 1 and jnp.issubdtype(dtype, jnp.integer):
        names[1] = "seq"
    return tuple(names)


def abstract(tree: Any, *, typed: bool = False) -> Any:
    """The same pytree with `jax.ShapeDtypeStruct` leaves.

    Args:
        tree: Arrays, numbers or `jax.ShapeDtypeStruct`s in any pytree.
        typed: Whether to keep shardings on meshes with Explicit axes, where they are
            part of an array's type. All others are dropped.
    """

    def one(x: Any) -> jax.ShapeDtypeStruct:
        held = isinstance(x, np.ndarray | np.generic)
        if held or not hasattr(x, "shape") or not hasattr(x, "dtype"):
            x = jax.typeof(np.asarray(x))  # as JAX takes it: float64 as float32
        sharding = getattr(x, "sharding", None) if typed else None
        if not _is_explicit(sharding):
            sharding = None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def _is_explicit(sharding: Any) -> bool:
    mesh = getattr(sharding, "mesh", None)
    return mesh is not None and bool(explicit_axes(mesh))


@no_collection()
def trace(
    fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    aliases: Mapping[str, str] | None = None,
    logical: Iterable[str] = (),
) -> Traced:
    """Traces `fn`; nothing is computed and no device is needed.

    Args:
        fn: A `TrainStep`, or any function whose last argument is the batch and whose
            other arguments are state.
        args: Arrays or `jax.ShapeDtypeStruct`s. For a `TrainStep` the batch alone is
            enough. Boxes, variables and shardings in them are annotations.
        aliases: Names of mesh axes, beside those that autoshard knows, that annotations
            may use.
        logical: Names of logical axes, beside those that autoshard knows.

    Returns:
        The traced program.

    Raises:
        InputError: The arguments do not fit the function, or an annotation does not
            fit what it annotates; the function takes a forward derivative of a
            `jax.custom_vjp` function.

    >>> import jax.numpy as jnp
    >>> traced = trace(lambda w, x: (x @ w).sum(), [jnp.ones((4, 2)), jnp.ones((8, 4))])
    >>> [i.path for i in traced.inputs], len(traced.program.ops)
    (['0', 'batch'], 2)
    """
    args = with_state(fn, args)
    words = Words(frozenset(logical), aliases or {})
    inputs, reading = described(fn, args, words)
    abstract_args = tuple(abstract(a) for a in args)
    jaxpr, out, calls = _jaxpr(fn, args, abstract_args)
    if isinstance(fn, TrainStep):
        calls = fn.calls or calls
    paths = tuple(i.path for i in inputs)
    try:
        program = build(jaxpr, paths)
    except NoForwardDerivativeError:
        # JAX leaves such an equation in a gradient in which nothing uses it.
        jaxpr = _jaxcompat.without_dead(jaxpr)
        program = build(jaxpr, paths)
    account = Account(words)
    account.inputs(program, paths, reading.notes)
    program = account.ops(program)
    if not isinstance(fn, TrainStep):
        inputs = _with_optimizer_states(program, inputs)
    return Traced(
        blocks=find_blocks(program),
        program=program,
        jaxpr=jaxpr,
        inputs=inputs,
        out_tree=jax.tree.structure(out),
        out_source=_out_source(abstract_args, out),
        args=abstract_args,
        seeds=tuple(account.seeds),
        annotations=account.report(reading, calls),
        mesh_sizes={a: n for r in program.regions for a, n in r.manual.items()},
    )


def with_state(fn: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments, the state of a `TrainStep` among them.

    Raises:
        InputError: They are too few or too many.
    """
    args = tuple(args)
    if isinstance(fn, TrainStep):
        if len(args) == 1:
            args = (fn.abstract_state(), *args)
        if len(args) != 2:
            raise InputError(
                f"a TrainStep takes (batch) or (state, batch); got {len(args)} "
                "arguments."
            )
    elif not args:
        raise InputError(
            "trace needs the function's abstract arguments, the batch last; got none."
        )
    return args


def described(
    fn: Any, args: tuple[Any, ...], words: Words
) -> tuple[tuple[InputInfo, ...], Reading]:
    """What each flat argument is, and the annotations that arguments carry.

    Args:
        fn: As in `trace`.
        args: Of `with_state`.
        words: Which names are mesh axes.
    """
    inputs = tuple(_inputs(fn, tuple(abstract(a) for a in args)))
    reading = _read(fn, args, inputs, words)
    named = tuple(_named(i, reading.notes.get(k)) for k, i in enumerate(inputs))
    return named, reading


def _jaxpr(
    fn: Callable[..., Any], args: tuple[Any, ...], abstract_args: tuple[Any, ...]
) -> tuple[Any, Any, Calls]:
    """Traces with Auto in place of Explicit axes, or as it is where that fails."""

    def fresh() -> Callable[..., Any]:  # what JAX has never traced, so nothing cached
        return lambda *args: fn(*args)

    try:
        with watched() as calls:
            traced, out = jax.make_jaxpr(fresh(), return_shape=True)(*abstract_args)
        return traced, out, calls
    except AutoshardError:
        raise
    except Exception as error:
        context = explicit_axes(jax.sharding.get_abstract_mesh())
        leaves = jax.tree.leaves(args)
        if not context and not any(
            _is_explicit(getattr(x, "sharding", None)) for x in leaves
        ):
            raise
        typed = tuple(abstract(a, typed=True) for a in args)
        try:
            with watched(explicit=True) as calls:
                traced, out = jax.make_jaxpr(fresh(), return_shape=True)(*typed)
        except Exception as as_written:
            raise InputError(
                "the function cannot be traced on the mesh with Explicit axes that its "
                f"context or arguments bring ({as_written}), nor with Auto axes in "
                f"their place ({error}). Make the mesh with axis_types="
                "(jax.sharding.AxisType.Auto,) * n, and where an operation takes "
                "out_sharding=spec, constrain its result instead: "
                "jax.lax.with_sharding_constraint(y, spec)."
            ) from as_written
        return traced, out, calls


def _inputs(fn: Any, args: tuple[Any, ...]) -> Iterator[InputInfo]:
    for number, arg in enumerate(args):
        is_batch = number == len(args) - 1
        for path, leaf in jax.tree_util.tree_flatten_with_path(arg)[0]:
            name = path_string(path)
            names: tuple[str | None, ...] = (None,) * leaf.ndim
            if is_batch:
                name = f"batch/{name}" if name else "batch"
                state, names = "data", data_names(leaf.shape, leaf.dtype)
            elif isinstance(fn, TrainStep):
                head = name.split("/")[0]
                state = {"params": "params", "opt_state": "optimizer"}.get(
                    head, "other"
                )
            else:
                name = f"{number}/{name}" if name else str(number)
                inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
                state = "params" if inexact and leaf.ndim else "other"
            yield InputInfo(name, tuple(leaf.shape), str(leaf.dtype), state, names)


# -- annotations of inputs -------------------------------------------------------

_FACTORED = frozenset({"opt_state", "v", "v_col", "v_row"})
"""Parts of a path under which an annotation may have another rank than its array."""


def _read(
    fn: Any, args: tuple[Any, ...], inputs: tuple[InputInfo, ...], words: Words
) -> Reading:
    """The annotations that the arguments carry, by flat input."""
    whole = Reading()
    start = 0
    for number, arg in enumerate(args):
        prefix = "batch/" if number == len(args) - 1 else f"{number}/"
        if isinstance(fn, TrainStep) and number == 0:
            prefix = ""
        found = read(
            arg,
            prefix,
            words,
            factored=lambda path: not _FACTORED.isdisjoint(path.split("/")),
        )
        for leaf, notes in found.notes.items():
            whole.notes[start + leaf] = notes
        whole.lost += found.lost
        whole.hints += found.hints
        start += len(jax.tree.leaves(arg))
    if isinstance(fn, TrainStep):
        hints, lost = fn.remarks
        whole.hints += hints
        whole.lost += lost
        _read_variables(whole, fn, inputs, words)
    return whole


def _read_variables(
    whole: Reading, step: TrainStep, inputs: tuple[InputInfo, ...], words: Words
) -> None:
    """Metadata of an NNX model; a moment follows its parameter, found by path."""
    followed: dict[str, tuple[tuple[int, ...], Note]] = {}
    at = {info.path: leaf for leaf, info in enumerate(inputs)}
    for path, variable in step.variables.items():
        if path not in at:
            continue
        leaf, shape = at[path], inputs[at[path]].shape
        entry = metadata.read_variable(variable, path, shape, words)
        moments = metadata.read_optimizer(variable, path, shape, words)
        for one in (entry, moments):
            if one is not None:
                whole.lost += one.lost
                whole.hints += one.hints
        if entry.says:
            whole.add(leaf, Note(entry.kind, entry.logical, entry.dims))
        tail = path.removeprefix("params/")
        if moments is not None:
            note = Note(moments.kind, moments.logical, moments.dims)
            followed[tail] = (shape, note)
        elif entry.says:
            note = Note(entry.kind, entry.logical, entry.dims, counted=False)
            followed[tail] = (shape, note)
    for leaf, info in enumerate(inputs):
        if info.state != "optimizer" or leaf in whole.notes or not followed:
            continue
        parts = info.path.split("/")
        for cut in range(1, len(parts)):
            shape, note = followed.get("/".join(parts[cut:]), ((), None))
            if note is not None and shape == info.shape:
                whole.add(leaf, note)
                break


def _named(info: InputInfo, notes: list[Note] | None) -> InputInfo:
    for note in notes or ():
        if note.logical is not None:
            pairs = zip(note.logical, info.logical, strict=True)
            return replace(info, logical=tuple(a or b for a, b in pairs))
    return info


# -- optimizer states and results ------------------------------------------------

_SAME_VALUE = frozenset({"convert_element_type", "copy"})
_SAME_SHAPE = _SAME_VALUE | {"mul", "add", "sub", "square"}


def _with_optimizer_states(
    program: Program, inputs: tuple[InputInfo, ...]
) -> tuple[InputInfo, ...]:
    """In a plain function, states touched only point by point are optimizer state.

    A parameter takes part in a product, a lookup or a broadcast somewhere, be it in
    another precision than it is stored in; a moment of an optimizer never does.
    """
    consumers: dict[int, set[str]] = {}
    # Against the order of execution, so that a cast has what its results meet.
    for op in reversed(program.ops):
        met = {op.primitive}
        if op.primitive in _SAME_VALUE:
            met |= consumers.get(op.outputs[0], set())
        shape = program.values[op.outputs[0]].shape if op.outputs else ()
        for value in op.inputs:
            if value < 0:
                continue
            found = consumers.setdefault(value, set())
            found.update(met)
            if program.values[value].shape != shape:
                found.add("broadcast")  # `add` and its like repeat dims of size one
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
