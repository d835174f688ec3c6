"""Ops that work point by point, on floats, integers and truth values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from fuzz.describe import floating
from fuzz.kit import Kit, Skip, Value, draws, runs
from jax import lax

_SMOOTH = {
    "sin": lax.sin,
    "cos": lax.cos,
    "tanh": lax.tanh,
    "logistic": lax.logistic,
    "erf": lax.erf,
    "erfc": lambda x: lax.erfc(lax.tanh(x)),
    "erf_inv": lambda x: lax.erf_inv(0.8 * lax.tanh(x)),
    "exp": lambda x: lax.exp(lax.tanh(x)),
    "exp2": lambda x: lax.exp2(lax.tanh(x)),
    "expm1": lambda x: lax.expm1(lax.tanh(x)),
    "log": lambda x: lax.log(2.5 + lax.sin(x)),
    "log1p": lambda x: lax.log1p(x * x),
    "sqrt": lambda x: lax.sqrt(1.5 + lax.sin(x)),
    "rsqrt": lambda x: lax.rsqrt(1 + x * x),
    "cbrt": lambda x: lax.cbrt(2.5 + lax.sin(x)),
    "square": lambda x: lax.square(lax.sin(x)),
    "cube": lambda x: lax.integer_pow(lax.sin(x), 3),
    "reciprocal": lambda x: lax.integer_pow(2.5 + lax.sin(x), -1),
    "atan": lax.atan,
    "asin": lambda x: lax.asin(0.8 * lax.tanh(x)),
    "acos": lambda x: lax.acos(0.8 * lax.tanh(x)),
    "asinh": lax.asinh,
    "acosh": lambda x: lax.acosh(3.0 + lax.sin(x)),
    "atanh": lambda x: lax.atanh(0.8 * lax.tanh(x)),
    "sinh": lambda x: lax.sinh(lax.tanh(x)),
    "cosh": lambda x: lax.cosh(lax.tanh(x)),
    "tan": lambda x: lax.tan(lax.tanh(x)),
    "lgamma": lambda x: lax.lgamma(2.5 + lax.sin(x)),
    "digamma": lambda x: lax.digamma(3.0 + lax.sin(x)),
    "bessel_i0e": lax.bessel_i0e,
    "bessel_i1e": lax.bessel_i1e,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
}
_IDENTITY = {
    "neg": lax.neg,
    "copy": jnp.copy,
    "stop_gradient": lax.stop_gradient,
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 23),
    "optimization_barrier": lax.optimization_barrier,
}
_KINKED = {
    "abs": lax.abs,
    "relu": jax.nn.relu,
    "clamp": lambda x: lax.clamp(-1.0, x, 1.0),
}
_JUMPING = {
    "floor": lambda x: lax.floor(4 * x) / 4,
    "ceil": lambda x: lax.ceil(4 * x) / 4,
    "round": lambda x: lax.round(4 * x) / 4,
    "sign": lax.sign,
    "rem": lambda x: lax.rem(x, 0.5),
}
_BINARY = {
    "add": (lax.add, 1.4),
    "sub": (lax.sub, 1.4),
    "mul": (lambda a, b: lax.mul(a, lax.sin(b)), 1.0),
    "plain_mul": (lax.mul, None),
    "div": (lambda a, b: lax.div(a, 2 + lax.sin(b)), 0.5),
    "atan2": (lambda a, b: lax.atan2(a, 2 + lax.sin(b)), 0.5),
    "pow": (lambda a, b: lax.pow(2.5 + lax.sin(a), lax.tanh(b)), 1.0),
    "hypot": (lambda a, b: lax.sqrt(1 + a * a + b * b), 1.4),
    "max": (lax.max, 1.0),
    "min": (lax.min, 1.0),
}
_ROUNDED = {"add": lax.add, "sub": lax.sub, "mul": lax.mul}
_LOGICAL = {"and": lax.bitwise_and, "or": lax.bitwise_or, "xor": lax.bitwise_xor}
_ORDERED = {"max": lax.max, "min": lax.min}
_SHIFTED = {
    "left": lambda a, b: lax.shift_left(a, lax.rem(b, jnp.full_like(b, 3))),
    "right": lambda a, b: lax.shift_right_logical(a, lax.rem(b, jnp.full_like(b, 3))),
    "arithmetic": lambda a, b: lax.shift_right_arithmetic(
        a, lax.rem(b, jnp.full_like(b, 3))
    ),
}
_INTEGER = {**_ROUNDED, **_LOGICAL, **_ORDERED, **_SHIFTED}
_COMPARE = {"lt": lax.lt, "le": lax.le, "gt": lax.gt, "ge": lax.ge, "eq": lax.eq}
BELOW = 7
"""Integers that ops make lie in `[0, BELOW)`, so that all of them are indices."""


@draws("elementwise")
def _unary(kit: Kit) -> None:
    kind = kit.integer(0, 5)
    if kind <= 2:
        x = kit.floats()
        kit.emit("unary", [x], [x.shape], fn=kit.pick(list(_SMOOTH)), mag=1.0)
        return
    if kind == 3:
        x, names = kit.floats(), list(_IDENTITY)
    elif kind == 4:
        x, names = kit.floats(kink=True), list(_KINKED)
    else:
        x, names = kit.floats(exact=True), list(_JUMPING)
    name = kit.pick(names)
    kit.emit("unary", [x], [x.shape], fn=name, mag=x.mag, exact=x.exact)


@runs
def _unary_run(x: jax.Array, *, fn: str) -> jax.Array:
    return {**_SMOOTH, **_IDENTITY, **_KINKED, **_JUMPING}[fn](x)


def _broadcasts(a: Value, b: Value) -> tuple[int, ...] | None:
    """The shape that numpy would broadcast both to."""
    long, short = (a.shape, b.shape) if a.rank >= b.rank else (b.shape, a.shape)
    padded = (1,) * (len(long) - len(short)) + short
    if any(m != n and 1 not in (m, n) for m, n in zip(long, padded, strict=True)):
        return None
    return tuple(n if m == 1 else m for m, n in zip(long, padded, strict=True))


def partner(kit: Kit, x: Value, *, exact: bool = False) -> Value:
    """A float that broadcasts against `x`; a new input if there is none."""
    try:
        return kit.any(
            lambda v: (
                v.dtype == x.dtype
                and (v.exact or not exact)
                and v.id != x.id
                and _broadcasts(v, x) is not None
            )
        )
    except Skip:
        shape = x.shape[kit.integer(0, x.rank) :]
        return kit.new_input(shape, x.dtype, x.below)


@draws("elementwise")
def _binary(kit: Kit) -> None:
    name = kit.pick(list(_BINARY))
    kinked = name in ("max", "min")
    a = kit.floats(kink=kinked)
    b = partner(kit, a, exact=kinked and kit.smooth)
    factor = _BINARY[name][1]
    mag = a.mag * b.mag if factor is None else factor * max(a.mag, b.mag, 0.3)
    exact = kinked and a.exact and b.exact
    shape = _broadcasts(a, b)
    assert shape is not None
    kit.emit("binary", [a, b], [shape], fn=name, mag=mag, exact=exact)


@runs
def _binary_run(a: jax.Array, b: jax.Array, *, fn: str) -> jax.Array:
    a, b = jnp.broadcast_arrays(a, b)
    return _BINARY[fn][0](a, b)


@draws("elementwise")
def _integer(kit: Kit) -> None:
    a = kit.any(lambda v: v.dtype == "int32")
    b = partner(kit, a)
    shape = _broadcasts(a, b)
    assert shape is not None
    name = kit.pick(list(_INTEGER))
    kit.emit(
        "integer", [a, b], [shape], fn=name, dtype="int32", exact=True, below=BELOW
    )


@runs
def _integer_run(a: jax.Array, b: jax.Array, *, fn: str) -> jax.Array:
    made = _INTEGER[fn](*jnp.broadcast_arrays(a, b))
    return lax.rem(lax.abs(made), jnp.full_like(made, BELOW))


@draws("elementwise")
def _bits(kit: Kit) -> None:
    """Counts bits of an integer, or of a float's representation."""
    names = ["population_count", "clz", "not"]
    floats = kit.flip()
    x = kit.floats(exact=True) if floats else kit.any(lambda v: v.dtype == "int32")
    kit.emit(
        "bits", [x], [x.shape], fn=kit.pick(names), dtype="int32", exact=True, below=5
    )


