"""The ways through all blocks of a program: the forward pass, and the backward one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from autoshard.ir.build import is_transposed
from autoshard.ir.fold import Folded
from autoshard.ir.program import LINK, Program

if TYPE_CHECKING:  # that module reads `segments`, which reads this one
    from autoshard.cost.work import Work

Copies = list[list[int]]
"""The ops of each copy of a block, one copy after the other."""

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot"})

NOTHING_REPEATS = "no block repeats in it"


@dataclass(frozen=True)
class BlockPass:
    """One way through all blocks.

    Attributes:
        blocks: How many they are.
        ops: Those of the blocks.
        first: The first position of these in the order of execution.
        last: The last one.
        copies: Whether every block has ops of its own; else they are a loop.
        sent: Values that pass from block to block.
        entered: Values that the first block takes in place of these.
        copy_of: Op to the number of its copy; empty for a loop.
    """

    blocks: int
    ops: frozenset[int]
    first: int
    last: int
    copies: bool
    sent: tuple[int, ...]
    entered: frozenset[int] = frozenset()
    copy_of: Mapping[int, int] = field(default_factory=dict)

    def is_backward(self, program: Program) -> bool:
        """Whether gradients are made in it."""
        return any(is_transposed(program.ops[i]) for i in self.ops)

    @staticmethod
    def of_loop(
        program: Program, work: Work, top: Sequence[int], loop: int
    ) -> BlockPass:
        """The runs of a loop.

        Args:
            program: The program.
            work: Its facts.
            top: Per region, the outermost one that it lies in.
            loop: The region.
        """
        inside = [op.index for op in program.ops if top[op.region] == loop]
        sent = [
            op.inputs[0]
            for op in program.ops
            if op.primitive == LINK
            and op.params["kind"] == "carry_in"
            and program.values[op.outputs[0]].region == loop
            and op.inputs[0] >= 0
        ]
        trips = program.regions[loop].trips
        return BlockPass._of(work, trips, inside, sent, copies=False)

    @staticmethod
    def of_copies(program: Program, work: Work, copies: Copies) -> BlockPass:
        """Copies of blocks one after the other, two or more."""
        ops, (first, second, *_) = program.ops, copies
        made = {v for i in first for v in ops[i].outputs}
        taken = [
            (ops[before].inputs[slot], v)
            for before, after in zip(first, second, strict=True)
            for slot, v in enumerate(ops[after].inputs)
            if v in made
        ]
        sent = dict.fromkeys(v for _, v in taken)
        inside = [i for own in copies for i in own]
        blocks = sum(work.alike_ops[own[0]] for own in copies)
        found = BlockPass._of(work, blocks, inside, sent, copies=True)
        return replace(
            found,
            entered=frozenset(v for v, _ in taken),
            copy_of={i: k for k, own in enumerate(copies) for i in own},
        )

    @staticmethod
    def _of(
        work: Work,
        blocks: int,
        inside: Iterable[int],
        sent: Iterable[int],
        *,
        copies: bool,
    ) -> BlockPass:
        at = [work.at[i] for i in inside]
        batched = tuple(v for v in sent if work.batched[v])
        ops = frozenset(inside)
        return BlockPass(blocks, ops, min(at), max(at), copies, batched)


def copies_of_blocks(folded: Folded, work: Work) -> tuple[list[Copies], str]:
    """Copies of blocks one after the other: those that multiply matrices.

    In the order of execution: the forward pass, and the backward one if there is.

    Args:
        folded: How the program came of the whole one.
        work: Its facts.

    Returns:
        The copies of each pass; and why there are none, in words, empty if there are.
    """
    found: dict[int, list[Copies]] = {}
    ops = folded.traced.program.ops
    at = {whole: own for own, whole in enumerate(folded.ops)}
    for repeat in folded.full.blocks.repeats:
        if repeat.kind != "unrolled":
            continue
        starts = range(repeat.start, repeat.start + repeat.ops, repeat.period)
        copies = [
            [at[i] for i in range(start, start + repeat.period)]
            for start in starts
            if start in at
        ]
        # Copies within a loop are no blocks of the program.
        apart = not any(ops[i].region for i in copies[0])
        works = any(
            ops[i].primitive in _PRODUCTS and not work.update[i] for i in copies[0]
        )
        if apart and works:
            count = sum(work.alike_ops[own[0]] for own in copies)
            found.setdefault(count, []).append(copies)
    if not found:
        return [], NOTHING_REPEATS
    if len(found) > 1:
        counts = " and ".join(map(str, sorted(found)))
        return [], f"parts of it repeat {counts} times, not all the same number"
    ((count, chains),) = found.items()
    if len(chains) < 1 + bool(work.gradients):
        return [], f"the backward passes of its {count} blocks are not alike"
    return chains, ""
