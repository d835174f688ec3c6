"""Ops that work point by point: operands have the shape of the result, or none.

An operand may also have dims of size one where the result has more; it is then read
over and over along them.
"""

from __future__ import annotations

from autoshard.rules.core import Dim, FactorRule, Factors, RuleContext
from autoshard.rules.registry import Example, register


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
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e",
    "bessel_i1e", "cbrt", "ceil", "clz", "conj", "cos", "cosh", "digamma", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "imag", "integer_pow",
    "is_finite", "lgamma", "log", "log1p", "log2", "logistic", "neg", "not",
    "one_minus_square", "population_count", "real", "round", "rsqrt", "sign", "sin",
    "sinh", "sqrt", "square", "tan", "tanh", example=Example(((8, 4),), ((8, 4),)),
)  # fmt: skip
@register(
    "add", "add_any", "and", "atan2", "complex", "div", "eq", "eq_to", "ge", "gt",
    "igamma", "igamma_grad_a", "igammac", "le", "le_to", "lt", "lt_to", "max", "min",
    "mul", "mulhi", "ne", "nextafter", "or", "polygamma", "pow", "rem", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sub", "xor", "zeta",
    example=Example(((8, 4), (8, 4)), ((8, 4),)),
)  # fmt: skip
@register(
    "clamp", "polynomial", "regularized_incomplete_beta", "select_n",
    example=Example(((8, 4),) * 3, ((8, 4),)),
)  # fmt: skip
@register("threefry2x32", example=Example(((8,),) * 4, ((8,), (8,))))
def _arithmetic(ctx: RuleContext) -> FactorRule:
    return pointwise(ctx, 1.0)


@register(
    "autoshard_annotate", "convert_element_type", "copy", "device_put", "from_edtype",
    "layout_constraint", "name", "preduced", "pvary", "reduce_precision",
    "reduced_vary_cast", "reduced_vary_cast_p", "relayout", "reshard",
    "sharding_constraint", "stage", "stop_gradient", "to_edtype", "vary_unreduced_cast",
    "vary_unreduced_cast_p", "with_memory_space_constraint", "xla_metadata_value",
    example=Example(((8, 4),), ((8, 4),)),
)  # fmt: skip
def _identity(ctx: RuleContext) -> FactorRule:
    """The values stay; only their type, their place or what is known of them changes.

    Where a user fixes a place, in `sharding_constraint` and `reshard`, it is read as an
    annotation, and not from this rule.
    """
    return pointwise(ctx, 0.0)


@register("tie", example=Example(((2,), (8, 4)), ((8, 4),)))
def _tie(ctx: RuleContext) -> FactorRule:
    """The second operand, once the first is there."""
    factors = Factors()
    first, second = (factors.dims(shape) for shape in ctx.operands)
    return factors.rule([first, second], [second], "elementwise")


@register("optimization_barrier", example=Example(((8,), (4,)), ((8,), (4,))))
def _barrier(ctx: RuleContext) -> FactorRule:
    """Each operand comes out as it went in; they are tied only in time."""
    factors = Factors()
    dims = [factors.dims(shape) for shape in ctx.operands]
    return factors.rule(dims, dims, "elementwise")


@register("bitcast_convert_type", example=Example(((8, 4),), ((8, 4, 2),)))
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
