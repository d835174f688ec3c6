"""Calls out of the program, tokens, and values that only the compiler asks for."""

from __future__ import annotations

from autoshard.rules.core import FactorRule, Factors, RuleContext
from autoshard.rules.registry import Example, register


@register(
    "check", "debug_callback", "debug_print", "inspect_sharding",
    example=Example(((8, 4),), ()),
)  # fmt: skip
@register(
    "io_callback", "pure_callback", example=Example(((8, 4),), ((8,),)),
)  # fmt: skip
def _callback(ctx: RuleContext) -> FactorRule:
    """Python on the host sees whole arrays and gives whole arrays."""
    factors = Factors()
    return factors.rule(
        [factors.dims(shape, "blocked") for shape in ctx.operands],
        [factors.dims(shape, "blocked") for shape in ctx.results],
        "foreign",
    )


@register("after_all", "create_token", "dce_sink", example=Example(((),), ((),)))
def _token(ctx: RuleContext) -> FactorRule:
    """Only an order of execution: whatever is waited for stays as it lies."""
    factors = Factors()
    return factors.rule(
        [factors.dims(shape) for shape in ctx.operands],
        [() for _ in ctx.results],
        "data",
    )


@register("platform_index", example=Example((), ((),)))
def _platform_index(ctx: RuleContext) -> FactorRule:
    return Factors().rule([], [()], "data")