@runs
def _bits_run(x: jax.Array, *, fn: str) -> jax.Array:
    if floating(x):
        x = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    made = {"population_count": lax.population_count, "clz": lax.clz, "not": ~x}[fn]
    made = made if fn == "not" else made(x)
    return lax.bitwise_and(made, jnp.full_like(made, 3))


@draws("elementwise")
def _convert(kit: Kit) -> None:
    x = kit.any(lambda v: v.dtype in ("int32", "bool"))
    kit.emit("convert", [x], [x.shape], mag=2.0, exact=True)


@runs
def _convert_run(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.result_type(float))
    return wide if x.dtype == bool else wide / 4 - 1


@draws("elementwise")
def _truncate(kit: Kit) -> None:
    x = kit.floats(exact=True)
    kit.emit("truncate", [x], [x.shape], dtype="int32", exact=True, below=BELOW)


@runs
def _truncate_run(x: jax.Array) -> jax.Array:
    whole = lax.abs((x * 5).astype(jnp.int32))
    return lax.rem(whole, jnp.full_like(whole, BELOW))


@draws("select")
def _compare(kit: Kit) -> None:
    whole = kit.flip()
    a = kit.any(lambda v: v.dtype == "int32") if whole else kit.floats(exact=True)
    b = partner(kit, a, exact=True)
    shape = _broadcasts(a, b)
    assert shape is not None
    name = kit.pick(list(_COMPARE))
    kit.emit("compare", [a, b], [shape], fn=name, dtype="bool", exact=True)


