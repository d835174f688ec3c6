"""Reductions, scans along a dim, sorting."""

from __future__ import annotations

from autoshard.rules.core import FactorKind, FactorRule, Factors, RuleContext, register


def _along(ctx: RuleContext, axes: tuple[int, ...], kind: FactorKind) -> FactorRule:
    factors = Factors()
    dims = tuple(
        factors.new(size, kind if d in axes else "pass")
        for d, size in enumerate(ctx.operands[0])
    )
    kept = tuple(dim for d, dim in enumerate(dims) if d not in axes)
    return factors.rule(
        [dims for _ in ctx.operands], [kept for _ in ctx.results], "reduce", 1.0
    )


@register(
    "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
    "reduce_xor",
)  # fmt: skip
def _reduce(ctx: RuleContext) -> FactorRule:
    return _along(ctx, ctx.params["axes"], "reduce")


@register("argmax", "argmin")
def _arg(ctx: RuleContext) -> FactorRule:
    return _along(ctx, ctx.params["axes"], "blocked")


@register("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "sort")
def _in_order(ctx: RuleContext) -> FactorRule:
    axis = ctx.params["dimension" if ctx.primitive == "sort" else "axis"]
    factors = Factors()
    dims = tuple(
        factors.new(size, "blocked" if d == axis else "pass")
        for d, size in enumerate(ctx.operands[0])
    )
    return factors.rule(
        [dims for _ in ctx.operands], [dims for _ in ctx.results], "reduce", 1.0
    )


@register("top_k", "approx_top_k")
def _top_k(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    axis = ctx.params.get("axis", ctx.params.get("reduction_dimension", -1))
    axis %= len(ctx.operands[0])
    dims = [
        () if d == axis else factors.new(size) for d, size in enumerate(ctx.operands[0])
    ]
    operand, result = list(dims), list(dims)
    operand[axis] = factors.new(ctx.operands[0][axis], "blocked")
    result[axis] = factors.new(ctx.results[0][axis], "blocked")
    return factors.rule(
        [tuple(operand)], [tuple(result) for _ in ctx.results], "reduce", 1.0
    )
