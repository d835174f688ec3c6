"""Reductions of each kind, running ones, orders, windows and Fourier transforms."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from fuzz.kit import Kit, Skip, Value, draws, runs
from fuzz.ops_pointwise import BELOW
from jax import lax

_KINDS = ("sum", "mean", "var", "prod", "logsumexp", "max", "min", "softmax")


def _without(value: Value, axes: list[int], keep: bool) -> tuple[int, ...]:
    return tuple(
        1 if d in axes else n
        for d, n in enumerate(value.shape)
        if keep or d not in axes
    )


@draws("reduce")
def _reduce(kit: Kit) -> None:
    how = kit.pick(_KINDS)
    x = kit.floats(1, kink=how in ("max", "min"))
    axes = sorted(kit.some(range(x.rank)))
    keep = kit.flip(4)
    shape = x.shape if how == "softmax" else _without(x, axes, keep)
    count = math.prod(x.shape[d] for d in axes)
    mag = {"sum": 0.7 * x.mag * math.sqrt(count), "logsumexp": 1 + math.log(count)}
    mag |= {"mean": max(0.7 * x.mag / math.sqrt(count), 1e-3), "softmax": 2 / count}
    mag |= {"var": 0.5 * x.mag**2}
    if how in ("max", "min"):
        mag[how] = x.mag
    exact = how in ("max", "min") and x.exact
    kit.emit(
        "reduce",
        [x],
        [shape],
        how=how,
        axes=axes,
        keep=keep,
        mag=mag.get(how, 1.0),
        exact=exact,
    )


@runs
def _reduce_run(x: jax.Array, *, how: str, axes: list[int], keep: bool) -> jax.Array:
    over: Any = tuple(axes)
    if how == "softmax":
        return jax.nn.softmax(x, axis=over)
    if how == "prod":
        return jnp.prod(1 + 0.1 * jnp.tanh(x), axis=over, keepdims=keep)
    if how == "logsumexp":
        return jax.nn.logsumexp(x, axis=over, keepdims=keep)
    return getattr(jnp, how)(x, axis=over, keepdims=keep)


@draws("reduce")
def _reduce_exact(kit: Kit) -> None:
    """Of integers and truth values."""
    x = kit.any(lambda v: v.dtype in ("int32", "bool") and v.rank > 0)
    axes = sorted(kit.some(range(x.rank)))
    how = kit.pick(("any", "all", "xor") if x.dtype == "bool" else ("sum", "max", "or"))
    below = BELOW if x.dtype == "int32" else 0
    shape = _without(x, axes, False)
    kit.emit(
        "reduce_exact",
        [x],
        [shape],
        how=how,
        axes=axes,
        dtype=x.dtype,
        exact=True,
        below=below,
    )


@runs
def _reduce_exact_run(x: jax.Array, *, how: str, axes: list[int]) -> jax.Array:
    if how == "xor":
        return lax.reduce_xor(x, tuple(axes))
    if x.dtype == bool:
        return getattr(jnp, how)(x, axis=tuple(axes))
    if how == "or":
        made = lax.reduce_or(x, tuple(axes))
    else:
        made = getattr(jnp, how)(x, axis=tuple(axes))
    return lax.rem(lax.abs(made), jnp.full_like(made, BELOW))


@draws("reduce")
def _arg(kit: Kit) -> None:
    x = kit.floats(1, exact=True)
    axis = kit.dim(x)
    kit.emit(
        "arg",
        [x],
        [_without(x, [axis], False)],
        how=kit.pick(("argmax", "argmin")),
        axis=axis,
        dtype="int32",
        exact=True,
        below=x.shape[axis],
    )


@runs
def _arg_run(x: jax.Array, *, how: str, axis: int) -> jax.Array:
    return getattr(lax, how)(x, axis, jnp.int32)


@draws("cumulative")
def _cumulative(kit: Kit) -> None:
    how = kit.pick(("sum", "prod", "max", "min", "logsumexp"))
    kinked = how in ("max", "min")
    x = kit.floats(1, kink=kinked)
    axis = kit.dim(x)
    mag = {"sum": 0.5 * x.mag * math.sqrt(x.shape[axis]), "prod": 1.0}
    kit.emit(
        "cumulative",
        [x],
        [x.shape],
        how=how,
        axis=axis,
        reverse=kit.flip(),
        mag=mag.get(how, x.mag),
        exact=kinked and x.exact,
    )


@runs
def _cumulative_run(x: jax.Array, *, how: str, axis: int, reverse: bool) -> jax.Array:
    if how == "prod":
        x = 1 + 0.2 * jnp.tanh(x)
    return getattr(lax, f"cum{how}")(x, axis=axis, reverse=reverse)


@draws("sort")
def _sort(kit: Kit) -> None:
    x = kit.floats(1, kink=True)
    kit.emit("sort", [x], [x.shape], axis=kit.dim(x), mag=x.mag, exact=x.exact)


@runs
def _sort_run(x: jax.Array, *, axis: int) -> jax.Array:
    return lax.sort(x, dimension=axis)


@draws("sort")
def _argsort(kit: Kit) -> None:
    """Two operands: the order of the first moves the second."""
    x = kit.floats(1, exact=True)
    axis = kit.dim(x)
    kit.emit(
        "argsort",
        [x],
        [x.shape],
        axis=axis,
        dtype="int32",
        exact=True,
        below=x.shape[axis],
    )


@runs
def _argsort_run(x: jax.Array, *, axis: int) -> jax.Array:
    order = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return lax.sort((x, order), dimension=axis, num_keys=1)[1]


@draws("sort")
def _top_k(kit: Kit) -> None:
    x = kit.floats(1, exact=True)
    axis = x.rank - 1
    k = kit.integer(1, x.shape[axis])
    shape = (*x.shape[:-1], k)
    values = kit.flip()
    kit.emit(
        "top_k",
        [x],
        [shape],
        k=k,
        values=values,
        dtype="float32" if values else "int32",
        mag=x.mag,
        exact=True,
        below=0 if values else x.shape[axis],
    )


@runs
def _top_k_run(x: jax.Array, *, k: int, values: bool) -> jax.Array:
    return lax.top_k(x, k)[0 if values else 1]


@draws("window")
def _window(kit: Kit) -> None:
    """Pooling over one or two dims of any value."""
    how = kit.pick(("sum", "max", "min", "logsumexp"))
    x = kit.floats(1, 4, kink=how in ("max", "min"))
    sizes, strides, padding, result = [], [], [], []
    chosen = kit.some(range(x.rank), 1, 2)
    for d, n in enumerate(x.shape):
        if d not in chosen:
            one = (1, 1, [0, 0])
        elif kit.flip() and n % 2 == 0:
            one = (2, 2, [0, 0])
        else:
            w = kit.integer(2, 3)
            low = kit.integer(0, w - 1)
            one = (w, kit.integer(1, 2), [low, kit.integer(0, w - 1)])
        sizes.append(one[0])
        strides.append(one[1])
        padding.append(one[2])
        result.append((n + sum(one[2]) - one[0]) // one[1] + 1)
    if min(result) < 1:
        raise Skip
    kit.emit(
        "window",
        [x],
        [tuple(result)],
        how=how,
        sizes=sizes,
        strides=strides,
        padding=padding,
        mag=x.mag * (math.sqrt(math.prod(sizes)) if how == "sum" else 1),
        exact=how in ("max", "min") and x.exact,
    )


@runs
def _window_run(x: jax.Array, *, how: str, **params: Any) -> jax.Array:
    sizes, strides = tuple(params["sizes"]), tuple(params["strides"])
    padding = [tuple(p) for p in params["padding"]]
    if how == "logsumexp":  # nothing else of JAX has this window
        shifted = lax.exp(jnp.tanh(x))
        total = lax.reduce_window(shifted, 0.0, lax.add, sizes, strides, padding)
        return lax.log(1 + total)
    init = {"sum": 0.0, "max": -jnp.inf, "min": jnp.inf}[how]
    combine = {"sum": lax.add, "max": lax.max, "min": lax.min}[how]
    return lax.reduce_window(x, init, combine, sizes, strides, padding)


@draws("fft")
def _fft(kit: Kit) -> None:
    x = kit.floats(1, 3)
    how = kit.pick(("fft", "ifft", "rfft"))
    over = kit.integer(1, min(2, x.rank))
    shape = x.shape
    if how == "rfft":
        shape = (*shape[:-1], shape[-1] // 2 + 1)
    count = math.prod(x.shape[-over:])
    mag = 0.7 * x.mag * (math.sqrt(count) if how != "ifft" else 1 / math.sqrt(count))
    kit.emit("fft", [x], [shape, shape], how=how, over=over, mag=mag)


@runs
def _fft_run(x: jax.Array, *, how: str, over: int) -> tuple[jax.Array, jax.Array]:
    made = getattr(jnp.fft, f"{how}n")(x, axes=tuple(range(x.ndim - over, x.ndim)))
    return lax.real(made), lax.imag(made)
