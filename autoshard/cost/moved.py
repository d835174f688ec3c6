"""What a program with a layout sends between devices: collectives, and their time.

Moves of values between specs come first; then exchanges, which a program asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from autoshard.cost.collectives import Meshes, Vector
from autoshard.cost.local import LocalBytes
from autoshard.cost.moves import Step, axes_of, moves_of_state, steps_of, unique_moves
from autoshard.cost.stages import PLACES, Table
from autoshard.cost.work import Work
from autoshard.plan.sharded import OUTPUT, Exchange, Reshard, ShardedProgram

AHEAD, AFTER, BETWEEN = range(3)
"""When collectives run: gathers of parameters, sums of gradients, and all others."""


class Moved:
    """Prices what a program sends, for many meshes at once.

    Args:
        sharded: The program.
        work: Its facts, from `analyse`.
        local_bytes: Of its values.

    Attributes:
        moves: Moves between specs, each once.
        prefetched: Of these, by index, gathers of parameters.
        trailing: Of these, by index, sums of gradients.
    """

    def __init__(
        self, sharded: ShardedProgram, work: Work, local_bytes: LocalBytes
    ) -> None:
        self.sharded = sharded
        self.program = sharded.traced.program
        self.work = work
        self.local_bytes = local_bytes
        self.moves = unique_moves(sharded)
        self.prefetched, self.trailing = moves_of_state(work, self.moves)

    def time_s(self, meshes: Meshes, microbatches: Vector) -> Table:
        """Seconds in collectives, hidden or not, but for what attention sends.

        Returns:
            Those of `AHEAD`, `AFTER` and `BETWEEN`, by place,
            float64[3, place, candidate].
        """
        sums = np.zeros((3, PLACES, len(meshes)))
        for when, place, _, _, time, _, _ in self.sent(meshes, microbatches):
            sums[when, place] += time
        return sums

    def sent(
        self, meshes: Meshes, cuts: Vector
    ) -> Iterator[tuple[int, int, str, Sequence[str], Vector, Vector, Vector]]:
        """`(when, place, kind, axes, seconds of a step, bytes of a run, runs)`."""
        for index, count, when, place in self._moves_apart:
            for step, time, size, runs in self.collective(index, meshes, cuts):
                yield (
                    when,
                    place,
                    step.kind,
                    step.axes,
                    count * time,
                    size,
                    count * runs,
                )
        of_op = self.work.segments.of_op
        for exchange in self.sharded.exchanges:
            time, size, runs = self.exchange(exchange, meshes, cuts)
            place = of_op[exchange.op]
            yield BETWEEN, place, exchange.kind, exchange.axes, time, size, runs

    @cached_property
    def _moves_apart(self) -> list[tuple[int, int, int, int]]:
        """`(one move, how many take what it takes, when, place)`.

        Most are like others: weights of one shape, and the two passes over each.
        """
        of_op, of_value = self.work.segments.of_op, self.work.segments.of_value
        first: dict[object, int] = {}
        counts: Counter[int] = Counter()
        found = []
        for index, move in enumerate(self.moves):
            ahead, after = index in self.prefetched, index in self.trailing
            when = AHEAD if ahead else AFTER if after else BETWEEN
            place = of_value[move.value] if move.op == OUTPUT else of_op[move.op]
            steps, apart, rest = self._steps[index]
            # All that `collective` takes of a move.
            like = (
                when,
                place,
                tuple(steps),
                tuple(apart),
                rest,
                self._runs(move),
                self.local_bytes.like(move.value),
            )
            if like not in first:
                first[like] = index
                found.append((index, when, place))
            counts[first[like]] += 1
        return [(index, counts[index], when, place) for index, when, place in found]

    def _runs(self, move: Reshard) -> tuple[int, bool]:
        """How often it runs, and whether in every microbatch."""
        if move.op == OUTPUT:
            return self.work.alike[move.value], False
        return self.work.runs[move.op], not self.work.update[move.op]

    def collective(
        self, index: int, meshes: Meshes, cuts: Vector
    ) -> list[tuple[Step, Vector, Vector, Vector]]:
        """`(step, seconds per step of training, bytes of one run, runs)` of a move."""
        reshard, (steps, apart, rest) = self.moves[index], self._steps[index]
        often, each_time = self._runs(reshard)
        runs = np.full(len(meshes), float(often))
        if each_time:
            runs = runs * cuts
        several = [(step, runs) for step in steps]
        if apart:
            summed = runs * (meshes.product(rest) > 1)
            several = [(step, summed) for step in steps]
            several += [(step, runs - summed) for step in apart]
        found = []
        for step, runs in several:
            size = self.local_bytes(reshard.value, step.large, meshes, cuts)
            time = runs * meshes.time_s(step.kind, frozenset(step.axes), size)
            found.append((step, time, size, runs))
        return found

    @cached_property
    def _steps(self) -> list[tuple[list[Step], list[Step], frozenset[str]]]:
        """Per move its steps; and those where there is nothing left to be summed.

        That is where some axes have one device.
        """
        found = []
        for move in self.moves:
            rest = frozenset(move.unreduced) - axes_of(move.target)
            at_once = move.at_once and rest
            apart = steps_of(replace(move, at_once=False)) if at_once else []
            found.append((steps_of(move), apart, rest))
        return found

    def exchange(
        self, exchange: Exchange, meshes: Meshes, cuts: Vector
    ) -> tuple[Vector, Vector, Vector]:
        """`(seconds per step of training, bytes of one run, runs)` of an exchange."""
        op = self.program.ops[exchange.op]
        runs = np.ones(len(meshes)) * self.work.runs[op.index]
        if not self.work.update[op.index]:
            runs = runs * cuts
        size = self.local_bytes(exchange.value, exchange.held, meshes, cuts)
        axes = frozenset(exchange.axes)
        if exchange.rows:
            local_rows = np.ceil(exchange.dim_size / meshes.product(axes))
            size = size * exchange.rows / local_rows
        return runs * meshes.time_s(exchange.kind, axes, size), size, runs
