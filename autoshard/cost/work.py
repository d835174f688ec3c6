"""What a program's ops do, whatever the mesh: FLOPs, bytes, and what is materialised.

The compiler fuses point-by-point ops, so most of their values never reach memory. A
value is taken to be materialised when it is an argument or a result, when a product, a
lookup, a reduction or a loop makes or takes it, or when it is used much later (a
residual kept for the backward pass).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from autoshard.cost.schedule import lifetimes, positions
from autoshard.cost.segments import UNCUT, Segments, segments
from autoshard.cost.written import Fusions
from autoshard.ir.fold import Folded, unfolded
from autoshard.ir.program import BARRIER, Program
from autoshard.ir.trace import Traced
from autoshard.ir.train_step import UPDATE_SCOPE
from autoshard.plan.sharded import DimClasses

FUSION_REACH_OPS = 64
"""A use further away than this many ops is not fused with the producer."""

_FUSED = ("elementwise", "data", "move")

_SAME_VALUE = (
    "link",
    "convert_element_type",
    "copy",
    "transpose",
    "autoshard_annotate",
    "split",
)
"""Ops whose results are parameters, or parts of them, where the operand is."""


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
        params: Values that are parameters, or parts of them, in another dtype or
            transposed; each with the argument that it is of.
        gradients: Values that hold gradients.
        gradient_leaves: The gradients of the parameters.
        fusions: The kernels that its ops become.
        segments: Where its blocks are, between which stages can be cut.
        alike_ops: Per op, for how many ops of the whole program it stands; `runs` has
            it as a factor.
        alike: Per value, for how many values it stands.
        amid: Positions at which memory need not be looked at: the same program before
            or after them has as much in use.
        inner: Where all but one of the many that a value stands for are born or die
            instead, by the position at which the last one does.
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
    params: dict[int, int]
    gradients: frozenset[int]
    gradient_leaves: tuple[int, ...]
    alike_ops: tuple[int, ...]
    alike: tuple[int, ...]
    amid: frozenset[int]
    inner: dict[int, int]
    fusions: Fusions
    segments: Segments = UNCUT


def analyse(traced: Traced, classes: DimClasses, folded: Folded | None = None) -> Work:
    """Reads the facts of a traced program.

    Args:
        traced: The program.
        classes: Its dim classes.
        folded: How it came of a deeper one, if it did; then the facts are such that
            its costs are those of the deeper one.
    """
    program = traced.program
    folded = folded or unfolded(traced)
    rules = classes.rules
    batch = {c for c, names in classes.names.items() if "batch" in names}
    runs = [program.runs(r) for r in range(len(program.regions))]
    batched_op = tuple(
        any(c in batch for c in factor_classes) for factor_classes in classes.of_factor
    )
    at = positions(program)
    in_memory = materialised(program, classes, folded)
    birth, death, over = lifetimes(traced, at, in_memory)
    work = Work(
        runs=tuple(
            runs[op.region] * times
            for op, times in zip(program.ops, folded.alike_ops, strict=True)
        ),
        flops=tuple(
            rule.flops_per_point * prod(rule.sizes, start=1.0) for rule in rules
        ),
        materialised=in_memory,
        batched=classes.batched,
        batched_op=batched_op,
        update=tuple(UPDATE_SCOPE in op.scope for op in program.ops),
        at=at,
        birth=birth,
        death=death,
        over=over,
        params=_params(traced),
        gradients=_gradients(program, classes),
        gradient_leaves=tuple(_gradient_leaves(program)),
        fusions=Fusions(program, rules, traced.blocks.crossing, classes.early),
        alike_ops=folded.alike_ops,
        alike=folded.alike,
        amid=frozenset(at[op] for op in folded.amid),
        inner={at[op]: at[to] for op, to in folded.inner.items()},
    )
    return replace(work, segments=segments(traced, classes, work, folded))


def materialised(
    program: Program, classes: DimClasses, folded: Folded
) -> tuple[bool, ...]:
    """Whether each value exists in memory; see the module."""
    found, whole = [False] * len(program.values), folded.full.program
    for v in (*program.inputs, *(v for v in program.outputs if v >= 0)):
        found[v] = True
    for op, rule in zip(program.ops, classes.rules, strict=True):
        fused = rule.op_kind in _FUSED
        for v in op.outputs:
            found[v] = found[v] or not fused
        first = whole.ops[folded.ops[op.index]]
        for v, was in zip(op.inputs, first.inputs, strict=True):
            if v < 0:
                continue
            producer = whole.values[was].producer
            far = producer >= 0 and first.index - producer > FUSION_REACH_OPS
            if far or rule.op_kind not in (*_FUSED, "reduce"):
                found[v] = True
    for op, rule in zip(program.ops, classes.rules, strict=True):
        # A broadcast or a constant is made again wherever it is needed.
        if rule.op_kind == "data":
            for v in op.outputs:
                found[v] = False
    return tuple(found)


def _params(traced: Traced) -> dict[int, int]:
    program = traced.program
    found = {
        value: value
        for value, info in zip(program.inputs, traced.inputs, strict=True)
        if info.state == "params"
    }
    for op in program.ops:
        if op.primitive == BARRIER:  # its results are its operands
            pairs = zip(op.inputs, op.outputs, strict=True)
            found.update((result, found[v]) for v, result in pairs if v in found)
            continue
        single = [v for v in op.inputs if v >= 0]
        if len(single) == 1 and single[0] in found and op.primitive in _SAME_VALUE:
            found.update(dict.fromkeys(op.outputs, found[single[0]]))
    return found


def _gradients(program: Program, classes: DimClasses) -> frozenset[int]:
    found = set(_gradient_leaves(program))
    for op, rule in zip(reversed(program.ops), reversed(classes.rules), strict=True):
        if (
            found.intersection(op.outputs)
            and rule.op_kind in ("elementwise", "move", "link")
            and op.params.get("kind") != "slice"
        ):
            found.update(v for v in op.inputs if v >= 0)
    return frozenset(found)


def _gradient_leaves(program: Program) -> Iterator[int]:
    for op in program.ops:
        if op.primitive == "autoshard_annotate" and op.params["role"] == "gradient":
            yield op.outputs[0]