@runs
def _compare_run(a: jax.Array, b: jax.Array, *, fn: str) -> jax.Array:
    return _COMPARE[fn](*jnp.broadcast_arrays(a, b))


@draws("select")
def _select(kit: Kit) -> None:
    mask = kit.any(lambda v: v.dtype == "bool")
    a = partner_float(kit, mask)
    shape = _broadcasts(mask, a)
    assert shape is not None
    b = kit.any(lambda v: v.dtype == "float32" and _fits(v, shape))
    made = _broadcasts(Value(0, shape), b)
    assert made is not None
    kit.emit(
        "select",
        [mask, a, b],
        [made],
        mag=max(a.mag, b.mag),
        exact=a.exact and b.exact,
    )


def partner_float(kit: Kit, mask: Value) -> Value:
    """A float that broadcasts against a mask."""
    try:
        return kit.any(lambda v: v.dtype == "float32" and _fits(v, mask.shape))
    except Skip:
        return kit.new_input(mask.shape)


def _fits(v: Value, shape: tuple[int, ...]) -> bool:
    return _broadcasts(v, Value(0, shape)) is not None


@runs
def _select_run(mask: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(mask, a, b)


@draws("select")
def _logical(kit: Kit) -> None:
    a = kit.any(lambda v: v.dtype == "bool")
    b = kit.any(lambda v: v.dtype == "bool" and _broadcasts(v, a) is not None)
    shape = _broadcasts(a, b)
    assert shape is not None
    name = kit.pick(list(_LOGICAL))
    kit.emit("logical", [a, b], [shape], fn=name, dtype="bool", exact=True)


@runs
def _logical_run(a: jax.Array, b: jax.Array, *, fn: str) -> jax.Array:
    return lax.bitwise_not(_LOGICAL[fn](*jnp.broadcast_arrays(a, b)))
