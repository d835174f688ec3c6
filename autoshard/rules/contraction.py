"""Matrix products: plain, over ragged groups, and of numbers with scales."""

from __future__ import annotations

from math import gcd, prod
from typing import Any

from jax.lax import RaggedDotDimensionNumbers

from autoshard.rules.core import Dim, FactorRule, Factors, RuleContext, Shape
from autoshard.rules.registry import Example, register

_MATMUL = (((1,), (0,)), ((), ()))


class _Product:
    """Factors of the dims of a product, made in the order of the result's dims."""

    def __init__(self, numbers: Any, lhs: Shape, rhs: Shape, skip: Shape = ()) -> None:
        """Makes the factors of batch and free dims; `skip` are dims of the rhs."""
        self.factors = Factors()
        (self.lhs_sum, self.rhs_sum), (lhs_batch, rhs_batch) = numbers
        self.lhs, self.rhs = lhs, rhs
        self.left: dict[int, Dim] = {}
        self.right: dict[int, Dim] = {}
        for a, b in zip(lhs_batch, rhs_batch, strict=True):
            self.left[a] = self.right[b] = self.factors.new(lhs[a])
        free_left = [d for d in range(len(lhs)) if d not in (*lhs_batch, *self.lhs_sum)]
        free_right = [
            d for d in range(len(rhs)) if d not in (*rhs_batch, *self.rhs_sum, *skip)
        ]
        for d in free_left:
            self.left[d] = self.factors.new(lhs[d])
        for d in free_right:
            self.right[d] = self.factors.new(rhs[d])
        self.out = (
            *(self.left[a] for a in lhs_batch),
            *(self.left[d] for d in free_left),
            *(self.right[d] for d in free_right),
        )

    def sum_up(self) -> None:
        """Adds the factors that are summed over."""
        for a, b in zip(self.lhs_sum, self.rhs_sum, strict=True):
            self.left[a] = self.right[b] = self.factors.new(self.lhs[a], "reduce")

    def operands(self) -> list[tuple[Dim, ...]]:
        """Dims of both operands."""
        return [
            tuple(self.left[d] for d in range(len(self.lhs))),
            tuple(self.right[d] for d in range(len(self.rhs))),
        ]


@register(
    "dot_general",
    reads=["dimension_numbers"],
    example=Example(((8, 4), (4, 2)), ((8, 2),), {"dimension_numbers": _MATMUL}),
)
def _dot_general(ctx: RuleContext) -> FactorRule:
    """Batch dims first in the result, then the free dims of lhs and of rhs."""
    product = _Product(ctx.params["dimension_numbers"], *ctx.operands)
    product.sum_up()
    return product.factors.rule(product.operands(), [product.out], "matmul", 2.0)


@register(
    "ragged_dot_general",
    reads=["ragged_dot_dimension_numbers"],
    example=Example(
        ((16, 8), (4, 8, 2), (4,)),
        ((16, 2),),
        {
            "ragged_dot_dimension_numbers": RaggedDotDimensionNumbers(
                (((1,), (1,)), ((), ())), (0,), (0,)
            )
        },
    ),
)
def _ragged_dot_general(ctx: RuleContext) -> FactorRule:
    """A product whose rows are sorted into groups, each with a matrix of its own.

    The ragged dim may be cut, as each device finds from all the group sizes which of
    its rows are whose. A device that holds some groups only (experts) answers for their
    rows, and zero for the others: the results are partial sums. If the ragged dim is
    summed over, there is one result per group. Sizes of groups are counted from the
    first row on, so every device needs all of them.
    """
    ragged = ctx.params["ragged_dot_dimension_numbers"]
    lhs, rhs, sizes = ctx.operands
    numbers = ragged.dot_dimension_numbers
    (lhs_sum, _), (lhs_batch, _) = numbers
    [at] = ragged.lhs_ragged_dimensions
    product = _Product(numbers, lhs, rhs, skip=tuple(ragged.rhs_group_dimensions))
    factors, out = product.factors, product.out
    if at in lhs_sum:
        out = (factors.new(sizes[-1]), *out)
    for d in ragged.rhs_group_dimensions:
        product.right[d] = factors.new(rhs[d], "reduce")
    product.sum_up()
    # Sizes may differ from place to place of the dims that come before the ragged one.
    if at in lhs_sum:
        before = [*lhs_batch, *lhs_sum[: list(lhs_sum).index(at)]]
    elif at in lhs_batch:
        before = [*lhs_batch[: list(lhs_batch).index(at)]]
    else:
        free = [d for d in range(len(lhs)) if d not in (*lhs_sum, *lhs_batch)]
        before = [*lhs_batch, *free[: free.index(at)]]
    per_place = tuple(product.left[d] for d in before) if len(sizes) > 1 else ()
    (_, rhs_sum), (_, rhs_batch) = numbers
    taken = {*rhs_sum, *rhs_batch, *ragged.rhs_group_dimensions}
    width = prod(size for d, size in enumerate(rhs) if d not in taken)
    return factors.rule(
        [*product.operands(), (*per_place, ())],
        [out],
        "matmul",
        flops=2.0 * prod(lhs) * width,
    )


@register(
    "scaled_dot",
    reads=["dimension_numbers"],
    example=Example(
        ((8, 64), (64, 4), (8, 2), (2, 4)), ((8, 4),), {"dimension_numbers": _MATMUL}
    ),
)
def _scaled_dot(ctx: RuleContext) -> FactorRule:
    return _scaled(ctx, ctx.params["dimension_numbers"])


@register(
    "scaled_matmul",
    "scaled_matmul_wrapper",
    example=Example(((2, 8, 64), (2, 4, 64), (2, 8, 2), (2, 4, 2)), ((2, 8, 4),)),
)
def _scaled_matmul(ctx: RuleContext) -> FactorRule:
    return _scaled(ctx, (((2,), (2,)), ((0,), (0,))))


def _scaled(ctx: RuleContext, numbers: Any) -> FactorRule:
    """Runs of elements along a summed dim share a scale: only whole runs are cut off.

    The two operands may have runs of different lengths; a scale dim of size one holds
    for the whole dim.
    """
    lhs, rhs, lhs_scale, rhs_scale = ctx.operands
    product = _Product(numbers, lhs, rhs)
    factors = product.factors
    scales_left, scales_right = dict(product.left), dict(product.right)
    for a, b in zip(product.lhs_sum, product.rhs_sum, strict=True):
        counts = [n for n in (lhs_scale[a], rhs_scale[b]) if n > 1]
        runs = gcd(*counts) if counts else lhs[a]
        major = factors.new(runs, "reduce")
        minor = factors.new(lhs[a] // runs, "blocked")
        product.left[a] = product.right[b] = (*major, *minor)
        for scales, d, shape in (
            (scales_left, a, lhs_scale),
            (scales_right, b, rhs_scale),
        ):
            finer = factors.new(max(shape[d] // runs, 1), "blocked")
            scales[d] = (*major, *finer) if shape[d] > 1 else ()
    rest = [
        tuple(scales[d] for d in range(len(shape)))
        for scales, shape in ((scales_left, lhs_scale), (scales_right, rhs_scale))
    ]
    return factors.rule(
        [*product.operands(), *rest],
        [product.out],
        "matmul",
        flops=2.0 * prod(ctx.results[0]) * prod(lhs[a] for a in product.lhs_sum),
    )
