"""One small program per rule, and the rule's text beside it, derived by hand.

Letters follow the order in which a rule makes its factors: a dim of size one has none,
results come first where the rule starts from them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry2x32_p
from jax.scipy import special

from autoshard.ir.annotate import annotate
from autoshard.ir.program import Op, Program, build

F32, I32, U32, BOOL, C64 = "float32", "int32", "uint32", "bool", "complex64"
BF16 = "bfloat16"
KEY = "key"


class Arg(NamedTuple):
    """An operand: shape, dtype, and for indices the largest value plus one."""

    shape: tuple[int, ...]
    dtype: str = F32
    below: int = 4


class Case(NamedTuple):
    """A function, its arguments, the primitive to look at, and its rule's text."""

    primitive: str
    fn: Any
    args: tuple[Arg, ...]
    text: str


def values(case: Case, seed: int = 0) -> list[Any]:
    """Concrete arguments, away from the edges of every function's domain."""
    rng = np.random.default_rng(seed)

    def one(arg: Arg) -> Any:
        if arg.dtype == KEY:
            return jax.random.key(seed)
        if arg.dtype == BOOL:
            return jnp.asarray(rng.random(arg.shape) < 0.5)
        if arg.dtype in (I32, U32):
            return jnp.asarray(rng.integers(0, arg.below, arg.shape), arg.dtype)
        real = rng.uniform(0.1, 0.9, arg.shape)
        if arg.dtype == C64:
            return jnp.asarray(real + 1j * rng.uniform(0.1, 0.9, arg.shape), C64)
        return jnp.asarray(real, arg.dtype)

    return [one(arg) for arg in case.args]


@functools.cache
def program_of(case: Case) -> tuple[Program, Op]:
    """The built program and the first op of the case's primitive."""
    program = build(jax.make_jaxpr(case.fn)(*values(case)), [])
    found = [op for op in program.ops if op.primitive == case.primitive]
    assert found, f"{case.primitive}: only {[op.primitive for op in program.ops]}"
    return program, found[0]


X = Arg((4, 6))
V = Arg((6,))
SAME = "i j -> i j {i=4 j=6}"
SAME2 = "i j, i j -> i j {i=4 j=6}"
N, M, B, Z = Arg((4, 6), I32), Arg((4, 6), U32), Arg((4, 6), BOOL), Arg((4, 6), C64)

_UNARY = {
    "abs": jnp.abs, "acos": lax.acos, "acosh": lambda x: lax.acosh(x + 1),
    "asin": lax.asin, "asinh": lax.asinh, "atan": lax.atan, "atanh": lax.atanh,
    "cbrt": lax.cbrt, "ceil": lax.ceil, "cos": lax.cos, "cosh": lax.cosh,
    "digamma": lax.digamma, "erf": lax.erf, "erf_inv": lax.erf_inv, "erfc": lax.erfc,
    "exp": lax.exp, "exp2": lax.exp2, "expm1": lax.expm1, "floor": lax.floor,
    "integer_pow": lambda x: lax.integer_pow(x, 3), "is_finite": lax.is_finite,
    "lgamma": special.gammaln, "log": lax.log, "log1p": lax.log1p,
    "logistic": lax.logistic, "neg": lax.neg, "round": lax.round, "rsqrt": lax.rsqrt,
    "sign": lax.sign, "sin": lax.sin, "sinh": lax.sinh, "sqrt": lax.sqrt,
    "square": lax.square, "tan": lax.tan, "tanh": lax.tanh,
    "autoshard_annotate": lambda x: annotate(x, "a", None),
    "convert_element_type": lambda x: x.astype(jnp.bfloat16),
    "copy": lambda x: jnp.array(x, copy=True), "device_put": jax.device_put,
    "name": lambda x: checkpoint_name(x, "kept"),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 7),
    "stop_gradient": lax.stop_gradient,
}  # fmt: skip

_BINARY = {
    "add": lax.add, "atan2": lax.atan2, "complex": lax.complex, "div": lax.div,
    "eq": lax.eq, "ge": lax.ge, "gt": lax.gt, "le": lax.le, "lt": lax.lt,
    "max": lax.max, "min": lax.min, "mul": lax.mul, "ne": lax.ne,
    "nextafter": lax.nextafter, "pow": lax.pow, "rem": lax.rem, "sub": lax.sub,
}  # fmt: skip

_INTEGER = {
    "and": lax.bitwise_and, "or": lax.bitwise_or, "xor": lax.bitwise_xor,
    "shift_left": lax.shift_left,
    "shift_right_arithmetic": lax.shift_right_arithmetic,
    "shift_right_logical": lax.shift_right_logical,
}  # fmt: skip

