"""Floating-point operations of an op, counted from what it computes, not by its rule.

A product counts two per multiplication, as is the custom; anything else one per number
that goes in or comes out. Counts of factorizations are the leading terms in Golub and
Van Loan, *Matrix Computations* (4th edition).
"""

from __future__ import annotations

from math import log2, prod


def _dot(o, r, p):
    (at, _), _ = p["dimension_numbers"]
    return 2 * prod(r[0]) * prod(o[0][d] for d in at)


def _ragged(o, r, p):
    """Each row meets one matrix; in a sum over groups, each row one other row."""
    return 2 * prod(o[0]) * r[0][-1]  # the last dim is the only free one of the rhs


def _conv(o, r, p):
    """A result sums over the window and the features that one kernel has."""
    _, kernel, _ = p["dimension_numbers"]
    of_one = prod(n for d, n in enumerate(o[1]) if d != kernel[0])
    return 2 * prod(r[0]) * of_one


def _per_window(o, r, p):
    return prod(r[0]) * prod(p["window_dimensions"])


def _per_matrix(count):
    """Of the first operand, m x n with leading batch dims."""
    return lambda o, r, p: prod(o[0][:-2]) * count(*o[0][-2:])


def _triangular(o, r, p):
    """Forward or backward substitution: n^2 for each right-hand side."""
    n = o[0][-1]
    return n**2 * prod(o[1]) / n


COUNTS = {
    "approx_top_k": lambda o, r, p: prod(o[0]),
    "cholesky": _per_matrix(lambda m, n: n**3 / 3),
    "cholesky_update": _per_matrix(lambda m, n: 2 * n**2),
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "eig": _per_matrix(lambda m, n: 25 * n**3),
    "eigh": _per_matrix(lambda m, n: 9 * n**3),
    "fft": lambda o, r, p: (
        5
        * prod(p["fft_lengths"])
        * log2(prod(p["fft_lengths"]))
        * prod(o[0][: len(o[0]) - len(p["fft_lengths"])])
    ),
    "geqp3": _per_matrix(lambda m, n: 4 * m * n**2),
    "geqrf": _per_matrix(lambda m, n: 2 * m * n**2),
    "hessenberg": _per_matrix(lambda m, n: 10 * n**3 / 3),
    "householder_product": _per_matrix(lambda m, n: 4 * m * n**2),
    "lu": _per_matrix(lambda m, n: m * n * min(m, n)),
    "ormqr": _per_matrix(lambda m, n: 4 * m * n**2),
    "qr": _per_matrix(lambda m, n: 4 * m * n**2),
    "ragged_dot_general": _ragged,
    "reduce_window": _per_window,
    "reduce_window_max": _per_window,
    "reduce_window_min": _per_window,
    "reduce_window_sum": _per_window,
    "rng_bit_generator": lambda o, r, p: prod(r[0]) + prod(r[1]),
    "scaled_dot": lambda o, r, p: 2 * prod(r[0]) * o[0][-1],
    "scaled_matmul": lambda o, r, p: 2 * prod(r[0]) * o[0][-1],
    "scaled_matmul_wrapper": lambda o, r, p: 2 * prod(r[0]) * o[0][-1],
    "schur": _per_matrix(lambda m, n: 25 * n**3),
    "select_and_gather_add": _per_window,
    "select_and_scatter_add": lambda o, r, p: prod(o[0]) * prod(p["window_dimensions"]),
    "sort": lambda o, r, p: prod(o[0]),
    "svd": _per_matrix(lambda m, n: 4 * m * n**2 + 22 * n**3),
    "symmetric_product": _per_matrix(lambda m, n: m**2 * n),
    "top_k": lambda o, r, p: prod(o[0]),
    "triangular_solve": _triangular,
    "tridiagonal": _per_matrix(lambda m, n: 4 * n**3 / 3),
    "tridiagonal_solve": lambda o, r, p: 8 * prod(o[3]),
}

PER_NUMBER = {
    "abs", "acos", "acosh", "add", "add_any", "and", "argmax", "argmin", "asin",
    "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil",
    "clamp", "clz", "complex", "conj", "cos", "cosh", "cumlogsumexp", "cummax",
    "cummin", "cumprod", "cumsum", "digamma", "div", "eq", "eq_to", "erf", "erf_inv",
    "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igamma_grad_a",
    "igammac", "imag", "integer_pow", "iota_2x32_shape", "is_finite", "le", "le_to",
    "lgamma", "log", "log1p", "log2", "logistic", "lt", "lt_to", "max", "min", "mul",
    "mulhi", "ne", "neg", "nextafter", "not", "one_minus_square", "or", "polygamma",
    "polynomial", "population_count", "pow", "random_bits", "random_clone",
    "random_fold_in", "random_gamma", "random_seed", "random_split", "random_unwrap",
    "random_wrap", "real", "reduce", "reduce_and", "reduce_max", "reduce_min",
    "reduce_or", "reduce_prod", "reduce_sum", "reduce_xor",
    "regularized_incomplete_beta", "rem", "rng_uniform", "round", "rsqrt", "select_n",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin",
    "sinh", "sqrt", "square", "sub", "tan", "tanh", "threefry2x32", "xor", "zeta",
}  # fmt: skip
"""One operation per number of the largest operand or result. All others have none."""


def flops(primitive, operands, results, params):
    """Operations of a whole op; all that is not counted here only moves numbers."""
    if primitive in COUNTS:
        return COUNTS[primitive](operands, results, params)
    if primitive in PER_NUMBER:
        return max(map(prod, (*operands, *results)))
    return 0
