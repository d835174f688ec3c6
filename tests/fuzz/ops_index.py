"""Indexing in all its forms, and random numbers from keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from fuzz.kit import Kit, Skip, Value, draws, runs
from jax import lax


def indices(kit: Kit, below: int, low: int = 0, high: int = 2) -> Value:
    """Integers that index a dim of this size; a new input if there are none."""

    def fits(v: Value) -> bool:
        return v.dtype == "int32" and 0 < v.below <= below and low <= v.rank <= high

    try:
        return kit.any(fits)
    except Skip:
        shape = tuple(kit.pick((8, 4, 6, 3)) for _ in range(kit.integer(low, high)))
        return kit.new_input(shape, "int32", below)


@draws("gather")
def _take(kit: Kit) -> None:
    """An embedding lookup, along any dim."""
    x = kit.floats(1, 3)
    axis = 0 if kit.flip() else kit.dim(x)
    index = indices(kit, x.shape[axis])
    shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    if len(shape) > 4:
        raise Skip
    kit.emit("take", [x, index], [shape], axis=axis, mag=x.mag, exact=x.exact)


@runs
def _take_run(x: jax.Array, index: jax.Array, *, axis: int) -> jax.Array:
    return jnp.take(x, index, axis=axis, mode="clip")


@draws("gather")
def _take_along(kit: Kit) -> None:
    """Indices beside the operand in every other dim: batch dims of a gather."""
    x = kit.floats(1, 3)
    axis = kit.dim(x)

    def fits(v: Value) -> bool:
        return (
            v.dtype == "int32"
            and 0 < v.below <= x.shape[axis]
            and v.rank == x.rank
            and all(
                m == n
                for d, (m, n) in enumerate(zip(v.shape, x.shape, strict=True))
                if d != axis
            )
        )

    try:
        index = kit.any(fits)
    except Skip:
        n = kit.pick((1, 2, 4))
        shape = (*x.shape[:axis], n, *x.shape[axis + 1 :])
        index = kit.new_input(shape, "int32", x.shape[axis])
    kit.emit(
        "take_along", [x, index], [index.shape], axis=axis, mag=x.mag, exact=x.exact
    )


@runs
def _take_along_run(x: jax.Array, index: jax.Array, *, axis: int) -> jax.Array:
    return jnp.take_along_axis(x, index, axis=axis, mode="clip")


@draws("gather")
def _windows(kit: Kit) -> None:
    """Windows of a few rows from indexed places: a gather with partial slices."""
    x = kit.floats(1, 2)
    length = kit.integer(1, x.shape[0])
    index = indices(kit, x.shape[0], 1, 1)
    shape = (index.shape[0], length, *x.shape[1:])
    kit.emit("windows", [x, index], [shape], length=length, mag=x.mag, exact=x.exact)


@runs
def _windows_run(x: jax.Array, index: jax.Array, *, length: int) -> jax.Array:
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, x.ndim + 1)),
        collapsed_slice_dims=(),
        start_index_map=(0,),
    )
    sizes = (length, *x.shape[1:])
    return lax.gather(x, index[:, None], numbers, sizes, mode="clip")


@draws("scatter")
def _segment_sum(kit: Kit) -> None:
    x = kit.floats(1, 3)
    segments = kit.pick((4, 8, 3))

    def fits(v: Value) -> bool:
        return v.dtype == "int32" and v.below > 0 and v.shape == x.shape[:1]

    try:
        index = kit.any(fits)
    except Skip:
        index = kit.new_input(x.shape[:1], "int32", segments)
    segments = max(segments, index.below)
    kit.emit(
        "segment_sum",
        [x, index],
        [(segments, *x.shape[1:])],
        segments=segments,
        mag=1.5 * x.mag,
    )


@runs
def _segment_sum_run(x: jax.Array, index: jax.Array, *, segments: int) -> jax.Array:
    return jax.ops.segment_sum(x, index, segments)


@draws("scatter")
def _scatter(kit: Kit) -> None:
    """Updates at indexed places along one dim, combined in any way."""
    names = ["add", "set", "max", "min"]
    if not kit.smooth:  # it has a derivative for indices that occur once alone
        names.append("multiply")
    how = kit.pick(names)
    x = kit.floats(1, 3, kink=how in ("max", "min"))
    axis = kit.dim(x)
    index = indices(kit, x.shape[axis], 1, 1)
    shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])

    def fits(v: Value) -> bool:
        return v.dtype == "float32" and v.shape == shape and (v.exact or not kit.smooth)

    try:
        updates = kit.any(fits)
    except Skip:
        updates = kit.new_input(shape)
    kit.emit(
        "scatter",
        [x, index, updates],
        [x.shape],
        how=how,
        axis=axis,
        mag=x.mag + updates.mag,
        exact=how in ("max", "min") and x.exact and updates.exact,
    )


@runs
def _scatter_run(
    x: jax.Array, index: jax.Array, updates: jax.Array, *, how: str, axis: int
) -> jax.Array:
    if how == "set":  # the order of equal indices is not defined: use each once
        n = x.shape[axis]
        count = min(n, index.shape[0])
        index = (index[0] + lax.iota(jnp.int32, count)) % n
        updates = lax.slice_in_dim(updates, 0, count, axis=axis)
    if how == "multiply":
        updates = 1 + 0.2 * jnp.tanh(updates)
    place = (slice(None),) * axis + (index,)
    kwargs = {"mode": "promise_in_bounds"} if how == "set" else {"mode": "drop"}
    return getattr(jnp.asarray(x).at[place], how)(updates, **kwargs)


@draws("dynamic")
def _dynamic_slice(kit: Kit) -> None:
    x = kit.floats(1, 3)
    axis = kit.dim(x)
    start = indices(kit, x.shape[axis], 0, 0)
    most = x.shape[axis] - start.below + 1  # never past the end
    size = kit.pick((1, max(most // 2, 1), most))
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    kit.emit(
        "dynamic_slice",
        [x, start],
        [shape],
        axis=axis,
        size=size,
        mag=x.mag,
        exact=x.exact,
    )


@runs
def _dynamic_slice_run(
    x: jax.Array, start: jax.Array, *, axis: int, size: int
) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


@draws("dynamic")
def _dynamic_update(kit: Kit) -> None:
    x = kit.floats(1, 3)
    axis = kit.dim(x)
    start = indices(kit, x.shape[axis], 0, 0)

    def fits(v: Value) -> bool:
        return (
            v.dtype == "float32"
            and v.rank == x.rank
            and all(
                m <= n - start.below + 1 if d == axis else m == n
                for d, (m, n) in enumerate(zip(v.shape, x.shape, strict=True))
            )
        )

    update = kit.any(fits)
    kit.emit(
        "dynamic_update",
        [x, update, start],
        [x.shape],
        axis=axis,
        mag=max(x.mag, update.mag),
        exact=x.exact and update.exact,
    )


@runs
def _dynamic_update_run(
    x: jax.Array, update: jax.Array, start: jax.Array, *, axis: int
) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, update, start, axis)


def _key(kit: Kit) -> Value:
    try:
        return kit.any(lambda v: v.dtype == "key" and v.shape == ())
    except Skip:
        return kit.new_input((), "key")


@draws("random")
def _bits(kit: Kit) -> None:
    key = _key(kit)
    how = kit.pick(("uniform", "normal", "bits", "bernoulli", "randint"))
    shape = kit.shape()
    dtype = {"bernoulli": "bool", "bits": "int32", "randint": "int32"}
    kit.emit(
        "random",
        [key],
        [shape],
        how=how,
        shape=list(shape),
        dtype=dtype.get(how, "float32"),
        exact=how != "normal",
        below=4 if how in ("bits", "randint") else 0,
    )


@runs
def _random_run(key: jax.Array, *, how: str, shape: list[int]) -> jax.Array:
    size = tuple(shape)
    if how == "bits":
        return (jax.random.bits(key, size, jnp.uint32) >> 30).astype(jnp.int32)
    if how == "randint":
        return jax.random.randint(key, size, 0, 4)
    kwargs: dict[str, Any] = {"minval": -1.0} if how == "uniform" else {}
    return getattr(jax.random, how)(key, shape=size, **kwargs)


@draws("random")
def _fold_in(kit: Kit) -> None:
    kit.emit("fold_in", [_key(kit)], [()], data=kit.integer(0, 9), dtype="key")


@runs
def _fold_in_run(key: jax.Array, *, data: int) -> jax.Array:
    return jax.random.fold_in(key, data)


@draws("random")
def _split_key(kit: Kit) -> None:
    kit.emit("split_key", [_key(kit)], [(), ()], dtype="key")


@runs
def _split_key_run(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    first, second = jax.random.split(key)
    return first, second
