"""What a plan records of how it came about."""

from __future__ import annotations

from typing import Any

from autoshard.ir.mesh import Spec
from autoshard.plan.records import (
    AnnotationCount,
    Annotations,
    BlockRecord,
    ConflictRecord,
    DelayedSum,
    Replicated,
    Root,
)
from autoshard.plan.sharded import Delayed, ShardedProgram
from autoshard.propagate.project import natural_dims
from autoshard.propagate.trail import trail


def records(sharded: ShardedProgram) -> dict[str, Any]:
    """The fields of a plan that tell how it came about, by name."""
    program, classes = sharded.traced.program, sharded.classes
    report = sharded.traced.annotations
    return {
        "annotations": Annotations(
            counts=tuple(
                AnnotationCount(kind=c.kind, found=c.found, reached=c.reached)
                for c in report.counts
            ),
            hints=report.hints,
            unused=report.unused,
        ),
        "blocks": tuple(
            BlockRecord(
                kind=repeat.kind,
                copies=repeat.count,
                ops=repeat.period,
                source=repeat.source,
            )
            for repeat in classes.blocks.repeats
        ),
        "conflicts": tuple(
            ConflictRecord(
                where=c.where,
                kept=c.kept,
                kept_origin=c.kept_origin,
                lost=c.lost,
                lost_origin=c.lost_origin,
                moved_bytes=c.moved_bytes,
            )
            for c in sharded.conflicts
        ),
        "delayed": tuple(_delayed(sharded, sum_) for sum_ in sharded.delayed),
        "replicated": tuple(
            Replicated(
                primitive=program.ops[i].primitive,
                address=program.ops[i].address,
                source=program.ops[i].source,
            )
            for i in classes.replicated
        ),
        "trail": trail(sharded),
    }


def _delayed(sharded: ShardedProgram, sum_: Delayed) -> DelayedSum:
    ops, rules = sharded.traced.program.ops, sharded.classes.rules
    roots, specs = [], []
    for index, factor in zip(sum_.roots, sum_.split, strict=True):
        (lhs, _), _ = ops[index].params["dimension_numbers"]
        dims = [rules[index].operands[0][d] for d in lhs]
        roots.append(
            Root(address=ops[index].address, contraction=dims.index((factor,)))
        )
        axes = sharded.factor_axes[index]
        specs.append(Spec(natural_dims(rules[index], axes)[0]))
    return DelayedSum(
        roots=tuple(roots),
        carriers=tuple(ops[i].address for i in sum_.carriers),
        axes=sum_.axes,
        specs=tuple(specs),
    )
