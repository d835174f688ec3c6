"""A program without most copies of its blocks, for pricing what the search tries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autoshard.cost.work import materialised
from autoshard.ir.fold import Folded, fold, unfolded
from autoshard.ir.trace import Traced
from autoshard.plan.ragged import Ragged
from autoshard.plan.sharded import DimClasses, Fixed


def folded_by(traced: Traced, classes: DimClasses) -> tuple[Folded, DimClasses]:
    """Folds a program, and takes its classes along.

    Copies with other names, with other mesh axes that the user fixed, or of which other
    values are in memory, are kept.

    Returns:
        What is left of the program, and its classes: those of the whole, numbered as
        they are there.
    """
    folded = fold(traced, marks(traced, classes))
    if folded.traced is traced:
        return folded, classes
    return folded, left_of(classes, folded)


def marks(traced: Traced, classes: DimClasses) -> list[int]:
    """Per value a number for all that is known of it beyond the program."""
    infos = {
        v: (info.state, info.logical)
        for v, info in zip(traced.program.inputs, traced.inputs, strict=True)
    }
    names, fixed = classes.names, classes.fixed
    in_memory = materialised(traced.program, classes, unfolded(traced))
    numbers: dict[object, int] = {}
    return [
        numbers.setdefault(
            (
                tuple([names.get(cls) for cls in dims]),
                infos.get(v),
                in_memory[v],
                fixed.dims.get(v),
                fixed.storage.get(v),
            ),
            len(numbers),
        )
        for v, dims in enumerate(classes.of_value)
    ]


def left_of(classes: DimClasses, folded: Folded) -> DimClasses:
    """The classes of what is left of a program, numbered as they are in the whole."""
    ops = dict(zip(folded.ops, range(len(folded.ops)), strict=True))
    values = dict(zip(folded.values, range(len(folded.values)), strict=True))
    fixed = classes.fixed
    return replace(
        classes,
        rules=tuple(classes.rules[o] for o in folded.ops),
        of_value=_rows(classes.of_value[v] for v in folded.values),
        of_factor=_rows(classes.of_factor[o] for o in folded.ops),
        blocks=folded.traced.blocks,
        named_at=tuple(
            (values[v], *rest) for v, *rest in classes.named_at if v in values
        ),
        fixed=Fixed(
            dims={values[v]: d for v, d in fixed.dims.items() if v in values},
            storage={values[v]: d for v, d in fixed.storage.items() if v in values},
            factors={ops[o]: d for o, d in fixed.factors.items() if o in ops},
            why={
                (values[v], d): why for (v, d), why in fixed.why.items() if v in values
            },
            origins=fixed.origins,
            conflicts=fixed.conflicts,
        ),
        replicated=tuple(ops[o] for o in classes.replicated if o in ops),
        batched=tuple(classes.batched[v] for v in folded.values),
        early=classes.early.of_part(ops, values),
    )


def _rows(rows: Iterable[tuple[int, ...]]) -> Ragged:
    flat: list[int] = []
    starts = [0]
    for row in rows:
        flat += row
        starts.append(len(flat))
    return Ragged(flat, starts)
