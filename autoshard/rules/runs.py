"""How an op is run by itself, on arrays of any size."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from autoshard.ir import _jaxcompat
from autoshard.ir.program import LINK, Op, Program
from autoshard.rules.core import Shape
from autoshard.rules.foreign import call_on_parts, foreign
from autoshard.rules.pieces import Arrays, Run
from autoshard.rules.registry import entries, shapes_of

_WHERE = (
    "layout_constraint", "preduced", "pvary", "reduced_vary_cast",
    "reduced_vary_cast_p", "reshard", "sharding_constraint", "vary_unreduced_cast",
    "vary_unreduced_cast_p",
)  # fmt: skip
"""Identities that run only in a `jit` or in a manual region."""

UNCHECKED = {
    "after_all": "it has no values",
    "create_token": "it has no values",
    "dce_sink": "it has no results",
    "empty": "it has no values",
    "empty2": "it has no values",
    "random_gamma": "a device makes the samples of its own positions",
    "rng_uniform": "it gives other numbers at each call",
}
"""Primitives that say nothing when they are run, and why."""

MADE_ALONE = {"iota", "iota_2x32_shape", "random_bits"}
"""A device adds the offset of its piece to what stands in no operand."""

_HOST = {
    "check", "debug_callback", "debug_print", "inspect_sharding", "io_callback",
    "pure_callback",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Runner:
    """How an op is run by itself.

    Attributes:
        run: Runs it.
        whole_only: Why it can be run on no part; empty if it can.
        unchecked: Why running it says nothing; empty if it does.
        made_alone: Why factors that stand in no operand are not tried.
    """

    run: Run
    whole_only: str = ""
    unchecked: str = ""
    made_alone: str = ""


def runner(program: Program, op: Op) -> Runner:
    """How to run an op.

    Raises:
        InputError: It is a foreign call that cannot be run on parts.
    """
    name = op.primitive
    if name == LINK:
        return Runner(functools.partial(_linked, op, shapes_of(program, op)[1][0]))
    if name in _HOST:
        return Runner(_nothing, whole_only="Python on the host sees whole arrays")
    known = entries().get(name)
    if known is not None and known.family == "collective":
        part = "in a manual region a value is a device's part, which is not cut again"
        return Runner(_nothing, whole_only=part)
    if name in UNCHECKED:
        return Runner(_nothing, unchecked=UNCHECKED[name])
    if name in _WHERE:
        return Runner(_same)
    if name in ("scaled_matmul", "scaled_matmul_wrapper"):
        return Runner(_scaled)
    if foreign(op):
        call = call_on_parts(op)
        if call is not None:
            return Runner(functools.partial(_called, call))
    alone = "it depends on the position of the piece" if name in MADE_ALONE else ""
    return Runner(functools.partial(_bound, op.equation.primitive), made_alone=alone)


def _bound(primitive: Any, operands: Arrays, params: dict[str, Any]) -> Arrays:
    # Shardings are on the user's mesh, and no device of it is asked for.
    params = {k: None if isinstance(v, Sharding) else v for k, v in params.items()}
    out = primitive.bind(*operands, **primitive.get_bind_params(params))
    return list(out) if primitive.multiple_results else [out]


def _called(call: Any, operands: Arrays, params: dict[str, Any]) -> Arrays:
    del params
    out = call(*operands)
    return list(out) if isinstance(out, tuple | list) else [out]


def _same(operands: Arrays, params: dict[str, Any]) -> Arrays:
    del params
    return list(operands)


def _nothing(operands: Arrays, params: dict[str, Any]) -> Arrays:
    del operands, params
    return []


def _scaled(operands: Arrays, params: dict[str, Any]) -> Arrays:
    """`scaled_matmul` as it is defined; JAX has it for GPUs only."""
    del params
    lhs, rhs, *scales = (np.asarray(x).astype(np.float32) for x in operands)
    wide = [
        x * np.repeat(scale, x.shape[2] // scale.shape[2], axis=2)
        for x, scale in zip((lhs, rhs), scales, strict=True)
    ]
    return [np.einsum("bmk,bnk->bmn", *wide)]


def _linked(op: Op, shape: Shape, operands: Arrays, params: dict[str, Any]) -> Arrays:
    """One turn of what a link stands for."""
    del params
    [x] = operands
    kind, lead = op.params["kind"], op.params["lead"]
    if lead:
        length = op.equation.params["length"]
        return [x[0] if kind == "slice" else np.stack([x] * length)]
    if op.params.get("names"):
        cut = x[tuple(slice(n) for n in shape)]
        ways = [n // m for n, m in zip(shape, cut.shape, strict=True)]
        return [np.tile(cut, ways)]
    return [x]


def sample_operands(op: Op, seed: int = 0) -> Arrays:
    """Random operands in which an op finds its way: indices point into their table.

    Real numbers are between 0.1 and 0.9, where most functions are defined.
    """
    rng = np.random.default_rng(seed)
    avals = [v.aval for v in op.equation.invars] if op.primitive != LINK else []
    if op.primitive == LINK:
        return [_real(rng, shape, np.float32) for shape in op.operand_shapes]
    limits = _limits(op, len(avals))
    made: Arrays = []
    for k, (atom, aval) in enumerate(zip(op.equation.invars, avals, strict=True)):
        if _jaxcompat.is_literal(atom):
            made.append(np.asarray(atom.val, aval.dtype))
        elif jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
            key = jax.random.key(seed)
            made.append(jax.random.split(key, aval.shape) if aval.shape else key)
        elif aval.dtype == np.bool_:
            made.append(rng.random(aval.shape) < 0.5)
        elif jnp.issubdtype(aval.dtype, jnp.integer):
            numbers = rng.integers(0, limits[k], aval.shape)
            made.append(np.asarray(numbers, aval.dtype))
        else:
            made.append(_real(rng, aval.shape, aval.dtype))
    return made


def _real(rng: np.random.Generator, shape: Any, dtype: Any) -> Any:
    numbers = rng.uniform(0.1, 0.9, shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        numbers = numbers + 1j * rng.uniform(0.1, 0.9, shape)
    return np.asarray(numbers).astype(dtype)


def _windows(op: Op) -> tuple[tuple[int, ...], Shape]:
    """The dims that a gather or scatter indexes, and the size of what it moves."""
    numbers = op.params["dimension_numbers"]
    if op.primitive == "gather":
        return numbers.start_index_map, op.params["slice_sizes"]
    table, _, updates = op.operand_shapes
    rows = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    moved = iter(numbers.update_window_dims)
    sizes = tuple(1 if d in rows else updates[next(moved)] for d in range(len(table)))
    return numbers.scatter_dims_to_operand_dims, sizes


def _limits(op: Op, operands: int) -> list[Any]:
    """What integers of each operand stay below; per last dim for pairs of indices."""
    limits: list[Any] = [4] * operands
    shapes = op.operand_shapes
    name = op.primitive
    if name == "gather" or name.startswith("scatter"):
        at, sizes = _windows(op)
        limits[1] = [shapes[0][d] - sizes[d] + 1 for d in at]
    elif name == "select_n":
        limits[0] = operands - 1
    elif name == "ragged_dot_general":
        rows = min(shapes[0])
        limits[2] = max(rows // shapes[2][-1], 1) + 1
    elif name == "dynamic_slice":
        cut = zip(shapes[0], op.params["slice_sizes"], strict=True)
        limits[1:] = [n - m + 1 for n, m in cut]
    elif name == "dynamic_update_slice":
        cut = zip(shapes[0], shapes[1], strict=True)
        limits[2:] = [n - m + 1 for n, m in cut]
    return limits
