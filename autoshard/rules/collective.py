"""Collectives that the user calls in a manual region.

Inside, a value is one device's own part, and no dim is sharded any further: all are
blocked. Dims that keep their size stay the same dim, so names pass through.
"""

from __future__ import annotations

from autoshard.rules.core import Dim, FactorRule, Factors, RuleContext
from autoshard.rules.registry import Example, register


@register(
    "pbroadcast", "pmax", "pmin", "ppermute", "precv", "psend", "psum",
    "psum_invariant", "unreduced_pmax", "unreduced_pmin", "unreduced_psum",
    "pbroadcast_dynamic", example=Example(((8, 4),), ((8, 4),)),
)  # fmt: skip
def _alike(ctx: RuleContext) -> FactorRule:
    """A result of its operand's shape has its dims.

    A token is sent or received in place of one of them.
    """
    factors = Factors()
    dims = [factors.dims(shape, "blocked") for shape in ctx.operands]
    results = [
        dims[k] if ctx.operands[k] == shape else factors.dims(shape, "blocked")
        for k, shape in enumerate(ctx.results)
    ]
    return factors.rule(dims, results, "collective")


@register("axis_index", example=Example((), ((),)))
def _axis_index(ctx: RuleContext) -> FactorRule:
    return Factors().rule([], [()], "data")


def _changed(ctx: RuleContext, at_operand: set[int], at_result: set[int]) -> FactorRule:
    """The dims named change size or appear anew; the others are kept, in their order.

    Args:
        ctx: The op.
        at_operand: Dims of the operand that are not the result's.
        at_result: Dims of the result that are not the operand's.
    """
    factors = Factors()
    operand, result = ctx.operands[0], ctx.results[0]
    dims = factors.dims(operand, "blocked")
    kept = iter([dim for d, dim in enumerate(dims) if d not in at_operand])
    out: list[Dim] = [
        factors.new(size, "blocked") if d in at_result else next(kept)
        for d, size in enumerate(result)
    ]
    return factors.rule([dims], [tuple(out)], "collective")


@register(
    "all_gather",
    "all_gather_invariant",
    "all_gather_reduced",
    reads=["all_gather_dimension", "tiled"],
    example=Example(((8, 4),), ((8, 16),), {"all_gather_dimension": 1, "tiled": True}),
)
def _all_gather(ctx: RuleContext) -> FactorRule:
    at = ctx.params["all_gather_dimension"]
    return _changed(ctx, {at} if ctx.params["tiled"] else set(), {at})


@register(
    "reduce_scatter",
    "unreduced_reduce_scatter",
    reads=["scatter_dimension", "tiled"],
    example=Example(((8, 16),), ((8, 4),), {"scatter_dimension": 1, "tiled": True}),
)
def _reduce_scatter(ctx: RuleContext) -> FactorRule:
    at = ctx.params["scatter_dimension"]
    return _changed(ctx, {at}, {at} if ctx.params["tiled"] else set())


@register(
    "all_to_all",
    reads=["concat_axis", "split_axis"],
    example=Example(((8, 16),), ((32, 4),), {"concat_axis": 0, "split_axis": 1}),
)
def _all_to_all(ctx: RuleContext) -> FactorRule:
    """One dim is cut and another grows by as much."""
    cut, grown = ctx.params["split_axis"], ctx.params["concat_axis"]
    changed = set() if cut == grown else {cut, grown}
    return _changed(ctx, changed, changed)


@register(
    "ragged_all_to_all", example=Example(((8, 4), (8, 4)) + ((2,),) * 4, ((8, 4),))
)
def _ragged_all_to_all(ctx: RuleContext) -> FactorRule:
    """Rows go where the four lists of offsets and sizes say; widths stay."""
    factors = Factors()
    operand, output, *lists = ctx.operands
    width = factors.dims(operand[1:], "blocked")
    rows, filled = (factors.new(shape[0], "blocked") for shape in (operand, output))
    ranks = [factors.dims(shape, "blocked") for shape in lists]
    return factors.rule(
        [(rows, *width), (filled, *width), *ranks], [(filled, *width)], "collective"
    )
