"""What of a program belongs to its blocks, and what comes before and after them.

A pipeline is cut between blocks. What leads into the first block (the embedding) goes
with the first stage, what follows the last (the output projection and the loss) with
the last stage, and what each block has of state and work with the stage that has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from autoshard.cost.block_passes import (
    NOTHING_REPEATS,
    BlockPass,
    Copies,
    copies_of_blocks,
)
from autoshard.ir.fold import Folded, unfolded
from autoshard.ir.program import LINK, Op, Program
from autoshard.ir.trace import Traced
from autoshard.plan.sharded import DimClasses

if TYPE_CHECKING:  # that module reads this one
    from autoshard.cost.work import Work

BLOCK, EMBED, HEAD, BOTH, ALL = range(5)
"""Where something belongs: to the blocks, each with an equal share; to the first stage;
to the last; to the first and to the last; to every stage in full."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the ops and values of a program belong when it is cut into stages.

    Attributes:
        blocks: How many blocks follow one another; 1 where nothing can be cut.
        of_op: Per op, of the constants above.
        of_value: Per value likewise, for what it takes of memory.
        stashed: Values that the backward pass needs of every microbatch's forward pass.
        sent: Values that pass from block to block.
        why: Why nothing can be cut, in words; empty where it can.
    """

    blocks: int
    of_op: np.ndarray
    of_value: np.ndarray
    stashed: frozenset[int] = frozenset()
    sent: tuple[int, ...] = ()
    why: str = ""


UNCUT = Segments(1, np.zeros(0, int), np.zeros(0, int), why="it was not looked at")


def segments(
    traced: Traced, classes: DimClasses, work: Work, folded: Folded | None = None
) -> Segments:
    """Finds the blocks of a program, and what lies around them.

    Args:
        traced: The program, traced without microbatches.
        classes: Its dim classes.
        work: Its facts.
        folded: How it came of a deeper one, if it did.

    >>> import jax, jax.numpy as jnp
    >>> from autoshard.cost.work import analyse
    >>> from autoshard.ir.trace import trace
    >>> from autoshard.propagate import find_classes
    >>> def fn(ws, x):
    ...     return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0].sum()
    >>> traced = trace(fn, (jnp.ones((6, 4, 4)), jnp.ones((2, 4))))
    >>> analyse(traced, find_classes(traced)).segments.blocks
    6
    """
    return _Finder(traced, classes, work, folded or unfolded(traced)).found()


@dataclass
class _Finder:
    traced: Traced
    classes: DimClasses
    work: Work
    folded: Folded
    program: Program = field(init=False)

    def __post_init__(self) -> None:
        self.program = self.traced.program
        self.top = self._top_regions()
        self.used: dict[int, list[int]] = {}
        for op in self.program.ops:
            for v in op.inputs:
                self.used.setdefault(v, []).append(op.index)

    def found(self) -> Segments:
        chains: list[Copies] = []
        loops, why = self._loops()
        if why == NOTHING_REPEATS:
            chains, why = copies_of_blocks(self.folded, self.work)
        own = self.program, self.work
        passes = [BlockPass.of_loop(*own, self.top, loop) for loop in loops]
        passes += [BlockPass.of_copies(*own, chain) for chain in chains]
        passes.sort(key=lambda one: one.first)
        # An update may go over stacked parameters in a loop of its own.
        passes = [one for one in passes if not self._updates(one)]
        why = why or self._uncuttable(passes)
        if why:
            ops, values = len(self.program.ops), len(self.program.values)
            return Segments(1, np.full(ops, BLOCK), np.full(values, BLOCK), why=why)
        forward, backward = passes[0], passes[-1]
        stacked = self._stacked(loops)
        of_op = self._ops(passes, stacked)
        of_value = self._values(loops, passes, stacked, of_op)
        stashed: frozenset[int] = frozenset()
        if len(passes) > 1:
            stashed = frozenset(self._stashed(forward.last, backward.first))
        return Segments(forward.blocks, of_op, of_value, stashed, forward.sent)

    def _updates(self, one: BlockPass) -> bool:
        """Whether a pass is one over parameters that are updated."""
        linked = (i for i in one.ops if self.program.ops[i].primitive != LINK)
        return all(self.work.update[i] for i in linked)

    def _uncuttable(self, passes: list[BlockPass]) -> str:
        """Why stages cannot be cut from passes; empty if they can."""
        if not passes:
            return NOTHING_REPEATS
        stacks = [one for one in passes if not one.is_backward(self.program)]
        blocks = passes[0].blocks
        if len(stacks) > 1:
            return f"it has {len(stacks)} stacks of {blocks} blocks, not one"
        if passes[0].copies and not passes[0].sent:
            return f"its {blocks} blocks hand nothing on"
        if passes[0].copies and any(len(own) > 1 for own in self._users(passes[0])):
            return f"its {blocks} blocks share parameters"
        return ""

    def _users(self, forward: BlockPass) -> Iterator[set[int]]:
        """For each parameter, the copies of blocks that use it, or it converted."""
        inputs = zip(self.program.inputs, self.traced.inputs, strict=True)
        for value in [v for v, info in inputs if info.state == "params"]:
            found: set[int] = set()
            pending, seen = [value], {value}
            while pending:
                for user in self.used.get(pending.pop(), ()):
                    if user in forward.copy_of:
                        found.add(forward.copy_of[user])
                    elif not (self.work.update[user] or self.work.batched_op[user]):
                        new = set(self.program.ops[user].outputs) - seen
                        pending += new
                        seen |= new
            yield found

    # -- loops -------------------------------------------------------------------

    def _top_regions(self) -> list[int]:
        """Per region the outermost one that it lies in; of the program itself, 0."""
        found: list[int] = []
        for index, region in enumerate(self.program.regions):
            outer = region.parent
            found.append(index if outer <= 0 else found[outer])
        return found

    def _loops(self) -> tuple[list[int], str]:
        """The outermost loops over blocks: forward ones take slices of parameters."""
        program = self.program
        params = {
            v
            for v, info in zip(program.inputs, self.traced.inputs, strict=True)
            if info.state == "params"
        }
        for op in program.ops:
            if op.region == 0 and self._passes(op) and op.inputs[0] in params:
                params.update(op.outputs)
        working = {
            self.top[op.region] for op in program.ops if self.work.flops[op.index] > 0
        }
        sliced = {
            self.top[program.values[op.outputs[0]].region]
            for op in program.ops
            if op.primitive == LINK
            and op.params["kind"] == "slice"
            and op.inputs[0] in params
        }
        sliced = {r for r in sliced if r > 0 and program.regions[r].trips > 1}
        trips = {program.regions[r].trips for r in sliced if r in working}
        if not trips:
            return [], NOTHING_REPEATS
        if len(trips) > 1:
            kinds = " and ".join(map(str, sorted(trips)))
            return [], f"it has loops of {kinds} blocks, and stages are cut from one"
        (count,) = trips
        forward = {r for r in sliced if program.regions[r].trips == count}
        stacked = self._stacked(forward)
        # The backward loop takes what the forward one stacked, if not parameters.
        return sorted(forward | self._over(stacked, count)), ""

    def _over(self, stacked: set[int], trips: int) -> set[int]:
        """Outermost loops of so many trips that run over some dims."""
        return {
            region
            for region, outer, _ in self._links()
            if self.program.regions[region].trips == trips
            and self.classes.of_value[outer][0] in stacked
        }

    def _passes(self, op: Op) -> bool:
        """Whether an op hands on what it takes, in another dtype or layout."""
        kinds = ("convert_element_type", "transpose", "copy", "optimization_barrier")
        return op.primitive in kinds or op.primitive == "autoshard_annotate"

    def _links(self) -> Iterator[tuple[int, int, int]]:
        """Outermost loop, value outside and value in it of what a loop runs over."""
        for op in self.program.ops:
            if op.primitive != LINK or op.params["kind"] not in ("slice", "stack"):
                continue
            inner, outer = op.outputs[0], op.inputs[0]
            if op.params["kind"] == "stack":
                inner, outer = outer, inner
            if inner >= 0 and outer >= 0:
                region = self.program.values[inner].region
                if region > 0 and self.top[region] == region:
                    yield region, outer, inner

    def _stacked(self, loops: Iterable[int]) -> set[int]:
        """Classes of the dims that some loops run over."""
        return {
            self.classes.of_value[outer][0]
            for region, outer, _ in self._links()
            if region in loops
        } - {-1}

    # -- ops ---------------------------------------------------------------------

    def _ops(self, passes: list[BlockPass], stacked: set[int]) -> np.ndarray:
        program, update = self.program, self.work.update
        found = np.full(len(program.ops), -1)
        for op in program.ops:
            if not stacked.isdisjoint(self.classes.of_factor[op.index]):
                found[op.index] = BLOCK
        for one in passes:
            found[sorted(one.ops)] = BLOCK
        if passes[0].copies:
            self._beside_copies(found, passes[0])
        made: dict[int, list[int]] = {}
        for op in program.ops:
            for v in op.outputs:
                made.setdefault(v, []).append(op.index)
        first, last = passes[0].first, max(one.last for one in passes)
        inside = [op.index for op in program.ops if found[op.index] == BLOCK]
        # What the first loop is made from, and what is made from the last one's ends.
        before = self._reached(
            [i for i in inside if self.work.at[i] >= first], made, back=True
        )
        ends = sorted(set().union(*(one.ops for one in passes[1:])))
        after = self._reached(ends, self.used, back=False)
        for op in program.ops:
            if found[op.index] >= 0 or update[op.index]:
                continue
            early = op.index in before and self.work.at[op.index] < first
            late = op.index in after and self.work.at[op.index] > last
            found[op.index] = EMBED if early or late else HEAD
        self._update(found, stacked)
        return found

    def _beside_copies(self, found: np.ndarray, forward: BlockPass) -> None:
        """Places what is made of the weights of one block, or of their gradients."""
        program, work = self.program, self.work
        copy_of = dict(forward.copy_of)
        for op in reversed(program.ops):
            if found[op.index] >= 0 or work.update[op.index]:
                continue
            users = [u for v in op.outputs for u in self.used.get(v, ())]
            of = {
                copy_of.get(u, -1) for u in users if found[u] != BLOCK or u in copy_of
            }
            if len(of) == 1 and -1 not in of and not work.batched_op[op.index]:
                found[op.index] = BLOCK
                copy_of[op.index] = of.pop()
        for op in program.ops:
            producer = program.values[op.inputs[0]].producer if op.inputs else -1
            new = found[op.index] < 0 and not work.update[op.index]
            of_gradient = work.gradients.issuperset(op.outputs) and self._passes(op)
            if new and of_gradient and producer >= 0 and found[producer] == BLOCK:
                found[op.index] = BLOCK

    def _reached(
        self, starts: Iterable[int], by: dict[int, list[int]], *, back: bool
    ) -> set[int]:
        """Ops that are reached from some through the values they take or make."""
        program = self.program
        pending, seen = list(starts), set(starts)
        while pending:
            op = program.ops[pending.pop()]
            for v in op.inputs if back else op.outputs:
                for other in by.get(v, ()):
                    if other not in seen:
                        seen.add(other)
                        pending.append(other)
        return seen

    def _update(self, found: np.ndarray, stacked: set[int]) -> None:
        """Places the update of a parameter where the parameter belongs."""
        program = self.program
        group: dict[int, int] = {}

        def root(v: int) -> int:
            while group.setdefault(v, v) != v:
                group[v] = group[group[v]]
                v = group[v]
            return v

        updates = [op for op in program.ops if self.work.update[op.index]]
        for op in updates:
            ends = [v for v in (*op.inputs, *op.outputs) if self._is_array(v)]
            for v in ends[1:]:
                group[root(v)] = root(ends[0])
        place = dict(self._leaves(found))
        of_group: dict[int, int] = {}
        for v, where in place.items():  # parameters come before gradients
            if v in group:
                of_group.setdefault(root(v), where)
        for op in updates:
            if found[op.index] < 0:
                ends = [v for v in (*op.inputs, *op.outputs) if self._is_array(v)]
                where = of_group.get(root(ends[0]), ALL) if ends else ALL
                found[op.index] = where

    def _is_array(self, v: int) -> bool:
        return v >= 0 and bool(self.program.values[v].shape)

    def _leaves(self, of_op: np.ndarray) -> Iterator[tuple[int, int]]:
        """Parameters that no loop slices, and the gradients that go to their update."""
        program, update = self.program, self.work.update
        uses: dict[int, set[int]] = {}
        follow: dict[int, int] = {}
        for op in program.ops:
            if update[op.index]:
                continue
            if self._passes(op) and op.region == 0:  # the parameter in another dtype
                follow.update(dict.fromkeys(op.outputs, op.inputs[0]))
                continue
            for v in op.inputs:
                uses.setdefault(v, set()).add(int(of_op[op.index]))
        # From the last to the first, since what is converted may be converted again.
        for v in reversed(list(follow)):
            uses.setdefault(follow[v], set()).update(uses.get(v, set()))
        for v, info in zip(program.inputs, self.traced.inputs, strict=True):
            if info.state == "params":
                yield v, _joined(uses.get(v, set()))
        for v in self.work.gradients:
            producer = program.values[v].producer
            if producer >= 0 and not update[producer]:
                yield v, int(of_op[producer])

    # -- values ------------------------------------------------------------------

    def _values(
        self,
        loops: list[int],
        passes: list[BlockPass],
        stacked: set[int],
        of_op: np.ndarray,
    ) -> np.ndarray:
        program, copies = self.program, passes[0].copies
        found = np.full(len(program.values), ALL)
        for value in program.values:
            if self.top[value.region] in loops:
                continue  # of one block at a time
            of_blocks = not stacked.isdisjoint(self.classes.of_value[value.index])
            if of_blocks or (copies and self._of_each(value.index, passes, of_op)):
                found[value.index] = BLOCK
            elif value.producer >= 0 and of_op[value.producer] != BLOCK:
                found[value.index] = of_op[value.producer]
        readers: dict[int, set[int]] = {}
        for op in program.ops:
            for v in op.inputs:
                readers.setdefault(v, set()).add(int(of_op[op.index]))
            if self.work.update[op.index] and of_op[op.index] == BOTH:
                # Two stages have the gradient of what both have.
                of_both = [v for v in op.inputs if found[v] in (EMBED, HEAD)]
                found[of_both] = BOTH
        leaves = dict(self._leaves(of_op))
        for v, info in zip(program.inputs, self.traced.inputs, strict=True):
            if found[v] == BLOCK or info.state in ("data", "other"):
                continue
            if v in leaves:
                found[v] = leaves[v]
            elif program.values[v].shape:
                # Optimizer state is where the update that reads it is.
                found[v] = _joined(readers.get(v, set()) - {ALL})
        return found

    def _of_each(self, v: int, passes: list[BlockPass], of_op: np.ndarray) -> bool:
        """Whether every copy of the blocks has such a value, all at the same time.

        A later pass needs it, or what follows the passes; else it is of one block at a
        time.
        """
        producer = self.program.values[v].producer
        own = [one for one in passes if producer in one.ops or v in one.entered]
        if not own:
            return producer >= 0 and of_op[producer] == BLOCK
        inside = own[0].ops
        return any(
            of_op[user] == BLOCK and user not in inside for user in self.used.get(v, ())
        )

    def _stashed(self, forward_ends: int, backward_begins: int) -> Iterator[int]:
        """Values that are alive from the forward loop to the backward one."""
        work = self.work
        for value in self.program.values:
            born, dies = work.birth[value.index], work.death[value.index]
            alive = 0 <= born <= forward_ends and dies >= backward_begins
            if alive and work.batched[value.index]:
                yield value.index


def _joined(places: set[int]) -> int:
    """Where that is which is used in several places."""
    if len(places) == 1:
        return next(iter(places))
    return BOTH if places == {EMBED, HEAD} else ALL
