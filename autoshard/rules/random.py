"""Random bits and keys."""

from __future__ import annotations

from math import prod

from autoshard.rules.core import FactorKind, FactorRule, Factors, RuleContext
from autoshard.rules.registry import Example, register


@register("rng_uniform", example=Example(((), ()), ((8, 4),)))
@register("iota_2x32_shape", example=Example((), ((8, 4), (8, 4))))
def _by_position(ctx: RuleContext) -> FactorRule:
    """All results are alike, and each position is made for itself."""
    factors = Factors()
    dims = factors.dims(ctx.results[0])
    return factors.rule(
        [() for _ in ctx.operands], [dims for _ in ctx.results], "data", 1.0
    )


@register("random_bits", example=Example(((3,),), ((3, 8, 4),)))
@register("random_split", example=Example(((3,),), ((3, 2),)))
@register("random_unwrap", example=Example(((3,),), ((3, 2),)))
@register("random_wrap", example=Example(((3, 2),), ((3,),)))
def _keys(ctx: RuleContext) -> FactorRule:
    """Many keys stand in the leading dims, each by itself.

    Bits are a function of the key and the position: results shard, as every device
    makes those of its own positions. The words of a key, and the keys made of one, come
    together.
    """
    operand, result = ctx.operands[0], ctx.results[0]
    count = min(len(operand), len(result))
    own: FactorKind = "pass" if ctx.primitive == "random_bits" else "blocked"
    factors = Factors()
    shared = factors.dims(operand[:count])
    return factors.rule(
        [(*shared, *factors.dims(operand[count:], "blocked"))],
        [(*shared, *factors.dims(result[count:], own))],
        "move",
        1.0,
    )


@register("random_gamma", example=Example(((8,), (8, 4)), ((8, 4),)))
@register("random_fold_in", example=Example(((8,), (8,)), ((8,),)))
@register("random_clone", "random_seed", example=Example(((8,),), ((8,),)))
def _one_by_one(ctx: RuleContext) -> FactorRule:
    """Each key, seed or sample by itself; a key may serve a whole array."""
    factors = Factors()
    dims = factors.dims(ctx.results[0])
    return factors.rule(
        [dims[: len(shape)] for shape in ctx.operands], [dims], "move", 1.0
    )


@register("rng_bit_generator", example=Example(((4,),), ((4,), (8,))))
def _generator(ctx: RuleContext) -> FactorRule:
    """A stateful generator counts through its bits: no part can be made alone."""
    factors = Factors()
    return factors.rule(
        [factors.dims(shape, "blocked") for shape in ctx.operands],
        [factors.dims(shape, "blocked") for shape in ctx.results],
        "move",
        flops=float(sum(prod(shape) for shape in ctx.results)),
    )
