"""Ops that only rearrange: broadcasts, reshapes, transposes, slices, joins."""

from __future__ import annotations

import math

from autoshard.rules.core import Dim, FactorRule, Factors, RuleContext, register


def _kept(
    factors: Factors, inner: tuple[int, ...], outer: tuple[int, ...]
) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Dims for an op whose result is part of its operand, or the reverse.

    A dim of unchanged size is the same factor on both sides; another one is blocked.
    """
    a: list[Dim] = []
    b: list[Dim] = []
    for m, n in zip(inner, outer, strict=True):
        if m == n:
            dim = factors.new(m)
            a.append(dim)
            b.append(dim)
        else:
            a.append(factors.new(m, "blocked"))
            b.append(factors.new(n, "blocked"))
    return tuple(a), tuple(b)


@register("broadcast_in_dim")
def _broadcast_in_dim(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    out = factors.dims(ctx.results[0])
    where = ctx.params["broadcast_dimensions"]
    operand = tuple(
        out[int(d)] if size == ctx.results[0][int(d)] else ()
        for size, d in zip(ctx.operands[0], where, strict=True)
    )
    rest = [() for _ in ctx.operands[1:]]
    return factors.rule([operand, *rest], [out], "data")


@register("iota")
def _iota(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    out = factors.dims(ctx.results[0])
    return factors.rule([() for _ in ctx.operands], [out], "data")


@register("empty", "empty2")
def _empty(ctx: RuleContext) -> FactorRule:
    return _iota(ctx)


@register("transpose")
def _transpose(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    dims = factors.dims(ctx.operands[0])
    out = tuple(dims[p] for p in ctx.params["permutation"])
    return factors.rule([dims], [out], "move")


@register("squeeze")
def _squeeze(ctx: RuleContext) -> FactorRule:
    return _reshape(ctx)


@register("reshape")
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


@register("slice", "rev", "tile")
def _resize(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    if ctx.primitive == "rev":
        dims = tuple(
            factors.new(size, "blocked" if d in ctx.params["dimensions"] else "pass")
            for d, size in enumerate(ctx.operands[0])
        )
        return factors.rule([dims], [dims], "move")
    inner, outer = _kept(factors, ctx.operands[0], ctx.results[0])
    rest = [() for _ in ctx.operands[1:]]
    return factors.rule([inner, *rest], [outer], "move")


@register("pad")
def _pad(ctx: RuleContext) -> FactorRule:
    """A dim with any padding is blocked: what is cut off may equal what is added."""
    factors = Factors()
    inner: list[Dim] = []
    outer: list[Dim] = []
    for m, n, padding in zip(
        ctx.operands[0], ctx.results[0], ctx.params["padding_config"], strict=True
    ):
        if any(padding):
            inner.append(factors.new(m, "blocked"))
            outer.append(factors.new(n, "blocked"))
        else:
            dim = factors.new(m)
            inner.append(dim)
            outer.append(dim)
    return factors.rule([tuple(inner), ()], [tuple(outer)], "move")


@register("concatenate", "split", "stack", "unstack")
def _join(ctx: RuleContext) -> FactorRule:
    """Joins or parts arrays along one dim, which is blocked; the others pass."""
    factors = Factors()
    axis = ctx.params["dimension" if ctx.primitive == "concatenate" else "axis"]
    added = ctx.primitive in ("stack", "unstack")
    parts = ctx.results if ctx.primitive in ("split", "unstack") else ctx.operands
    whole = ctx.operands if ctx.primitive in ("split", "unstack") else ctx.results
    shared = [() if d == axis else factors.new(size) for d, size in enumerate(whole[0])]

    def dims(shape: tuple[int, ...], is_part: bool) -> tuple[Dim, ...]:
        out = list(shared)
        if added and is_part:
            del out[axis]
        else:
            out[axis] = factors.new(shape[axis], "blocked")
        return tuple(out)

    part_dims = [dims(shape, True) for shape in parts]
    whole_dims = [dims(whole[0], False)]
    if ctx.primitive in ("split", "unstack"):
        return factors.rule(whole_dims, part_dims, "move")
    return factors.rule(part_dims, whole_dims, "move")


@register("dynamic_slice")
def _dynamic_slice(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    operand, out = _kept(factors, ctx.operands[0], ctx.results[0])
    return factors.rule([operand, *[() for _ in ctx.operands[1:]]], [out], "move")


@register("dynamic_update_slice")
def _dynamic_update_slice(ctx: RuleContext) -> FactorRule:
    factors = Factors()
    update, operand = _kept(factors, ctx.operands[1], ctx.operands[0])
    rest = [() for _ in ctx.operands[2:]]
    return factors.rule([operand, update, *rest], [operand], "move")


@register("link")
def _link(ctx: RuleContext) -> FactorRule:
    """Ties a value inside a loop to one outside; `lead` adds the loop's own dim."""
    factors = Factors()
    if not ctx.params["lead"]:
        dims = factors.dims(ctx.operands[0])
        return factors.rule([dims], [dims], "link")
    if ctx.params["kind"] == "slice":
        lead = factors.new(ctx.operands[0][0], "blocked")
        dims = factors.dims(ctx.results[0])
        return factors.rule([(lead, *dims)], [dims], "link")
    lead = factors.new(ctx.results[0][0], "blocked")
    dims = factors.dims(ctx.operands[0])
    return factors.rule([dims], [(lead, *dims)], "link")