ELEMENTWISE = [
    *(Case(name, fn, (X,), SAME) for name, fn in _UNARY.items()),
    *(Case(name, fn, (X, X), SAME2) for name, fn in _BINARY.items()),
    *(Case(name, fn, (N, N), SAME2) for name, fn in _INTEGER.items()),
    Case("not", lax.bitwise_not, (N,), SAME),
    Case("population_count", lax.population_count, (M,), SAME),
    Case("conj", lax.conj, (Z,), SAME),
    Case("imag", lax.imag, (Z,), SAME),
    Case("real", lax.real, (Z,), SAME),
    # The cotangents of the two uses of x meet in an add_any.
    Case("add_any", jax.grad(lambda x: (lax.sin(x) * lax.cos(x)).sum()), (X,), SAME2),
    # A scalar operand has no dims, a dim of size one no factor.
    Case(
        "clamp",
        lambda x: lax.clamp(0.2, x, 0.8),
        (X,),
        "., i j, . -> i j {i=4 j=6}",
    ),
    Case("add", lax.add, (Arg((4, 1, 6)),) * 2, "i 1 j, i 1 j -> i 1 j {i=4 j=6}"),
    # Read over and over along a dim: that operand has no part of the factor to hold.
    Case("mul", lambda x, s: x * s, (X, Arg((1, 6))), "i j, 1 j -> i j {i=4 j=6}"),
    Case("select_n", lax.select, (B, X, X), "i j, i j, i j -> i j {i=4 j=6}"),
    Case(
        "select_n",
        lambda x, y: lax.select_n(x[0, 0] > y[0, 0], x, y),
        (X, X),
        "., i j, i j -> i j {i=4 j=6}",
    ),
    Case(
        "threefry2x32",
        threefry2x32_p.bind,
        (Arg((8,), U32),) * 4,
        "i, i, i, i -> i, i {i=8}",
    ),
    Case(
        "bitcast_convert_type",
        lambda x: lax.bitcast_convert_type(x, jnp.int32),
        (X,),
        SAME,
    ),
    # Four bytes of a word become a dim of their own.
    Case(
        "bitcast_convert_type",
        lambda x: lax.bitcast_convert_type(x, jnp.uint8),
        (X,),
        "i j -> i j k {i=4 j=6 k=4} blocked k",
    ),
    Case(
        "bitcast_convert_type",
        lambda x: lax.bitcast_convert_type(x, jnp.float32),
        (Arg((4, 6, 2), BF16),),
        "i j k -> i j {i=4 j=6 k=2} blocked k",
    ),
    Case(
        "optimization_barrier",
        lambda x, y: lax.optimization_barrier((x, y)),
        (X, Arg((2,))),
        "i j, k -> i j, k {i=4 j=6 k=2}",
    ),
]


def _reshape(*sizes: int) -> Any:
    return lambda x: lax.reshape(x, sizes)


