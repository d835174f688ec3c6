"""What is made of state alone, which is made before the batch is worked on.

How state is stored says which of these values must exist, as only what is stored in
another way than it is used is moved. So they are taken to be made first, wherever the
program makes them, and what becomes of the batch does not hang on them: how its ops are
divided and which kernels they become is the same however state is stored. Bounds that
hold for all storage depend on it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autoshard.ir.program import BARRIER, Op
from autoshard.ir.trace import Traced
from autoshard.ir.train_step import UPDATE_SCOPE
from autoshard.rules import FactorRule


@dataclass(frozen=True, slots=True)
class Early:
    """Values that are made first.

    Attributes:
        values: They are made of state and constants alone, and of no update of state.
        ops: The ops that make them.
        leads: Values that a pass goes on with: a product, or a value of the batch, is
            made of them.
        met: By op that makes one of `leads`, the values made first that it reads.
    """

    values: frozenset[int] = frozenset()
    ops: frozenset[int] = frozenset()
    leads: frozenset[int] = frozenset()
    met: dict[int, frozenset[int]] = field(default_factory=dict)

    def of_part(self, ops: Mapping[int, int], values: Mapping[int, int]) -> Early:
        """The same of a part of the program, given the new numbers of what is left."""

        def left(old: Collection[int], new: Mapping[int, int]) -> frozenset[int]:
            return frozenset(new[own] for own in old if own in new)

        met = {ops[o]: left(own, values) for o, own in self.met.items() if o in ops}
        return Early(
            left(self.values, values),
            left(self.ops, ops),
            left(self.leads, values),
            met,
        )


def made_first(
    traced: Traced, rules: Sequence[FactorRule], batched: Sequence[bool]
) -> Early:
    """Finds the values of a program that are made first.

    Args:
        traced: The program.
        rules: Factor rule per op.
        batched: Per value, whether a microbatch holds only a part of it; such values
            are not made first, whatever they are made of.
    """
    program = traced.program
    ops = [op for op in program.ops if UPDATE_SCOPE not in op.scope]
    others = {v for op in program.ops if UPDATE_SCOPE in op.scope for v in op.outputs}
    others.update(v for v, own in enumerate(batched) if own)
    pairs = zip(program.inputs, traced.inputs, strict=True)
    others.update(v for v, info in pairs if info.state == "data")
    count = -1
    while count != len(others):  # what a loop carries goes into its next run
        count = len(others)
        for op in ops:
            for operands, result in _ways(op):
                if not others.isdisjoint(operands):
                    others.add(result)
    leads = {v for v, own in enumerate(batched) if own}
    leads.update(v for op in ops if _multiplies(rules[op.index]) for v in op.inputs)
    count = -1
    while count != len(leads):
        count = len(leads)
        for op in reversed(ops):
            for operands, result in _ways(op):
                if result in leads:
                    leads.update(operands)
    values = frozenset(range(len(program.values))) - others
    leads -= values
    met = {
        op.index: values.intersection(op.inputs)
        for op in ops
        if not leads.isdisjoint(op.outputs)
    }
    return Early(
        values,
        frozenset(op.index for op in ops if values.issuperset(op.outputs)),
        frozenset(leads),
        {op: own for op, own in met.items() if own},
    )


def _multiplies(rule: FactorRule) -> bool:
    plain = rule.op_kind in ("elementwise", "data", "move", "reduce", "link")
    return rule.op_kind == "matmul" or (bool(rule.flops_per_point) and not plain)


def _ways(op: Op) -> Iterator[tuple[Sequence[int], int]]:
    """Results of an op, and the operands of which each is made."""
    if op.primitive == BARRIER:
        yield from (((v,), r) for v, r in zip(op.inputs, op.outputs, strict=True))
    else:
        yield from ((op.inputs, result) for result in op.outputs)
