"""Ops that work point by point: operands have the shape of the result, or none.

An operand may also have dims of size one where the result has more; it is then read
over and over along them.
"""

from __future__ import annotations

from autoshard.rules.core import Dim, FactorRule, Factors, RuleContext, register


def pointwise(ctx: RuleContext, flops: float) -> FactorRule:
    """The rule of a point-by-point op of any number of operands and results."""
    factors = Factors()
    dims = factors.dims(ctx.results[0])

    def operand(shape: tuple[int, ...]) -> tuple[Dim, ...]:
        # A dim of size one has no part of the result's factor to hold: sharded like
        # the result it would be padded, and moved.
        return tuple(
            dim if size > 1 else ()
            for dim, size in zip(dims, shape, strict=False)  # a scalar has no dims
        )

    return factors.rule(
        [operand(shape) for shape in ctx.operands],
        [dims for _ in ctx.results],
        "elementwise",
        flops,
    )


@register(
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2",
    "atanh", "cbrt", "ceil", "clamp", "complex", "conj", "cos", "cosh", "digamma",
    "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "log2",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "one_minus_square", "or", "population_count", "pow", "real", "rem", "round",
    "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical",
    "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "threefry2x32",
    "xor",
)  # fmt: skip
def _arithmetic(ctx: RuleContext) -> FactorRule:
    return pointwise(ctx, 1.0)


@register(
    "autoshard_annotate", "convert_element_type", "copy", "device_put", "name",
    "reduce_precision", "stop_gradient",
)  # fmt: skip
def _identity(ctx: RuleContext) -> FactorRule:
    return pointwise(ctx, 0.0)


@register("optimization_barrier")
def _barrier(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    dims = [factors.dims(shape) for shape in ctx.operands]
    return factors.rule(dims, dims, "elementwise")


@register("bitcast_convert_type")
def _bitcast(ctx: RuleContext) -> FactorRule:
    """A change of width adds or drops a last dim, which holds the parts of a word."""
    factors = Factors()
    operand, result = ctx.operands[0], ctx.results[0]
    shared = factors.dims(min(operand, result, key=len))
    parts = tuple(
        factors.new(n, "blocked") for n in max(operand, result, key=len)[len(shared) :]
    )
    wide = (*shared, *parts)
    return factors.rule(
        [wide if len(operand) > len(shared) else shared],
        [wide if len(result) > len(shared) else shared],
        "elementwise",
    )
