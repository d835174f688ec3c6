"""One small program per rule, and the rule's text beside it, derived by hand.

Letters follow the order in which a rule makes its factors: a dim of size one has none,
results come first where the rule starts from them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import random as extended
from jax.scipy import special
from rules.case import BF16, BOOL, C64, I32, U32, Arg, Case
from rules.cases_indexing import INDEXING, RANDOM
from rules.cases_linalg import LINALG, PRODUCTS
from rules.cases_manual import COLLECTIVE, EFFECTS, PLACES
from rules.cases_window import CONVOLUTION, POOLING

from autoshard.ir.annotate import annotate

X = Arg((4, 6))
V = Arg((6,))
SAME = "i j -> i j {i=4 j=6}"
SAME2 = "i j, i j -> i j {i=4 j=6}"
N, M, B, Z = Arg((4, 6), I32), Arg((4, 6), U32), Arg((4, 6), BOOL), Arg((4, 6), C64)

_UNARY = {
    "abs": jnp.abs, "acos": lax.acos, "acosh": lambda x: lax.acosh(x + 1),
    "bessel_i0e": lax.bessel_i0e, "bessel_i1e": lax.bessel_i1e,
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
    "eq": lax.eq, "eq_to": lax.eq_to_p.bind, "ge": lax.ge, "gt": lax.gt,
    "igamma": lax.igamma, "igamma_grad_a": lax.igamma_grad_a, "igammac": lax.igammac,
    "le": lax.le, "le_to": lax.le_to_p.bind, "lt": lax.lt, "lt_to": lax.lt_to_p.bind,
    "max": lax.max, "min": lax.min, "mul": lax.mul, "ne": lax.ne,
    "nextafter": lax.nextafter, "polygamma": lax.polygamma, "pow": lax.pow,
    "rem": lax.rem, "sub": lax.sub, "zeta": lambda x, y: lax.zeta(x + 1, y),
}  # fmt: skip

_INTEGER = {
    "and": lax.bitwise_and, "mulhi": lax.mulhi_p.bind, "or": lax.bitwise_or,
    "xor": lax.bitwise_xor,
    "shift_left": lax.shift_left,
    "shift_right_arithmetic": lax.shift_right_arithmetic,
    "shift_right_logical": lax.shift_right_logical,
}  # fmt: skip

ELEMENTWISE = [
    *(Case(name, fn, (X,), SAME) for name, fn in _UNARY.items()),
    *(Case(name, fn, (X, X), SAME2) for name, fn in _BINARY.items()),
    *(Case(name, fn, (N, N), SAME2) for name, fn in _INTEGER.items()),
    Case("not", lax.bitwise_not, (N,), SAME),
    Case("clz", lax.clz, (N,), SAME),
    Case("log2", jnp.log2, (X,), SAME, since=(0, 11)),
    Case(
        "one_minus_square",
        jax.grad(lambda x: lax.tanh(x).sum()),
        (X,),
        SAME,
        since=(0, 11),
    ),
    Case(
        "polynomial",
        lambda x, y: lax.polynomial_p.bind(x, y, y),
        (X, X),
        "i j, i j, i j -> i j {i=4 j=6}",
        since=(0, 11),
    ),
    Case(
        "regularized_incomplete_beta",
        lax.betainc,
        (X, X, X),
        "i j, i j, i j -> i j {i=4 j=6}",
    ),
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
    Case("add", lax.add, (Arg((2, 6)),) * 2, "i j, i j -> i j {i=2 j=6}"),
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
        extended.threefry2x32_p.bind,
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
    Case("reshape", _reshape(6, 2), (Arg((4, 3)),),
         "i j -> k l {i=4 j=3 k=6 l=2} blocked i j k l"),
    Case("reshape", _reshape(1, 1), (Arg(()),), ". -> 1 1 {}"),
    Case("reshape", _reshape(), (Arg((1, 1)),), "1 1 -> . {}"),
    Case("reshape", _reshape(3, 4, 4), (Arg((2, 6, 4)),),
         "j k i -> l m i {i=4 j=2 k=6 l=3 m=4} blocked j k l m"),
    Case("reshape", _reshape(0), (Arg((0, 4)),),
         "i j -> k {i=0 j=4 k=0} blocked i j k"),
    # One of three equal parts is another thing than the whole.
    Case("slice", lambda x: lax.slice(x, (0, 1), (4, 3)), (X,),
         "i j -> i k {i=4 j=6 k=2} blocked j k"),
    # All but the last is the same thing; so is a half, every other, and what lacks a
    # few elements.
    Case("slice", lambda x: x[1:, :-1], (X,), "i j -> i j {i=4 j=6} blocked i j"),
    Case("slice", lambda x: x[:, :3], (X,), "i j -> i j {i=4 j=6} blocked j"),
    Case("slice", lambda x: lax.slice(x, (0, 0), (4, 6), (1, 2)), (X,),
         "i j -> i j {i=4 j=6} blocked j"),
    Case("slice", lambda x: x[:, 5:], (Arg((4, 9)),),
         "i j -> i j {i=4 j=9} blocked j"),
    Case("slice", lambda x: x[:, 8:], (Arg((4, 20)),),
         "i j -> i j {i=4 j=20} blocked j"),
    Case("slice", lambda x: x[:, 11:], (Arg((4, 20)),),
         "i j -> i k {i=4 j=20 k=9} blocked j k"),
    Case("slice", lambda x: x[:, :1], (Arg((4, 2)),),
         "i j -> i 1 {i=4 j=2} blocked j"),
    # Padding of 1 and -1 keeps the size and shifts the content.
    Case("pad", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, -1, 0))), (X,),
         "i j, . -> i j {i=4 j=6} blocked j"),
    Case("pad", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 0, 0))), (X,),
         "i j, . -> i j {i=4 j=7} blocked j"),
    Case("pad", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1))), (X,),
         "i j, . -> i j {i=4 j=11} blocked j"),
    Case("pad", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (12, 0, 0))), (X,),
         "i j, . -> i k {i=4 j=6 k=18} blocked j k"),
    Case("rev", lambda x: lax.rev(x, (1,)), (X,), "i j -> i j {i=4 j=6} blocked j"),
    # Copies one behind the other.
    Case("tile", lambda x: jnp.tile(x, (1, 3)), (X,),
         "i j -> i (kj) {i=4 j=6 k=3}"),
    # Two equal parts make something new; one of seven eighths stays what it is.
    Case("concatenate", lambda x, y: lax.concatenate([x, y], 1), (Arg((4, 2)), X),
         "i j, i k -> i l {i=4 j=2 k=6 l=8} blocked j k l"),
    Case("concatenate", lambda x, y: lax.concatenate([x, y], 1),
         (Arg((4, 2)), Arg((4, 14))), "i j, i k -> i k {i=4 j=2 k=16} blocked j k"),
    Case("concatenate", lambda x, y: lax.concatenate([x, y], 1), (Arg((4, 1)), X),
         "i 1, i j -> i k {i=4 j=6 k=7} blocked j k"),
    Case("concatenate", lambda x, y: lax.concatenate([x, y], 0),
         (Arg((15, 4)), Arg((1, 4))), "j i, 1 i -> j i {i=4 j=16} blocked j"),
    Case("concatenate", lambda x, y: lax.concatenate([x, y], 1), (Arg((4, 1)),) * 2,
         "i 1, i 1 -> i j {i=4 j=2} blocked j"),
    Case("split", lambda x: lax.split(x, (2, 4), 1), (X,),
         "i l -> i j, i k {i=4 j=2 k=4 l=6} blocked j k l"),
    Case("split", lambda x: lax.split(x, (3, 1), 0), (X,),
         "k i -> j i, 1 i {i=6 j=3 k=4} blocked j k"),
    Case("stack", lambda x, y: jnp.stack([x, y]), (X, X),
         "i j, i j -> k i j {i=4 j=6 k=2} blocked k"),
    Case("stack", lambda x, y: jnp.stack([x, y], 1), (X, X),
         "i j, i j -> i k j {i=4 j=6 k=2} blocked k"),
    Case("unstack", jnp.unstack, (Arg((2, 4, 6)),),
         "k i j -> i j, i j {i=4 j=6 k=2} blocked k"),
    Case("dynamic_slice", lambda x, at: lax.dynamic_slice(x, (0, at), (4, 2)),
         (X, Arg((), I32)), "i j, ., . -> i k {i=4 j=6 k=2} blocked j k"),
    Case("dynamic_slice", lambda x, at: lax.dynamic_slice(x, (0, at), (4, 5)),
         (X, Arg((), I32)), "i j, ., . -> i j {i=4 j=6} blocked j"),
    Case("dynamic_update_slice",
         lambda x, y, at: lax.dynamic_update_slice(x, y, (0, at)),
         (X, Arg((4, 2)), Arg((), I32)),
         "i k, i j, ., . -> i k {i=4 j=2 k=6} blocked j k"),
    Case("dynamic_update_slice",
         lambda x, y, at: lax.dynamic_update_slice(x, y, (0, at)),
         (X, Arg((4, 5)), Arg((), I32)),
         "i j, i j, ., . -> i j {i=4 j=6} blocked j"),
    Case("link", lambda c, xs: lax.scan(lambda c, x: (c + x, c), c, xs),
         (Arg((4,)), Arg((3, 4))), "i -> i {i=4}"),
]  # fmt: skip


def _monoid(op: Any, start: Any) -> Any:
    return lambda x: lax.reduce(x, start, op, (1,))


def _log_sum(a, b):
    return jnp.logaddexp(a, b)


def _pairs(a, b):
    return a[0] + b[0], lax.max(a[1], b[1])


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
    Case("reduce_xor", _monoid(lax.bitwise_xor, False), (B,),
         "i j -> i {i=4 j=6} blocked j"),
    # Of integers no collective takes the bits.
    Case("reduce_and", lambda x: lax.reduce_and(x, (1,)), (N,),
         "i j -> i {i=4 j=6} blocked j"),
    Case("reduce_or", lambda x: lax.reduce_or(x, (1,)), (N,),
         "i j -> i {i=4 j=6} blocked j"),
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
    # A function of the user's combines numbers, or pairs of them.
    Case("reduce", lambda x: lax.reduce(x, -np.inf, _log_sum, (1,)), (X,),
         "i j, . -> i {i=4 j=6} blocked j"),
    Case("reduce", lambda x, n: lax.reduce((x, n), (0.0, 0), _pairs, (0,)), (X, N),
         "i j, i j, ., . -> j, j {i=4 j=6} blocked i"),
    Case("top_k", lambda x: lax.top_k(x, 2, axis=0), (X,),
         "j i -> k i, k i {i=6 j=4 k=2} blocked j k"),
    Case("approx_top_k", lambda x: lax.approx_max_k(x, 2, 0), (X,),
         "j i -> k i, k i {i=6 j=4 k=2} blocked j k"),
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
]  # fmt: skip


ALL = [
    *ELEMENTWISE,
    *SHAPE,
    *REDUCTION,
    *CONTRACTION,
    *PRODUCTS,
    *CONVOLUTION,
    *POOLING,
    *INDEXING,
    *LINALG,
    *RANDOM,
    *COLLECTIVE,
    *PLACES,
    *EFFECTS,
]
CASES = [case for case in ALL if case.runs_here]

NOT_PRODUCED = {
    "check": "checkify takes it out again before the program runs",
    "empty2": "JAX makes it while it lowers a loop, after tracing",
    "from_edtype": "only for element types that a library defines by itself",
    "geqp3": "JAX makes it while it lowers a pivoting qr, after tracing",
    "geqrf": "JAX makes it while it lowers a qr, after tracing",
    "relayout": "no public function of JAX gives it",
    "scaled_matmul": "what the wrapper becomes on a GPU, after tracing",
    "stage": "tracing takes it out again",
    "tie": "no public function of JAX gives it",
    "to_edtype": "only for element types that a library defines by itself",
    "unreduced_pmax": "needs a value that is an unreduced maximum; no public function",
    "unreduced_pmin": "needs a value that is an unreduced minimum; no public function",
    "with_memory_space_constraint": "only in Pallas kernels",
}
"""Primitives of the registry that no public function gives, and why."""
