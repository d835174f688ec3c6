"""Gathers and scatters."""

from __future__ import annotations

from jax.lax import GatherDimensionNumbers, ScatterDimensionNumbers

from autoshard.rules.core import Dim, FactorRule, Factors, RuleContext
from autoshard.rules.registry import Example, register


@register(
    "gather",
    reads=["dimension_numbers", "slice_sizes"],
    example=Example(
        ((16, 4), (8, 1)),
        ((8, 4),),
        {
            "dimension_numbers": GatherDimensionNumbers((1,), (0,), (0,)),
            "slice_sizes": (1, 4),
        },
    ),
)
def _gather(ctx: RuleContext) -> FactorRule:
    """An indexed dim may be sharded: each device answers for the rows it holds.

    The others answer zero, so the results are partial sums over that dim's axes; this
    is what XLA's partitioner does for an embedding lookup.
    """
    numbers = ctx.params["dimension_numbers"]
    operand, indices = ctx.operands
    slices = ctx.params["slice_sizes"]
    factors = Factors()
    table: list[Dim] = [() for _ in operand]
    index: list[Dim] = [*factors.dims(indices[:-1]), ()]
    for a, b in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        table[a] = index[b]
    windows: list[Dim] = []
    for d, size in enumerate(operand):
        if d in numbers.operand_batching_dims:
            continue
        if d in numbers.collapsed_slice_dims:
            table[d] = factors.new(size, "reduce")
        elif slices[d] == size:
            table[d] = factors.new(size)
            windows.append(table[d])
        else:
            table[d], window = factors.kept(size, slices[d])
            windows.append(window)
    rows, window_dims = iter(index[:-1]), iter(windows)
    out = tuple(
        next(window_dims) if d in numbers.offset_dims else next(rows)
        for d in range(len(ctx.results[0]))
    )
    index[-1] = factors.new(indices[-1], "blocked")
    return factors.rule([tuple(table), tuple(index)], [out], "gather")


@register(
    "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul",
    "scatter-sub", reads=["dimension_numbers"],
    example=Example(
        ((16, 4), (8, 1), (8, 4)),
        ((16, 4),),
        {"dimension_numbers": ScatterDimensionNumbers((1,), (0,), (0,))},
    ),
)  # fmt: skip
def _scatter(ctx: RuleContext) -> FactorRule:
    """The transpose of a gather: updates from sharded rows give partial results.

    They are combined as the updates are: added, multiplied, or the largest taken. Only
    a scatter that overwrites (or applies a function of the user's) has no such way, as
    the last of several updates wins.
    """
    numbers = ctx.params["dimension_numbers"]
    operand, indices, updates = ctx.operands
    combines = ctx.primitive != "scatter"
    factors = Factors()
    index: list[Dim] = [
        factors.new(
            size,
            "pass"
            if d in numbers.scatter_indices_batching_dims
            else "reduce"
            if combines
            else "blocked",
        )
        for d, size in enumerate(indices[:-1])
    ]
    index.append(factors.new(indices[-1], "blocked"))
    target: list[Dim] = [() for _ in operand]
    for a, b in zip(
        numbers.operand_batching_dims,
        numbers.scatter_indices_batching_dims,
        strict=True,
    ):
        target[a] = index[b]
    window_dims = iter(numbers.update_window_dims)
    update: dict[int, Dim] = {}
    for d, size in enumerate(operand):
        if d in numbers.operand_batching_dims:
            continue
        if d in numbers.inserted_window_dims:
            target[d] = factors.new(size)
            continue
        u = next(window_dims)
        if updates[u] == size:
            target[d] = update[u] = factors.new(size)
        else:
            target[d], update[u] = factors.kept(size, updates[u])
    rows = iter(index[:-1])
    dims = tuple(update[d] if d in update else next(rows) for d in range(len(updates)))
    return factors.rule([tuple(target), tuple(index), dims], [tuple(target)], "scatter")
