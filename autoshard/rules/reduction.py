"""Reductions, scans along a dim, sorting."""

from __future__ import annotations

from math import prod

from autoshard.rules.core import FactorKind, FactorRule, Factors, RuleContext
from autoshard.rules.registry import DTYPE, Example, register


def _along(ctx: RuleContext, axes: tuple[int, ...], kind: FactorKind) -> FactorRule:
    factors = Factors()
    dims = tuple(
        factors.new(size, kind if d in axes else "pass")
        for d, size in enumerate(ctx.operands[0])
    )
    kept = tuple(dim for d, dim in enumerate(dims) if d not in axes)
    return factors.rule(
        # The start values of a reduction with a function of the user's are scalars.
        [dims if shape else () for shape in ctx.operands],
        [kept for _ in ctx.results],
        "reduce",
        1.0,
    )


@register(
    "reduce_max", "reduce_min", "reduce_prod", "reduce_sum",
    reads=["axes"], example=Example(((8, 4),), ((8,),), {"axes": (1,)}),
)  # fmt: skip
def _reduce(ctx: RuleContext) -> FactorRule:
    return _along(ctx, ctx.params["axes"], "reduce")


@register(
    "reduce_and", "reduce_or", "reduce_xor", reads=["axes", DTYPE],
    example=Example(((8, 4),), ((8,),), {"axes": (1,), DTYPE: "bool"}),
)  # fmt: skip
def _reduce_bits(ctx: RuleContext) -> FactorRule:
    """No collective combines the bits of integers; truth values have all and any."""
    combines = ctx.params[DTYPE] == "bool" and ctx.primitive != "reduce_xor"
    return _along(ctx, ctx.params["axes"], "reduce" if combines else "blocked")


@register(
    "argmax",
    "argmin",
    reads=["axes"],
    example=Example(((8, 4),), ((8,),), {"axes": (1,)}),
)
def _arg(ctx: RuleContext) -> FactorRule:
    return _along(ctx, ctx.params["axes"], "blocked")


@register(
    "reduce",
    reads=["dimensions"],
    example=Example(((8, 4), ()), ((8,),), {"dimensions": (1,)}),
)
def _reduce_by_function(ctx: RuleContext) -> FactorRule:
    """The user's own function combines: no partial results that can be summed up."""
    return _along(ctx, ctx.params["dimensions"], "blocked")


def _in_order(ctx: RuleContext, axis: int) -> FactorRule:
    factors = Factors()
    dims = tuple(
        factors.new(size, "blocked" if d == axis else "pass")
        for d, size in enumerate(ctx.operands[0])
    )
    return factors.rule(
        [dims for _ in ctx.operands], [dims for _ in ctx.results], "reduce", 1.0
    )


@register(
    "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", reads=["axis"],
    example=Example(((8, 4),), ((8, 4),), {"axis": 1}),
)  # fmt: skip
def _running(ctx: RuleContext) -> FactorRule:
    return _in_order(ctx, ctx.params["axis"])


@register(
    "sort",
    reads=["dimension"],
    example=Example(((8, 4),), ((8, 4),), {"dimension": 1}),
)
def _sort(ctx: RuleContext) -> FactorRule:
    return _in_order(ctx, ctx.params["dimension"])


@register(
    "approx_top_k",
    "top_k",
    reads=["axis", "reduction_dimension"],
    example=Example(((8, 16),), ((8, 2), (8, 2)), {"axis": 1}),
)
def _top_k(ctx: RuleContext) -> FactorRule:
    """The best of a dim are not that dim: the chosen experts are no experts."""
    factors = Factors()
    operand, result = ctx.operands[0], ctx.results[0]
    # The two primitives name it differently.
    axis = ctx.params["axis"]
    if axis is None:
        axis = ctx.params["reduction_dimension"]
    axis %= len(operand)
    rest = [() if d == axis else factors.new(size) for d, size in enumerate(operand)]
    of, best = (factors.new(shape[axis], "blocked") for shape in (operand, result))
    before, after = rest[:axis], rest[axis + 1 :]
    return factors.rule(
        [(*before, of, *after)],
        [(*before, best, *after) for _ in ctx.results],
        "reduce",
        flops=float(prod(operand)),
    )
