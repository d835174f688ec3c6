"""Linear algebra and Fourier transforms: batches pass, each matrix is needed whole.

Operation counts are the leading terms for one matrix, from Golub and Van Loan, *Matrix
Computations* (4th edition), or for a transform of n points 5 n log2 n.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log2, prod

from autoshard.rules.core import Dim, FactorRule, Factors, RuleContext, Shape
from autoshard.rules.registry import Example, register


def _batched(ctx: RuleContext, rank: int, flops: float) -> FactorRule:
    """A rule whose operands and results share their leading dims.

    Args:
        ctx: The op.
        rank: Dims of one problem in the first operand; all before are the batch.
        flops: Of one problem.
    """
    count = len(ctx.operands[0]) - rank
    factors = Factors()
    batch = factors.dims(ctx.operands[0][:count])

    def dims(shape: Shape) -> tuple[Dim, ...]:
        return (*batch, *factors.dims(shape[count:], "blocked"))

    return factors.rule(
        [dims(shape) for shape in ctx.operands],
        [dims(shape) for shape in ctx.results],
        "reduce",
        flops=flops * prod(ctx.operands[0][:count]),
    )


Shapes = tuple[Shape, ...]
_SQUARE = (8, 4, 4)
_TALL = (8, 6, 4)
_FACTORIZATIONS: dict[str, tuple[Shapes, Shapes, Callable[[int, int], float]]] = {
    "cholesky": ((_SQUARE,), (_SQUARE,), lambda m, n: n**3 / 3),
    "cholesky_update": (((4, 4), (4,)), ((4, 4),), lambda m, n: 2 * n**2),
    "eig": ((_SQUARE,), ((8, 4), _SQUARE), lambda m, n: 25 * n**3),
    "eigh": ((_SQUARE,), (_SQUARE, (8, 4)), lambda m, n: 9 * n**3),
    "geqp3": (
        (_TALL, (8, 4)),
        (_TALL, (8, 4), (8, 4)),
        lambda m, n: 4 * m * n**2,
    ),
    "geqrf": ((_TALL,), (_TALL, (8, 4)), lambda m, n: 2 * m * n**2),
    "hessenberg": ((_SQUARE,), (_SQUARE, (8, 3)), lambda m, n: 10 * n**3 / 3),
    "householder_product": ((_TALL, (8, 4)), (_TALL,), lambda m, n: 4 * m * n**2),
    "lu": (
        (_TALL,),
        (_TALL, (8, 4), (8, 6)),
        lambda m, n: m * n * min(m, n),
    ),
    "ormqr": ((_TALL, (8, 4), (8, 6, 2)), ((8, 6, 2),), lambda m, n: 4 * m * n**2),
    "qr": ((_TALL,), (_TALL, _SQUARE), lambda m, n: 4 * m * n**2),
    "schur": ((_SQUARE,), (_SQUARE, _SQUARE), lambda m, n: 25 * n**3),
    "svd": (
        (_TALL,),
        ((8, 4), _TALL, _SQUARE),
        lambda m, n: 4 * m * n**2 + 22 * n**3,
    ),
    "symmetric_product": ((_TALL, (8, 6, 6)), ((8, 6, 6),), lambda m, n: m**2 * n),
    "tridiagonal": (
        (_SQUARE,),
        (_SQUARE, (8, 4), (8, 3), (8, 3)),
        lambda m, n: 4 * n**3 / 3,
    ),
}
"""Shapes of an example, and operations for an m x n matrix, the first operand."""


def _factorize(ctx: RuleContext) -> FactorRule:
    _, _, flops = _FACTORIZATIONS[ctx.primitive]
    return _batched(ctx, 2, float(flops(*ctx.operands[0][-2:])))


for _name, (_operands, _results, _) in _FACTORIZATIONS.items():
    register(_name, example=Example(_operands, _results))(_factorize)


@register("lu_pivots_to_permutation", example=Example(((8, 4),), ((8, 4),)))
def _permutation(ctx: RuleContext) -> FactorRule:
    return _batched(ctx, 1, 0.0)


@register(
    "triangular_solve",
    reads=["left_side"],
    example=Example(((8, 4, 4), (8, 4, 2)), ((8, 4, 2),), {"left_side": True}),
)
def _triangular_solve(ctx: RuleContext) -> FactorRule:
    """Each column of the right-hand side (row, if it stands left) is solved alone."""
    matrix, rhs = ctx.operands
    count = len(matrix) - 2
    at = len(rhs) - (1 if ctx.params["left_side"] else 2)
    return _solve(ctx, matrix[:count], at, float(matrix[-1] ** 2))


@register(
    "tridiagonal_solve", example=Example(((8, 4),) * 3 + ((8, 4, 2),), ((8, 4, 2),))
)
def _tridiagonal_solve(ctx: RuleContext) -> FactorRule:
    *_, diagonal, rhs = ctx.operands
    return _solve(ctx, diagonal[:-1], len(rhs) - 1, 8.0 * diagonal[-1])


def _solve(ctx: RuleContext, batch: Shape, at: int, flops: float) -> FactorRule:
    """A solve whose last operand and result have independent sides along dim `at`."""
    *matrices, rhs = ctx.operands
    factors = Factors()
    lead = factors.dims(batch)
    sides = tuple(
        factors.new(size, "pass" if d == at else "blocked")
        for d, size in enumerate(rhs)
        if d >= len(batch)
    )
    left = [
        (*lead, *factors.dims(shape[len(batch) :], "blocked")) for shape in matrices
    ]
    dims = (*lead, *sides)
    return factors.rule(
        [*left, dims], [dims], "reduce", flops=flops * prod(batch) * rhs[at]
    )


@register(
    "fft",
    reads=["fft_lengths"],
    example=Example(((8, 32),), ((8, 17),), {"fft_lengths": (32,)}),
)
def _fft(ctx: RuleContext) -> FactorRule:
    """Transformed dims are needed whole; the last of a real transform changes size."""
    lengths = ctx.params["fft_lengths"]
    operand, result = ctx.operands[0], ctx.results[0]
    count = len(operand) - len(lengths)
    factors = Factors()
    batch = factors.dims(operand[:count])
    pairs = [
        factors.kept(m, n, moved=True)
        for m, n in zip(operand[count:], result[count:], strict=True)
    ]
    points = prod(lengths)
    return factors.rule(
        [(*batch, *(a for a, _ in pairs))],
        [(*batch, *(b for _, b in pairs))],
        "reduce",
        flops=5.0 * points * log2(max(points, 1)) * prod(operand[:count]),
    )
