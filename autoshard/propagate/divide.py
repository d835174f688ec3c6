"""Which dims must divide over their axes, and which are padded where they do not."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from autoshard.ir.program import Program
from autoshard.plan.sharded import Delayed, DimClasses, Dims

Pairs = frozenset[tuple[int, tuple[str, ...]]]
"""Sizes of dims and the axes that shard them."""


def what_divides(
    program: Program,
    classes: DimClasses,
    *,
    compute: Sequence[Dims],
    specs: Sequence[Dims | None],
    factor_axes: Sequence[Dims],
    stored: Collection[int],
    delayed: Sequence[Delayed],
) -> tuple[Pairs, Pairs]:
    """What must divide, and what is padded.

    JAX wants arguments and results to divide. What lies in between the partitioner
    pads, but not where a dim is split into, or merged from, several; and the products
    of a delayed sum are cut by autoshard itself. Storage that does not divide is left
    out by propagation, with a note.
    """
    strict: set[tuple[int, tuple[str, ...]]] = set()
    loose: set[tuple[int, tuple[str, ...]]] = set()
    for index, dims in zip(program.inputs, compute, strict=True):
        shape = program.values[index].shape
        strict.update((n, d) for n, d in zip(shape, dims, strict=True) if d)
    outer = {*program.inputs, *program.outputs}
    seen: set[tuple[tuple[int, ...], Dims]] = set()
    for value, spec in zip(program.values, specs, strict=True):
        assert spec is not None
        if value.index in stored:
            continue
        if value.index in outer:
            strict.update((n, d) for n, d in zip(value.shape, spec, strict=True) if d)
        elif (value.shape, spec) not in seen:
            seen.add((value.shape, spec))
            loose.update((n, d) for n, d in zip(value.shape, spec, strict=True) if d)
    by_id = {id(rule): rule for rule in classes.rules}
    for number, axes in set(zip(map(id, classes.rules), factor_axes, strict=True)):
        if not any(axes):
            continue
        rule = by_id[number]
        compound = {
            f
            for dims in (*rule.operands, *rule.results)
            for dim in dims
            if len(dim) > 1
            for f in dim
        }
        strict.update((rule.sizes[f], axes[f]) for f in compound if axes[f])
    for sum_ in delayed:
        for index, f in zip(sum_.roots, sum_.split, strict=True):
            strict.add((classes.rules[index].sizes[f], sum_.axes))
    return frozenset(strict), frozenset(loose - strict)
