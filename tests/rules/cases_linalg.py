"""Linear algebra and Fourier transforms: batch 3, matrices of distinct sides."""

from __future__ import annotations

import jax
from jax import lax
from rules.case import BF16, C64, E8, F8, I32, Arg, Case

S, T, W = Arg((3, 4, 4)), Arg((3, 6, 4)), Arg((3, 4, 6))
ROW = Arg((3, 4))
L = lax.linalg
ONE = "i j k -> i l m {i=3 j=4 k=4 l=4 m=4} blocked j k l m"
LINALG = [
    Case("cholesky", lambda x: L.cholesky(x, symmetrize_input=False), (S,), ONE),
    Case("cholesky_update", L.cholesky_update, (Arg((4, 4)), Arg((4,))),
         "i j, k -> l m {i=4 j=4 k=4 l=4 m=4} blocked i j k l m"),
    Case("eig", lambda x: L.eig(x, compute_left_eigenvectors=False), (S,),
         "i j k -> i l, i m n {i=3 j=4 k=4 l=4 m=4 n=4} blocked j k l m n"),
    Case("eigh", lambda x: L.eigh(x, symmetrize_input=False), (S,),
         "i j k -> i l m, i n {i=3 j=4 k=4 l=4 m=4 n=4} blocked j k l m n"),
    Case("hessenberg", L.hessenberg, (S,),
         "i j k -> i l m, i n {i=3 j=4 k=4 l=4 m=4 n=3} blocked j k l m n"),
    Case("householder_product", L.householder_product, (T, ROW),
         "i j k, i l -> i m n {i=3 j=6 k=4 l=4 m=6 n=4} blocked j k l m n"),
    Case("lu", L.lu, (T,),
         "i j k -> i l m, i n, i o {i=3 j=6 k=4 l=6 m=4 n=4 o=6} "
         "blocked j k l m n o"),
    Case("lu_pivots_to_permutation",
         lambda p: L.lu_pivots_to_permutation(p, 6), (Arg((3, 4), I32),),
         "i j -> i k {i=3 j=4 k=6} blocked j k"),
    Case("ormqr", L.ormqr, (T, ROW, Arg((3, 6, 2))),
         "i j k, i l, i m n -> i o p {i=3 j=6 k=4 l=4 m=6 n=2 o=6 p=2} "
         "blocked j k l m n o p"),
    Case("qr", lambda x: L.qr(x, full_matrices=False), (T,),
         "i j k -> i l m, i n o {i=3 j=6 k=4 l=6 m=4 n=4 o=4} "
         "blocked j k l m n o"),
    Case("schur", L.schur, (S,),
         "i j k -> i l m, i n o {i=3 j=4 k=4 l=4 m=4 n=4 o=4} "
         "blocked j k l m n o"),
    Case("svd", lambda x: L.svd(x, full_matrices=False), (T,),
         "i j k -> i l, i m n, i o p {i=3 j=6 k=4 l=4 m=6 n=4 o=4 p=4} "
         "blocked j k l m n o p"),
    Case("svd", lambda x: L.svd(x, compute_uv=False), (Arg((2, 3, 6, 4)),),
         "i j k l -> i j m {i=2 j=3 k=6 l=4 m=4} blocked k l m"),
    Case("symmetric_product", L.symmetric_product, (T, Arg((3, 6, 6))),
         "i j k, i l m -> i n o {i=3 j=6 k=4 l=6 m=6 n=6 o=6} "
         "blocked j k l m n o"),
    # Columns of the right-hand side are independent, or its rows.
    Case("triangular_solve",
         lambda a, b: L.triangular_solve(a, b, left_side=True),
         (S, Arg((3, 4, 2))),
         "i l m, i j k -> i j k {i=3 j=4 k=2 l=4 m=4} blocked j l m"),
    Case("triangular_solve",
         lambda a, b: L.triangular_solve(a, b, left_side=False),
         (S, Arg((3, 2, 4))),
         "i l m, i j k -> i j k {i=3 j=2 k=4 l=4 m=4} blocked k l m"),
    Case("tridiagonal", L.tridiagonal, (S,),
         "i j k -> i l m, i n, i o, i p {i=3 j=4 k=4 l=4 m=4 n=4 o=3 p=3} "
         "blocked j k l m n o p"),
    Case("tridiagonal_solve", L.tridiagonal_solve, (ROW, ROW, ROW, Arg((3, 4, 2))),
         "i l, i m, i n, i j k -> i j k {i=3 j=4 k=2 l=4 m=4 n=4} "
         "blocked j l m n"),
    Case("fft", lambda x: lax.fft(x, "FFT", (6,)), (Arg((3, 6), C64),),
         "i j -> i j {i=3 j=6} blocked j"),
    # 32 places have 17 frequencies, of which more than half come from each other.
    Case("fft", lambda x: lax.fft(x, "RFFT", (6, 32)), (Arg((3, 6, 32)),),
         "i j k -> i j k {i=3 j=6 k=32} blocked j k"),
    Case("fft", lambda x: lax.fft(x, "IRFFT", (32,)), (Arg((3, 17), C64),),
         "i j -> i j {i=3 j=32} blocked j"),
]  # fmt: skip


def _ragged(lhs_sum, rhs_sum, batch, ragged, groups):
    numbers = lax.RaggedDotDimensionNumbers(
        ((lhs_sum, rhs_sum), batch), (ragged,), groups
    )
    return lambda x, w, sizes: lax.ragged_dot_general(x, w, sizes, numbers)


