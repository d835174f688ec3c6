"""What is made of state alone, which is made before the batch is worked on.

How state is stored says which of these values must exist, as only what is stored in
another way than it is used is moved. So they are made first, wherever the program makes
them, and what becomes of the batch does not hang on them: its kernels are the same
however state is stored. Bounds that hold for all storage depend on it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from autoshard.ir.program import BARRIER, Op, Program
from autoshard.ir.train_step import UPDATE_SCOPE


@dataclass(frozen=True, slots=True)
class Early:
    """Values that are made first.

    Attributes:
        values: They are made of state and constants alone, and of no update of state.
        met: By op, those that it reads to make what the batch is made into.
    """

    values: frozenset[int] = frozenset()
    met: dict[int, frozenset[int]] = field(default_factory=dict)

    def __contains__(self, value: int) -> bool:
        return value in self.values


def of_state(program: Program, data: Collection[int], batched: Sequence[bool]) -> Early:
    """Finds the values of a program that are made first.

    Args:
        program: The program.
        data: Its arguments that are no state.
        batched: Per value, whether a microbatch holds only a part of it; such values
            are not made first, whatever they are made of.
    """
    others = {*data, *(v for v in program.inputs if batched[v])}
    for op in program.ops:
        for operands, result in _ways(op):
            late = UPDATE_SCOPE in op.scope or batched[result]
            if late or not others.isdisjoint(operands):
                others.add(result)
    values = frozenset(range(len(program.values))) - others
    leads = {v for v in others if batched[v]}
    count = -1
    while count != len(leads):  # what a loop carries leads on to its next run
        count = len(leads)
        for op in reversed(program.ops):
            for operands, result in _ways(op):
                if result in leads:
                    leads.update(operands)
    met = {
        op.index: values.intersection(op.inputs)
        for op in program.ops
        if not leads.isdisjoint(op.outputs)
    }
    return Early(values, {op: own for op, own in met.items() if own})


def _ways(op: Op) -> Iterator[tuple[Sequence[int], int]]:
    """Results of an op, and the operands of which each is made."""
    if op.primitive == BARRIER:
        yield from (((v,), r) for v, r in zip(op.inputs, op.outputs, strict=True))
    else:
        yield from ((op.inputs, result) for result in op.outputs)