SHAPE = [
    Case("broadcast_in_dim", lambda x: jnp.broadcast_to(x, (4, 6)), (V,),
         "j -> i j {i=4 j=6}"),
    Case("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (4, 6), (0, 1)),
         (Arg((4, 1)),), "i 1 -> i j {i=4 j=6}"),
    Case("iota", lambda: lax.iota(jnp.int32, 8), (), " -> i {i=8}"),
    Case("empty", lambda: lax.empty((4, 6), jnp.float32), (), " -> i j {i=4 j=6}"),
    Case("transpose", lambda x: lax.transpose(x, (2, 0, 1)), (Arg((4, 6, 2)),),
         "i j k -> k i j {i=4 j=6 k=2}"),
    # Sizes are matched from the right, so the last dim has the first letter.
    Case("squeeze", lambda x: lax.squeeze(x, (1,)), (Arg((4, 1, 6)),),
         "j 1 i -> j i {i=6 j=4}"),
    Case("reshape", _reshape(24), (X,), "j i -> (ji) {i=6 j=4}"),
    Case("reshape", _reshape(4, 6), (Arg((24,)),), "(ji) -> j i {i=6 j=4}"),
    Case("reshape", _reshape(6, 4), (Arg((2, 12)),),
         "k (ji) -> (kj) i {i=4 j=3 k=2}"),
    Case("reshape", _reshape(6, 4), (X,),
         "i j -> k l {i=4 j=6 k=6 l=4} blocked i j k l"),
    Case("reshape", _reshape(3, 4, 4), (Arg((2, 6, 4)),),
         "j k i -> l m i {i=4 j=2 k=6 l=3 m=4} blocked j k l m"),
    Case("reshape", _reshape(0), (Arg((0, 4)),),
         "i j -> k {i=0 j=4 k=0} blocked i j k"),
    Case("slice", lambda x: lax.slice(x, (0, 1), (4, 3)), (X,),
         "i j -> i k {i=4 j=6 k=2} blocked j k"),
    # Padding of 1 and -1 keeps the size and shifts the content.
    Case("pad", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, -1, 0))), (X,),
         "i j, . -> i k {i=4 j=6 k=6} blocked j k"),
    Case("rev", lambda x: lax.rev(x, (1,)), (X,), "i j -> i j {i=4 j=6} blocked j"),
    Case("tile", lambda x: jnp.tile(x, (1, 2)), (X,),
         "i j -> i k {i=4 j=6 k=12} blocked j k"),
    Case("concatenate", lambda x, y: lax.concatenate([x, y], 1), (Arg((4, 2)), X),
         "i j, i k -> i l {i=4 j=2 k=6 l=8} blocked j k l"),
    Case("split", lambda x: lax.split(x, (2, 4), 1), (X,),
         "i l -> i j, i k {i=4 j=2 k=4 l=6} blocked j k l"),
    Case("stack", lambda x, y: jnp.stack([x, y]), (X, X),
         "i j, i j -> k i j {i=4 j=6 k=2} blocked k"),
    Case("unstack", jnp.unstack, (Arg((2, 4, 6)),),
         "k i j -> i j, i j {i=4 j=6 k=2} blocked k"),
    Case("dynamic_slice", lambda x, at: lax.dynamic_slice(x, (0, at), (4, 2)),
         (X, Arg((), I32)), "i j, ., . -> i k {i=4 j=6 k=2} blocked j k"),
    Case("dynamic_update_slice",
         lambda x, y, at: lax.dynamic_update_slice(x, y, (0, at)),
         (X, Arg((4, 2)), Arg((), I32)),
         "i k, i j, ., . -> i k {i=4 j=2 k=6} blocked j k"),
    Case("link", lambda c, xs: lax.scan(lambda c, x: (c + x, c), c, xs),
         (Arg((4,)), Arg((3, 4))), "i -> i {i=4}"),
]  # fmt: skip


def _monoid(op: Any, start: Any) -> Any:
    return lambda x: lax.reduce(x, start, op, (1,))


ALONG = "i j -> i {i=4 j=6} reduce j"
IN_ORDER = "i j -> i j {i=4 j=6} blocked j"
BEST = "i j -> i k, i k {i=4 j=6 k=2} blocked j k"
REDUCTION = [
    Case("reduce_sum", lambda x: x.sum(1), (X,), ALONG),
    Case("reduce_max", lambda x: x.max(1), (X,), ALONG),
    Case("reduce_min", lambda x: x.min(1), (X,), ALONG),
    Case("reduce_prod", lambda x: x.prod(1), (X,), ALONG),
    Case("reduce_and", lambda x: x.all(1), (B,), ALONG),
    Case("reduce_or", lambda x: x.any(1), (B,), ALONG),
    Case("reduce_xor", _monoid(lax.bitwise_xor, False), (B,), ALONG),
    Case("reduce_sum", jnp.sum, (X,), "i j -> . {i=4 j=6} reduce i j"),
    Case("argmax", lambda x: lax.argmax(x, 1, jnp.int32), (X,),
         "i j -> i {i=4 j=6} blocked j"),
    Case("argmin", lambda x: lax.argmin(x, 1, jnp.int32), (X,),
         "i j -> i {i=4 j=6} blocked j"),
    Case("cumlogsumexp", lambda x: lax.cumlogsumexp(x, 1), (X,), IN_ORDER),
    Case("cummax", lambda x: lax.cummax(x, 1), (X,), IN_ORDER),
    Case("cummin", lambda x: lax.cummin(x, 1), (X,), IN_ORDER),
    Case("cumprod", lambda x: lax.cumprod(x, 1), (X,), IN_ORDER),
    Case("cumsum", lambda x: lax.cumsum(x, 1), (X,), IN_ORDER),
    Case("sort", lambda x: lax.sort(x, dimension=1), (X,), IN_ORDER),
    Case("sort", lambda x, y: lax.sort((x, y), dimension=0), (X, X),
         "i j, i j -> i j, i j {i=4 j=6} blocked i"),
    Case("top_k", lambda x: lax.top_k(x, 2), (X,), BEST),
    Case("approx_top_k", lambda x: lax.approx_max_k(x, 2), (X,), BEST),
]  # fmt: skip

