"""Ops that only rearrange: broadcasts, reshapes, transposes, slices, joins.

A dim that is cut, padded or mirrored is blocked: each device would need rows of others.
It stays one factor on both sides as long as it is the same thing to a user (see
`core.same_dim`), so that a name given to one side is the name of the other.
"""

from __future__ import annotations

import math

from autoshard.rules.core import Dim, FactorRule, Factors, RuleContext
from autoshard.rules.registry import Example, register


@register(
    "broadcast_in_dim",
    reads=["broadcast_dimensions"],
    example=Example(((4,),), ((8, 4),), {"broadcast_dimensions": (1,)}),
)
def _broadcast_in_dim(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    out = factors.dims(ctx.results[0])
    where = ctx.params["broadcast_dimensions"]
    operand = tuple(
        out[int(d)] if size == ctx.results[0][int(d)] else ()
        for size, d in zip(ctx.operands[0], where, strict=True)
    )
    return factors.rule([operand], [out], "data")


@register("empty", "empty2", "iota", example=Example((), ((8, 4),)))
def _made(ctx: RuleContext) -> FactorRule:
    """Values made of nothing but their own position."""
    factors = Factors()
    out = factors.dims(ctx.results[0])
    return factors.rule([() for _ in ctx.operands], [out], "data")


@register(
    "transpose",
    reads=["permutation"],
    example=Example(((8, 4, 2),), ((2, 8, 4),), {"permutation": (2, 0, 1)}),
)
def _transpose(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    dims = factors.dims(ctx.operands[0])
    out = tuple(dims[p] for p in ctx.params["permutation"])
    return factors.rule([dims], [out], "move")


@register("reshape", example=Example(((8, 4, 2),), ((8, 8),)))
@register("squeeze", example=Example(((8, 1, 4),), ((8, 4),)))
def _reshape(ctx: RuleContext) -> FactorRule:
    """Splits and merges dims: `(ij) -> i j` and back, `i` being the major part."""
    factors = Factors()
    a, b = list(ctx.operands[0]), list(ctx.results[0])
    left: list[list[int]] = [[] for _ in a]
    right: list[list[int]] = [[] for _ in b]
    i, j = len(a) - 1, len(b) - 1
    m, n = (a[i] if a else 1), (b[j] if b else 1)
    while i >= 0 and j >= 0:
        if m == 1:
            i -= 1
            m = a[i] if i >= 0 else 1
            continue
        if n == 1:
            j -= 1
            n = b[j] if j >= 0 else 1
            continue
        small, large = min(m, n), max(m, n)
        if not small or large % small:  # not nested: nothing to the left is aligned
            break
        (factor,) = factors.new(small)
        left[i].insert(0, factor)
        right[j].insert(0, factor)
        m, n = m // small, n // small
    if math.prod(a[: max(i, 0)]) * m != 1:
        for dims, shape, end in ((left, a, i), (right, b, j)):
            for d in range(end + 1):
                dims[d] = list(factors.new(shape[d], "blocked"))
    return factors.rule([tuple(map(tuple, left))], [tuple(map(tuple, right))], "move")


@register(
    "rev",
    reads=["dimensions"],
    example=Example(((8, 4),), ((8, 4),), {"dimensions": (1,)}),
)
def _rev(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    dims = tuple(
        factors.new(size, "blocked" if d in ctx.params["dimensions"] else "pass")
        for d, size in enumerate(ctx.operands[0])
    )
    return factors.rule([dims], [dims], "move")


@register("tile", example=Example(((8, 4),), ((8, 12),)))
def _tile(ctx: RuleContext) -> FactorRule:
    """A repeated dim holds its copies one behind the other: the copy is the major part.

    Each device makes its own copies of an operand that it has whole.
    """
    factors = Factors()
    operand: list[Dim] = []
    result: list[Dim] = []
    for m, n in zip(ctx.operands[0], ctx.results[0], strict=True):
        dim = factors.new(m)
        copies = factors.new(n // m) if m else ()
        operand.append(dim)
        result.append((*copies, *dim))
    return factors.rule([tuple(operand)], [tuple(result)], "move")


def _resized(
    factors: Factors, inner: tuple[int, ...], outer: tuple[int, ...]
) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Dims of an op whose result is part of its operand, or the reverse."""
    pairs = [factors.kept(m, n) for m, n in zip(inner, outer, strict=True)]
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)


@register("dynamic_slice", example=Example(((8, 64), (), ()), ((8, 48),)))
@register("slice", example=Example(((8, 1024),), ((8, 1023),)))
def _slice(ctx: RuleContext) -> FactorRule:
    """A dim of unchanged size is not cut at all, wherever the slice starts."""
    factors = Factors()
    operand, out = _resized(factors, ctx.operands[0], ctx.results[0])
    return factors.rule([operand, *[() for _ in ctx.operands[1:]]], [out], "move")


@register(
    "dynamic_update_slice",
    example=Example(((8, 1024), (8, 1023), (), ()), ((8, 1024),)),
)
def _dynamic_update_slice(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    update, operand = _resized(factors, ctx.operands[1], ctx.operands[0])
    rest = [() for _ in ctx.operands[2:]]
    return factors.rule([operand, update, *rest], [operand], "move")


@register(
    "pad",
    reads=["padding_config"],
    example=Example(
        ((8, 1023), ()), ((8, 1024),), {"padding_config": ((0, 0, 0), (1, 0, 0))}
    ),
)
def _pad(ctx: RuleContext) -> FactorRule:
    """What is cut off may equal what is added: then the size stays, and all moves."""
    factors = Factors()
    pairs = [
        factors.kept(m, n, moved=any(padding))
        for m, n, padding in zip(
            ctx.operands[0], ctx.results[0], ctx.params["padding_config"], strict=True
        )
    ]
    inner, outer = tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
    return factors.rule([inner, ()], [outer], "move")


@register(
    "concatenate",
    reads=["dimension"],
    example=Example(((8, 1000), (8, 24)), ((8, 1024),), {"dimension": 1}),
)
def _concatenate(ctx: RuleContext) -> FactorRule:
    """A part that makes up seven eighths or more is the same dim as the whole.

    A token put before a sequence leaves it a sequence; two equal halves make something
    new.
    """
    factors = Factors()
    axis, whole = ctx.params["dimension"], ctx.results[0]
    shared = [() if d == axis else factors.new(size) for d, size in enumerate(whole)]

    def dims(along: Dim) -> tuple[Dim, ...]:
        return (*shared[:axis], along, *shared[axis + 1 :])

    sizes = [shape[axis] for shape in ctx.operands]
    most = max(sizes)
    keeps = sizes.index(most) if 8 * most >= 7 * whole[axis] else -1
    parts = [
        () if k == keeps else factors.new(n, "blocked") for k, n in enumerate(sizes)
    ]
    joined = factors.new(whole[axis], "blocked")
    if keeps >= 0:
        parts[keeps] = joined
    return factors.rule([dims(part) for part in parts], [dims(joined)], "move")


@register(
    "split",
    reads=["axis"],
    example=Example(((8, 6),), ((8, 4), (8, 2)), {"axis": 1}),
)
@register(
    "stack",
    reads=["axis"],
    example=Example(((8, 4), (8, 4)), ((2, 8, 4),), {"axis": 0}),
)
@register(
    "unstack",
    reads=["axis"],
    example=Example(((2, 8, 4),), ((8, 4), (8, 4)), {"axis": 0}),
)
def _parts(ctx: RuleContext) -> FactorRule:
    """Parts of an array along one dim, which is blocked; the others pass.

    The parts are things of their own: query, key and value are none of them the whole.
    """
    factors = Factors()
    axis = ctx.params["axis"]
    apart = ctx.primitive in ("split", "unstack")
    parts, whole = (
        (ctx.results, ctx.operands[0]) if apart else (ctx.operands, ctx.results[0])
    )
    shared = [() if d == axis else factors.new(size) for d, size in enumerate(whole)]

    def dims(size: int | None) -> tuple[Dim, ...]:
        along = () if size is None else (factors.new(size, "blocked"),)
        return (*shared[:axis], *along, *shared[axis + 1 :])

    part_dims = [
        dims(shape[axis] if ctx.primitive == "split" else None) for shape in parts
    ]
    whole_dims = [dims(whole[axis])]
    if apart:
        return factors.rule(whole_dims, part_dims, "move")
    return factors.rule(part_dims, whole_dims, "move")


@register(
    "link",
    reads=["kind", "lead"],
    example=Example(((3, 8, 4),), ((8, 4),), {"kind": "slice", "lead": True}),
)
def _link(ctx: RuleContext) -> FactorRule:
    """Ties a value inside a region to one outside.

    `lead` adds the loop's own dim to the outer value. At the border of a manual region
    a dim may be larger outside: inside, a device sees its own part.
    """
    factors = Factors()
    operand, result = ctx.operands[0], ctx.results[0]
    if not ctx.params["lead"]:
        inner, outer = [], []
        for m, n in zip(operand, result, strict=True):
            dim = factors.new(max(m, n), "pass" if m == n else "blocked")
            inner.append(dim if m > 1 else ())
            outer.append(dim if n > 1 else ())
        return factors.rule([tuple(inner)], [tuple(outer)], "link")
    if ctx.params["kind"] == "slice":
        lead = factors.new(operand[0], "blocked")
        dims = factors.dims(result)
        return factors.rule([(lead, *dims)], [dims], "link")
    lead = factors.new(result[0], "blocked")
    dims = factors.dims(operand)
    return factors.rule([dims], [(lead, *dims)], "link")
