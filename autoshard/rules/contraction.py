"""Matrix products and convolutions."""

from __future__ import annotations

from autoshard.rules.core import Dim, FactorRule, Factors, RuleContext, register


@register("dot_general")
def _dot_general(ctx: RuleContext) -> FactorRule:
    """Batch dims first in the result, then the free dims of lhs and of rhs."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = ctx.params["dimension_numbers"]
    lhs, rhs = ctx.operands
    factors = Factors()
    left: dict[int, Dim] = {}
    right: dict[int, Dim] = {}
    for a, b in zip(lhs_batch, rhs_batch, strict=True):
        left[a] = right[b] = factors.new(lhs[a])
    free_left = [d for d in range(len(lhs)) if d not in (*lhs_batch, *lhs_sum)]
    free_right = [d for d in range(len(rhs)) if d not in (*rhs_batch, *rhs_sum)]
    for d in free_left:
        left[d] = factors.new(lhs[d])
    for d in free_right:
        right[d] = factors.new(rhs[d])
    for a, b in zip(lhs_sum, rhs_sum, strict=True):
        left[a] = right[b] = factors.new(lhs[a], "reduce")
    out = (
        *(left[a] for a in lhs_batch),
        *(left[d] for d in free_left),
        *(right[d] for d in free_right),
    )
    return factors.rule(
        [
            tuple(left[d] for d in range(len(lhs))),
            tuple(right[d] for d in range(len(rhs))),
        ],
        [out],
        "matmul",
        2.0,
    )


@register("conv_general_dilated")
def _conv(ctx: RuleContext) -> FactorRule:
    """Batch and features are sharded; the spatial window needs all of its dims."""
    numbers = ctx.params["dimension_numbers"]
    grouped = ctx.params["feature_group_count"] * ctx.params["batch_group_count"] != 1
    lhs, rhs = ctx.operands
    out = ctx.results[0]
    lhs_spec, rhs_spec, out_spec = (
        numbers.lhs_spec,
        numbers.rhs_spec,
        numbers.out_spec,
    )
    factors = Factors()
    a: list[Dim] = [() for _ in lhs]
    b: list[Dim] = [() for _ in rhs]
    c: list[Dim] = [() for _ in out]
    # Input dims that are wider than what one output point reads get no factor, else
    # the factor space would count more products than there are.
    if ctx.params["batch_group_count"] == 1:
        a[lhs_spec[0]] = c[out_spec[0]] = factors.new(lhs[lhs_spec[0]])
    else:
        c[out_spec[0]] = factors.new(out[out_spec[0]], "blocked")
    if grouped:
        b[rhs_spec[0]] = c[out_spec[1]] = factors.new(rhs[rhs_spec[0]], "blocked")
        b[rhs_spec[1]] = factors.new(rhs[rhs_spec[1]], "blocked")
    else:
        b[rhs_spec[0]] = c[out_spec[1]] = factors.new(rhs[rhs_spec[0]])
        a[lhs_spec[1]] = b[rhs_spec[1]] = factors.new(rhs[rhs_spec[1]], "reduce")
    for la, lb, lc in zip(lhs_spec[2:], rhs_spec[2:], out_spec[2:], strict=True):
        # The input's window positions are covered by output position times kernel.
        a[la] = b[lb] = ()
        c[lc] = factors.new(out[lc], "blocked")
        b[lb] = factors.new(rhs[lb], "blocked")
    return factors.rule([tuple(a), tuple(b)], [tuple(c)], "matmul", 2.0)