CONTRACTION = [
    Case("dot_general", jnp.dot, (Arg((8, 4)), Arg((4, 2))),
         "i k, k j -> i j {i=8 j=2 k=4} reduce k"),
    Case("dot_general", jnp.matmul, (Arg((3, 8, 4)), Arg((3, 4, 2))),
         "i j l, i l k -> i j k {i=3 j=8 k=2 l=4} reduce l"),
    # lhs [batch, seq, heads, width] and rhs [heads, width, embed], two dims summed.
    Case("dot_general",
         lambda x, w: lax.dot_general(x, w, (((2, 3), (0, 1)), ((), ()))),
         (Arg((2, 8, 4, 6)), Arg((4, 6, 10))),
         "i j l m, l m k -> i j k {i=2 j=8 k=10 l=4 m=6} reduce l m"),
    # NCHW by OIHW: the window's place in the input is no factor of its own.
    Case("conv_general_dilated", lambda x, w: lax.conv(x, w, (1, 1), "SAME"),
         (Arg((2, 6, 8, 8)), Arg((4, 6, 3, 3))),
         "i k 1 1, j k m o -> i j l n {i=2 j=4 k=6 l=8 m=3 n=8 o=3} "
         "reduce k blocked l m n o"),
    # Depthwise: each feature reads its own input feature, so that one is no factor.
    Case("conv_general_dilated",
         lambda x, w: lax.conv_general_dilated(
             x, w, (1,), "SAME", feature_group_count=4),
         (Arg((2, 4, 8)), Arg((4, 1, 3))),
         "i 1 1, j 1 l -> i j k {i=2 j=4 k=8 l=3} blocked j k l"),
]  # fmt: skip

IDS, ROWS, TABLE = Arg((4, 3), I32, 10), Arg((4, 3, 6)), Arg((10, 6))
PUT = "k l, i j 1, i j l -> k l {i=4 j=3 k=10 l=6} "
INDEXING = [
    Case("gather", lambda t, ids: t.at[ids].get(mode="fill"), (TABLE, IDS),
         "k l, i j 1 -> i j l {i=4 j=3 k=10 l=6} reduce k"),
    # Along a batch dim that indices and table share.
    Case("gather", lambda x, ids: jnp.take_along_axis(x, ids, 1, mode="fill"),
         (X, Arg((4, 2), I32)), "i k, i j 1 -> i j {i=4 j=2 k=6} reduce k"),
    Case("scatter-add", lambda t, ids, u: t.at[ids].add(u), (TABLE, IDS, ROWS),
         PUT + "reduce i j"),
    Case("scatter-sub", lambda t, ids, u: t.at[ids].subtract(u), (TABLE, IDS, ROWS),
         PUT + "reduce i j"),
    Case("scatter", lambda t, ids, u: t.at[ids].set(u), (TABLE, IDS, ROWS),
         PUT + "blocked i j"),
    Case("scatter-max", lambda t, ids, u: t.at[ids].max(u), (TABLE, IDS, ROWS),
         PUT + "blocked i j"),
    Case("scatter-min", lambda t, ids, u: t.at[ids].min(u), (TABLE, IDS, ROWS),
         PUT + "blocked i j"),
    Case("scatter-mul", lambda t, ids, u: t.at[ids].multiply(u), (TABLE, IDS, ROWS),
         PUT + "blocked i j"),
]  # fmt: skip

K = Arg((), KEY)
RANDOM = [
    Case("random_bits", lambda k: jax.random.bits(k, (4, 6)), (K,),
         ". -> i j {i=4 j=6}"),
    Case("random_clone", jax.random.clone, (K,), ". -> . {}"),
    Case("random_fold_in", jax.random.fold_in, (K, Arg((), I32)), "., . -> . {}"),
    Case("random_gamma", jax.random.gamma, (K, X),
         "., i j -> k l {i=4 j=6 k=4 l=6} blocked i j"),
    Case("random_seed", jax.random.key, (Arg((), I32),), ". -> . {}"),
    Case("random_split", jax.random.split, (K,), ". -> i {i=2} blocked i"),
    Case("random_unwrap", jax.random.key_data, (K,), ". -> i {i=2} blocked i"),
    Case("random_wrap", jax.random.wrap_key_data, (Arg((2,), U32),),
         "i -> . {i=2} blocked i"),
    Case("rng_bit_generator", lambda k: lax.rng_bit_generator(k, (6,)),
         (Arg((4,), U32),), "i -> j, k {i=4 j=4 k=6} blocked i j k"),
]  # fmt: skip

CASES = [*ELEMENTWISE, *SHAPE, *REDUCTION, *CONTRACTION, *INDEXING, *RANDOM]

NOT_PRODUCED = {
    "empty2": "JAX makes it while it lowers a loop, after tracing",
    "log2": "JAX 0.10 writes log2 as a quotient of logarithms",
    "one_minus_square": "JAX 0.10 differentiates tanh without it",
}
"""Primitives of the registry that no function gives in the oldest supported JAX."""
