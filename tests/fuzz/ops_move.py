"""Ops that only rearrange: reshapes, transposes, broadcasts, slices, joins."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from fuzz.describe import floating
from fuzz.kit import Kit, Skip, Value, draws, runs
from jax import lax


def like(
    kit: Kit, x: Value, op: str, *shapes: tuple[int, ...], **params: Any
) -> list[Value]:
    """Emits an op whose results hold parts of `x`."""
    if any(0 in shape for shape in shapes):
        raise Skip
    return kit.emit(
        op,
        [x],
        shapes,
        dtype=x.dtype,
        mag=x.mag,
        exact=x.exact,
        below=x.below,
        **params,
    )


def some_value(kit: Kit, low: int = 1, high: int = 9) -> Value:
    """Mostly a float, sometimes an integer or a truth value."""
    if kit.flip(4):
        return kit.any(lambda v: v.dtype in ("int32", "bool") and low <= v.rank <= high)
    return kit.floats(low, high)


@draws("reshape")
def _merge(kit: Kit) -> None:
    x = some_value(kit, 2)
    d = kit.integer(0, x.rank - 2)
    shape = (*x.shape[:d], x.shape[d] * x.shape[d + 1], *x.shape[d + 2 :])
    like(kit, x, "reshape", shape, shape=list(shape))


@draws("reshape")
def _split(kit: Kit) -> None:
    x = some_value(kit)
    d = kit.dim(x, 2)
    n = x.shape[d]
    major = kit.pick([m for m in range(2, n + 1) if n % m == 0])
    if x.rank > 4:
        raise Skip
    shape = (*x.shape[:d], major, n // major, *x.shape[d + 1 :])
    like(kit, x, "reshape", shape, shape=list(shape))


@draws("reshape")
def _reshape(kit: Kit) -> None:
    """To any shape that has as many elements."""
    x = some_value(kit)
    left, shape = math.prod(x.shape), []
    while left > 1 and len(shape) < 3:
        n = kit.pick([m for m in range(2, left + 1) if left % m == 0])
        shape.append(n)
        left //= n
    shape.append(left)
    like(kit, x, "reshape", tuple(shape), shape=shape)


@runs
def _reshape_run(x: jax.Array, *, shape: list[int]) -> jax.Array:
    return lax.reshape(x, tuple(shape))


@draws("reshape")
def _squeeze(kit: Kit) -> None:
    x = some_value(kit)
    ones = [d for d, n in enumerate(x.shape) if n == 1]
    dims = sorted(kit.some(ones))
    shape = tuple(n for d, n in enumerate(x.shape) if d not in dims)
    like(kit, x, "squeeze", shape, dims=dims)


@runs
def _squeeze_run(x: jax.Array, *, dims: list[int]) -> jax.Array:
    return lax.squeeze(x, tuple(dims))


@draws("transpose")
def _transpose(kit: Kit) -> None:
    x = some_value(kit, 2)
    order = kit.some(range(x.rank), x.rank)
    shape = tuple(x.shape[d] for d in order)
    like(kit, x, "transpose", shape, order=order)


@runs
def _transpose_run(x: jax.Array, *, order: list[int]) -> jax.Array:
    return lax.transpose(x, tuple(order))


@draws("broadcast")
def _broadcast(kit: Kit) -> None:
    """New dims anywhere; dims of size one may grow."""
    x = some_value(kit, 0, 3)
    shape = [kit.size() if n == 1 and kit.flip() else n for n in x.shape]
    places = list(range(x.rank))
    for _ in range(kit.integer(0 if shape != list(x.shape) else 1, 2)):
        at = kit.integer(0, len(shape))
        shape.insert(at, kit.size())
        places = [p + (p >= at) for p in places]
    like(kit, x, "broadcast", tuple(shape), shape=shape, places=places)


@runs
def _broadcast_run(x: jax.Array, *, shape: list[int], places: list[int]) -> jax.Array:
    return lax.broadcast_in_dim(x, tuple(shape), tuple(places))


@draws("broadcast")
def _iota(kit: Kit) -> None:
    shape = kit.shape()
    axis = kit.integer(0, len(shape) - 1)
    kit.emit(
        "iota",
        [],
        [shape],
        shape=list(shape),
        axis=axis,
        dtype="int32",
        exact=True,
        below=shape[axis],
    )


@runs
def _iota_run(*, shape: list[int], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, tuple(shape), axis)


@runs
def _constant_run(*, shape: list[int], dtype: str) -> jax.Array:
    """What takes the place of an op in a program that is made smaller."""
    count = lax.iota(jnp.int32, max(math.prod(shape), 1)).reshape(shape)
    return lax.cos(count.astype(dtype)) if floating(dtype) else count % 2


@draws("slice")
def _slice(kit: Kit) -> None:
    x = some_value(kit)
    start, limit, stride = [0] * x.rank, list(x.shape), [1] * x.rank
    for d in kit.some(range(x.rank), 1, 2):
        n = x.shape[d]
        start[d] = kit.pick((0, n // 2, kit.integer(0, n - 1)))
        limit[d] = kit.pick((n, max(n // 2, start[d] + 1), n - 1))
        limit[d] = max(limit[d], start[d] + 1)
        stride[d] = kit.pick((1, 1, 2))
    shape = [-(-(b - a) // s) for a, b, s in zip(start, limit, stride, strict=True)]
    like(kit, x, "slice", tuple(shape), start=start, limit=limit, stride=stride)


@runs
def _slice_run(x: jax.Array, **p: list[int]) -> jax.Array:
    return lax.slice(x, p["start"], p["limit"], p["stride"])


@draws("slice")
def _pad(kit: Kit) -> None:
    x = some_value(kit)
    config = [[0, 0, 0] for _ in x.shape]
    for d in kit.some(range(x.rank), 1, 2):
        n = x.shape[d]
        config[d] = [kit.integer(0, 2), kit.integer(0, 2), kit.pick((0, 0, 1))]
        if kit.flip(4):
            config[d][0] = -kit.integer(0, (n - 1) // 2)
    shape = [
        n + low + high + max(n - 1, 0) * inner
        for n, (low, high, inner) in zip(x.shape, config, strict=True)
    ]
    like(kit, x, "pad", tuple(shape), config=config)


@runs
def _pad_run(x: jax.Array, *, config: list[list[int]]) -> jax.Array:
    return lax.pad(x, jnp.zeros((), x.dtype), [tuple(c) for c in config])


@draws("concatenate")
def _concatenate(kit: Kit) -> None:
    x = some_value(kit)
    axis = kit.dim(x)
    parts = [x]
    for _ in range(kit.integer(1, 2)):
        parts.append(
            kit.any(
                lambda v: (
                    v.dtype == x.dtype
                    and v.rank == x.rank
                    and all(
                        m == n or d == axis
                        for d, (m, n) in enumerate(zip(v.shape, x.shape, strict=True))
                    )
                )
            )
        )
    total = sum(p.shape[axis] for p in parts)
    shape = (*x.shape[:axis], total, *x.shape[axis + 1 :])
    kit.emit(
        "concatenate",
        parts,
        [shape],
        axis=axis,
        dtype=x.dtype,
        mag=max(p.mag for p in parts),
        exact=all(p.exact for p in parts),
        below=max(p.below for p in parts),
    )


@runs
def _concatenate_run(*parts: jax.Array, axis: int) -> jax.Array:
    return lax.concatenate(parts, axis)


@draws("concatenate")
def _stack(kit: Kit) -> None:
    x = some_value(kit, 0, 3)
    y = kit.any(lambda v: v.dtype == x.dtype and v.shape == x.shape)
    axis = kit.integer(0, x.rank)
    shape = (*x.shape[:axis], 2, *x.shape[axis:])
    kit.emit(
        "stack",
        [x, y],
        [shape],
        axis=axis,
        dtype=x.dtype,
        mag=max(x.mag, y.mag),
        exact=x.exact and y.exact,
        below=max(x.below, y.below),
    )


@runs
def _stack_run(*parts: jax.Array, axis: int) -> jax.Array:
    return jnp.stack(parts, axis)


@draws("slice")
def _parts(kit: Kit) -> None:
    """`lax.split` into parts of any size."""
    x = some_value(kit)
    axis = kit.dim(x, 2)
    n = x.shape[axis]
    first = kit.pick((n // 2, kit.integer(1, n - 1)))
    shapes = [(*x.shape[:axis], k, *x.shape[axis + 1 :]) for k in (first, n - first)]
    like(kit, x, "parts", *shapes, axis=axis, sizes=[first, n - first])


@runs
def _parts_run(x: jax.Array, *, axis: int, sizes: list[int]) -> list[jax.Array]:
    return list(lax.split(x, tuple(sizes), axis))


@draws("concatenate")
def _rev(kit: Kit) -> None:
    x = some_value(kit)
    like(kit, x, "rev", x.shape, dims=sorted(kit.some(range(x.rank), 1, 2)))


@runs
def _rev_run(x: jax.Array, *, dims: list[int]) -> jax.Array:
    return lax.rev(x, tuple(dims))


@draws("concatenate")
def _roll(kit: Kit) -> None:
    x = some_value(kit)
    axis = kit.dim(x)
    like(kit, x, "roll", x.shape, axis=axis, by=kit.integer(-2, 3))


@runs
def _roll_run(x: jax.Array, *, axis: int, by: int) -> jax.Array:
    return jnp.roll(x, by, axis)


@draws("broadcast")
def _tile(kit: Kit) -> None:
    x = some_value(kit, 1, 3)
    reps = [kit.pick((1, 2, 1, 3)) for _ in x.shape]
    shape = tuple(n * r for n, r in zip(x.shape, reps, strict=True))
    like(kit, x, "tile", shape, reps=reps)


@runs
def _tile_run(x: jax.Array, *, reps: list[int]) -> jax.Array:
    return jnp.tile(x, reps)
