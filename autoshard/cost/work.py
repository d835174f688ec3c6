"""What a program's ops do, whatever the mesh: FLOPs, bytes, and what is materialised.

The compiler fuses point-by-point ops, so most of their values never reach memory. A
value is taken to be materialised when it is an argument or a result, when a product, a
lookup, a reduction or a loop makes or takes it, or when it is used much later (a
residual kept for the backward pass).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from autoshard.cost.schedule import lifetimes, positions
from autoshard.cost.segments import UNCUT, Segments, segments
from autoshard.cost.written import Fusions
from autoshard.ir.program import Program
from autoshard.ir.trace import Traced
from autoshard.ir.train_step import UPDATE_SCOPE
from autoshard.plan.sharded import DimClasses

FUSION_REACH_OPS = 64
"""A use further away than this many ops is not fused with the producer."""

_FUSED = ("elementwise", "data", "move")


@dataclass(frozen=True, slots=True)
class Work:
    """Facts of a program that no mesh changes.

    Attributes:
        runs: Runs per call per op, loops included.
        flops: Floating-point operations of one run of each op, unsharded.
        materialised: Per value, whether it exists in memory.
        batched: Per value, whether a microbatch holds only a part of it.
        batched_op: Per op, whether it works on such values.
        update: Per op, whether it runs once a step rather than once a microbatch.
        at: Per op, its position in the order of execution.
        birth: Per value, the position from which it occupies memory, -1 for never.
        death: Per value, the last position at which it is needed.
        over: Values that are written over the result of a product.
        gradients: Values that hold gradients.
        fusions: The kernels that its ops become.
        segments: Where its blocks are, between which stages can be cut.
    """

    runs: tuple[int, ...]
    flops: tuple[float, ...]
    materialised: tuple[bool, ...]
    batched: tuple[bool, ...]
    batched_op: tuple[bool, ...]
    update: tuple[bool, ...]
    at: tuple[int, ...]
    birth: tuple[int, ...]
    death: tuple[int, ...]
    over: frozenset[int]
    gradients: frozenset[int]
    fusions: Fusions
    segments: Segments = UNCUT


def analyse(traced: Traced, classes: DimClasses) -> Work:
    """Reads the facts of a traced program."""
    program = traced.program
    rules = classes.rules
    batch = {c for c, names in classes.names.items() if "batch" in names}
    runs = [program.runs(r) for r in range(len(program.regions))]
    batched_op = tuple(
        any(c in batch for c in factor_classes) for factor_classes in classes.of_factor
    )
    at = positions(program)
    materialised = _materialised(program, classes)
    birth, death, over = lifetimes(traced, at, materialised)
    work = Work(
        runs=tuple(runs[op.region] for op in program.ops),
        flops=tuple(
            rule.flops_per_point * prod(rule.sizes, start=1.0) for rule in rules
        ),
        materialised=materialised,
        batched=tuple(any(c in batch for c in dims) for dims in classes.of_value),
        batched_op=batched_op,
        update=tuple(UPDATE_SCOPE in op.scope for op in program.ops),
        at=at,
        birth=birth,
        death=death,
        over=over,
        gradients=_gradients(program, classes),
        fusions=Fusions(program, rules),
    )
    return replace(work, segments=segments(traced, classes, work))


def _materialised(program: Program, classes: DimClasses) -> tuple[bool, ...]:
    found = [False] * len(program.values)
    for v in (*program.inputs, *(v for v in program.outputs if v >= 0)):
        found[v] = True
    for op, rule in zip(program.ops, classes.rules, strict=True):
        fused = rule.op_kind in _FUSED
        for v in op.outputs:
            found[v] = found[v] or not fused
        for v in op.inputs:
            if v < 0:
                continue
            producer = program.values[v].producer
            far = producer >= 0 and op.index - producer > FUSION_REACH_OPS
            if far or rule.op_kind not in (*_FUSED, "reduce"):
                found[v] = True
    for op, rule in zip(program.ops, classes.rules, strict=True):
        # A broadcast or a constant is made again wherever it is needed.
        if rule.op_kind == "data":
            for v in op.outputs:
                found[v] = False
    return tuple(found)


def _gradients(program: Program, classes: DimClasses) -> frozenset[int]:
    found: set[int] = set()
    for op, rule in zip(reversed(program.ops), reversed(classes.rules), strict=True):
        if op.primitive == "autoshard_annotate" and op.params["role"] == "gradient":
            found.update(op.outputs)
        if (
            found.intersection(op.outputs)
            and rule.op_kind in ("elementwise", "move", "link")
            and op.params.get("kind") != "slice"
        ):
            found.update(v for v in op.inputs if v >= 0)
    return frozenset(found)
