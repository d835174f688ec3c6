"""Moves of values between specs: the collectives that carry them out, each once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autoshard.cost.work import Work
from autoshard.ir.build import is_rematted
from autoshard.ir.mesh import AXES
from autoshard.ir.program import Op, Program
from autoshard.plan.sharded import OUTPUT, Dims, Reshard, ShardedProgram


def axes_of(dims: Dims) -> frozenset[str]:
    """All axes of a spec."""
    return frozenset(a for dim in dims for a in dim)


@dataclass(frozen=True, slots=True)
class Step:
    """One collective of a reshard.

    Attributes:
        kind: As in `plan.schema.Collective`.
        axes: Mesh axes it runs over.
        large: Axes that shard its larger side, which the volume is counted from.
    """

    kind: str
    axes: tuple[str, ...]
    large: frozenset[str]


def steps_of(reshard: Reshard) -> list[Step]:
    """The collectives that carry out a reshard, in order.

    Partial sums are scattered over the axes that the target shards, then summed over
    the others; an axis that changes dims is exchanged; those that go are gathered, dim
    by dim.
    """
    source = {a: d for d, dim in enumerate(reshard.source) for a in dim}
    target = {a: d for d, dim in enumerate(reshard.target) for a in dim}
    steps: list[Step] = []
    now = frozenset(source)
    scatter = tuple(a for a in AXES if a in reshard.unreduced and a in target)
    reduce = tuple(a for a in AXES if a in reshard.unreduced and a not in target)
    if reshard.at_once and reduce:
        scatter, reduce = (), tuple(a for a in AXES if a in reshard.unreduced)
    if scatter:
        steps.append(Step("reduce_scatter", scatter, now))
        now |= set(scatter)
    if reduce:
        steps.append(Step("all_reduce", reduce, now))
    moved = tuple(
        a for a in AXES if a in source and target.get(a, -1) not in (-1, source[a])
    )
    if moved:
        steps.append(Step("all_to_all", moved, now))
    sliced = tuple(a for a in AXES if a in target and a not in now)
    if sliced:
        steps.append(Step("slice", sliced, now))
        now |= set(sliced)
    for d in range(len(reshard.source)):
        # XLA's partitioner gathers one dim after the other.
        gathered = tuple(a for a in AXES if source.get(a) == d and a not in target)
        if gathered:
            now -= set(gathered)
            steps.append(Step("all_gather", gathered, now))
    return steps


def places_of(source: Dims, target: Dims) -> frozenset[str]:
    """The axes that shard other dims in the one spec than in the other, or none."""
    before = {(a, d) for d, dim in enumerate(source) for a in dim}
    after = {(a, d) for d, dim in enumerate(target) for a in dim}
    return frozenset(a for a, _ in before ^ after)


def key_of(
    sharded: ShardedProgram, reshard: Reshard, seen: Callable[[Dims], Dims] = tuple
) -> tuple[Any, ...]:
    """What makes two moves one: value, from and to where, and in which loop body.

    Args:
        sharded: The program.
        reshard: The move.
        seen: What of the specs of values is looked at.
    """
    return (
        *_origin(sharded, reshard, seen),
        reshard.unreduced,
        *_body(sharded, reshard),
    )


def _body(sharded: ShardedProgram, reshard: Reshard) -> tuple[int, bool]:
    """The loop body of a move.

    Rematerialisation keeps what the backward pass gathers apart from the forward's.
    """
    if reshard.op == OUTPUT:
        return 0, False
    op = sharded.traced.program.ops[reshard.op]
    return op.region, is_rematted(op)


def _turned(program: Program, value: int) -> Op | None:
    """The op that makes a value by turning another one."""
    producer = program.values[value].producer
    op = program.ops[producer] if producer >= 0 else None
    return op if op and op.primitive in ("rev", "transpose") else None


def _origin(
    sharded: ShardedProgram, reshard: Reshard, seen: Callable[[Dims], Dims]
) -> tuple[int, Dims, Dims]:
    """What is moved, from and to where, seen through transposes and reversals.

    A transposed weight is the weight: it is gathered once for both.
    """
    program = sharded.traced.program
    value, source, target = reshard.value, reshard.source, reshard.target
    while not reshard.unreduced and (op := _turned(program, value)) is not None:
        order = op.params.get("permutation", range(len(source)))
        back = sorted(range(len(source)), key=lambda d: order[d])
        was = tuple(source[d] for d in back)
        if seen(sharded.specs[op.inputs[0]]) != was:
            break
        value, source = op.inputs[0], was
        target = tuple(target[d] for d in back)
    return value, source, target


def roots_of(sharded: ShardedProgram, moves: Sequence[Reshard]) -> list[object]:
    """What moves must have in common to be one on any mesh, per move."""
    program = sharded.traced.program
    found: list[object] = []
    for move in moves:
        value = move.value
        while (op := _turned(program, value)) is not None:
            value = op.inputs[0]
        found.append((value, *_body(sharded, move)))
    return found


def unique_moves(sharded: ShardedProgram) -> Sequence[Reshard]:
    """Reshards with each value moved once per loop body, however many ops need it.

    Where parts are rematerialised, once more in the backward pass.
    """
    found: dict[tuple[Any, ...], Reshard] = {}
    for reshard in sharded.reshards:
        found.setdefault(key_of(sharded, reshard), reshard)
    return tuple(found.values())


def moves_of_state(
    work: Work, moves: Sequence[Reshard]
) -> tuple[frozenset[int], frozenset[int]]:
    """Indices of moves that gather parameters, and of those that sum gradients."""
    ahead, after = set(), set()
    for index, move in enumerate(moves):
        if move.unreduced and move.value in work.gradients:
            after.add(index)
        elif not move.unreduced and move.value in work.params:
            ahead.add(index)
    return frozenset(ahead), frozenset(after)