def _scaled(lhs_sum, rhs_sum):
    def run(x, w, a, b):
        return lax.scaled_dot(
            x, w, lhs_scale=a, rhs_scale=b,
            dimension_numbers=(((lhs_sum,), (rhs_sum,)), ((), ())),
            preferred_element_type="float32",
        )  # fmt: skip

    return run


NONE = ((), ())
SIZES = Arg((4,), I32)
PRODUCTS = [
    # Rows of 16 in 4 groups.
    Case("ragged_dot_general", lax.ragged_dot, (Arg((16, 8)), Arg((4, 8, 2)), SIZES),
         "i l, k l j, 1 -> i j {i=16 j=2 k=4 l=8} reduce k l"),
    # 16 places are summed, each group by itself.
    Case("ragged_dot_general", _ragged((0,), (0,), NONE, 0, ()),
         (Arg((16, 8)), Arg((16, 2)), SIZES),
         "l i, l j, 1 -> k i j {i=8 j=2 k=4 l=16} reduce l"),
    # Groups of a batch change nothing.
    Case("ragged_dot_general", _ragged((2,), (1,), ((0,), (0,)), 0, ()),
         (Arg((6, 5, 8)), Arg((6, 8, 2)), SIZES),
         "i j l, i l k, 1 -> i j k {i=6 j=5 k=2 l=8} reduce l"),
    # Each of 3 problems has groups of its own.
    Case("ragged_dot_general", _ragged((2,), (2,), ((0,), (1,)), 1, (0,)),
         (Arg((3, 16, 8)), Arg((4, 3, 8, 2)), Arg((3, 4), I32)),
         "i j m, l i m k, i 1 -> i j k {i=3 j=16 k=2 l=4 m=8} reduce l m"),
    # So has each place of a free dim, of a batch or of a sum before the ragged one.
    Case("ragged_dot_general", _ragged((2,), (1,), NONE, 1, (0,)),
         (Arg((5, 16, 8)), Arg((4, 8, 2)), Arg((5, 4), I32)),
         "i j m, l m k, i 1 -> i j k {i=5 j=16 k=2 l=4 m=8} reduce l m"),
    Case("ragged_dot_general", _ragged((0,), (1,), NONE, 2, (0,)),
         (Arg((8, 5, 16)), Arg((4, 8, 2)), Arg((5, 4), I32)),
         "m i j, l m k, i 1 -> i j k {i=5 j=16 k=2 l=4 m=8} reduce l m"),
    # The same sizes for all places.
    Case("ragged_dot_general", _ragged((2,), (1,), NONE, 1, (0,)),
         (Arg((5, 16, 8)), Arg((4, 8, 2)), SIZES),
         "i j m, l m k, 1 -> i j k {i=5 j=16 k=2 l=4 m=8} reduce l m"),
    Case("ragged_dot_general", _ragged((3,), (2,), ((0, 1), (0, 1)), 1, ()),
         (Arg((3, 6, 5, 8)), Arg((3, 6, 8, 2)), Arg((3, 4), I32)),
         "i j k m, i j m l, i 1 -> i j k l {i=3 j=6 k=5 l=2 m=8} reduce m"),
    Case("ragged_dot_general", _ragged((0, 1), (0, 1), NONE, 1, ()),
         (Arg((5, 16, 8)), Arg((5, 16, 2)), Arg((5, 4), I32)),
         "l m i, l m j, l 1 -> k i j {i=8 j=2 k=4 l=5 m=16} reduce l m"),
    # 64 elements in runs of 32, and of 16 on the other side.
    Case("scaled_dot", _scaled(1, 0),
         (Arg((8, 64), F8), Arg((64, 4), F8), Arg((8, 2), BF16), Arg((4, 4), BF16)),
         "i (kl), (kl) j, i k, (km) j -> i j {i=8 j=4 k=2 l=32 m=2} "
         "reduce k blocked l m"),
    # One scale for all of a dim leaves the other to say where it may be cut.
    Case("scaled_dot", _scaled(1, 0),
         (Arg((8, 64), F8), Arg((64, 4), F8), Arg((8, 1), BF16), Arg((4, 4), BF16)),
         "i (kl), (kl) j, i 1, k j -> i j {i=8 j=4 k=4 l=16} reduce k blocked l"),
    Case("scaled_dot", _scaled(1, 0),
         (Arg((8, 64), F8), Arg((64, 4), F8), Arg((8, 1), BF16), Arg((1, 4), BF16)),
         "i k, k j, i 1, 1 j -> i j {i=8 j=4 k=64} reduce k"),
    # Runs of 3 and of 2 have no common border.
    Case("scaled_dot", _scaled(1, 0),
         (Arg((8, 6), F8), Arg((6, 4), F8), Arg((8, 2), BF16), Arg((3, 4), BF16)),
         "i k, k j, i l, m j -> i j {i=8 j=4 k=6 l=2 m=3} blocked k l m"),
    Case("scaled_matmul_wrapper", jax.nn.scaled_matmul,
         (Arg((2, 8, 64), F8), Arg((2, 4, 64), F8), Arg((2, 8, 2), E8),
          Arg((2, 4, 2), E8)),
         "i j (lm), i k (lm), i j l, i k l -> i j k {i=2 j=8 k=4 l=2 m=32} "
         "reduce l blocked m"),
]  # fmt: skip
