"""What is known of control flow before it runs: trip counts, the heavier branch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from autoshard.ir import _jaxcompat
from autoshard.ir.values import LINK, Op, Region, Value

_SAME = frozenset({"convert_element_type", "copy", "copy_p", "stop_gradient"})
_FOLDS = {
    "add": lambda a, b: a + b,
    "max": max,
    "min": min,
    "mul": lambda a, b: a * b,
    "sub": lambda a, b: a - b,
}
_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "ne": "ne"}


class Scalars:
    """Reads integer scalars that are the same in every run of a program.

    Args:
        values: The values read so far.
        ops: The ops read so far.
    """

    def __init__(self, values: list[Value], ops: list[Op]) -> None:
        self._values = values
        self._ops = ops
        self._known: dict[int, int] = {}

    def learn(self, value: int, content: Any) -> None:
        """Notes what a value holds, if that is one integer."""
        known = integer(content)
        if known is not None:
            self._known[value] = known

    def of_value(self, value: int) -> int | None:
        """The integer that a value always holds, or None."""
        if value in self._known:
            return self._known[value]
        op = self._producer(value)
        if op is None or self._values[value].shape:
            return None
        if op.primitive in _SAME:
            return self.of_operand(op, 0)
        if op.primitive in _FOLDS:
            a, b = self.of_operand(op, 0), self.of_operand(op, 1)
            return None if a is None or b is None else _FOLDS[op.primitive](a, b)
        return None

    def of_operand(self, op: Op, slot: int) -> int | None:
        """The integer that an operand always holds, or None."""
        if op.inputs[slot] >= 0:
            return self.of_value(op.inputs[slot])
        return integer(op.equation.invars[slot].val)

    def trip_count(
        self,
        predicate: int,
        enters: Sequence[int],
        leaves: Sequence[int],
        starts: Sequence[int | None],
    ) -> int | None:
        """Runs of a loop that counts from one known integer to another.

        Args:
            predicate: The value that says whether to run once more.
            enters: The carried values, as a run begins.
            leaves: The same, as it ends.
            starts: What they hold before the first run, where known.

        Returns:
            The number of runs, or None where it is not known.
        """
        test = self._producer(self._origin(predicate))
        if test is None or test.primitive not in _MIRRORED:
            return None
        sides = [self._origin(v) for v in test.inputs]
        for slot in (0, 1):
            counter, bound = sides[slot], self.of_operand(test, 1 - slot)
            if counter not in enters or bound is None:
                continue
            which = enters.index(counter)
            start, step = starts[which], self._step(leaves[which], counter)
            if start is None or not step:
                return None
            relation = test.primitive if slot == 0 else _MIRRORED[test.primitive]
            return _runs(relation, start, bound, step)
        return None

    def _producer(self, value: int) -> Op | None:
        if value < 0 or self._values[value].producer < 0:
            return None
        op = self._ops[self._values[value].producer]
        return None if op.primitive == LINK else op

    def _origin(self, value: int) -> int:
        op = self._producer(value)
        while op is not None and op.primitive in _SAME and op.inputs[0] >= 0:
            value = op.inputs[0]
            op = self._producer(value)
        return value

    def _step(self, leaves: int, counter: int) -> int | None:
        op = self._producer(self._origin(leaves))
        if op is None or op.primitive not in ("add", "sub"):
            return None
        sides = [self._origin(v) for v in op.inputs]
        if sides[0] == counter:
            step = self.of_operand(op, 1)
            return None if step is None else step if op.primitive == "add" else -step
        if sides[1] == counter and op.primitive == "add":
            return self.of_operand(op, 0)
        return None


def integer(content: Any) -> int | None:
    """The integer that a scalar holds, or None."""
    if getattr(content, "shape", ()) != ():
        return None
    if isinstance(content, bool | np.bool_):
        return None
    if isinstance(content, int | np.integer):
        return int(content)
    if isinstance(content, np.ndarray) and np.issubdtype(content.dtype, np.integer):
        return int(content)
    return None


def _runs(relation: str, start: int, bound: int, step: int) -> int | None:
    """Runs of `i = start; while i <relation> bound: i += step`; None for no end.

    >>> _runs("lt", 0, 7, 2), _runs("ge", 5, 0, -1), _runs("lt", 0, 7, -1)
    (4, 6, None)
    """
    if relation == "ne":
        whole, rest = divmod(bound - start, step)
        return whole if rest == 0 and whole >= 0 else None
    if relation in ("gt", "ge"):
        start, bound, step = -start, -bound, -step
    if relation in ("le", "ge"):
        bound += 1
    if start >= bound:
        return 0
    return math.ceil((bound - start) / step) if step > 0 else None


def weight(
    ops: Sequence[Op], values: Sequence[Value], regions: Sequence[Region], region: int
) -> tuple[float, float]:
    """Floating-point operations and bytes of one run of a region, roughly.

    Good enough to tell the branches of one `cond` apart: products are counted in full,
    every other op once per element of its results.

    Args:
        ops: The ops in the region and in regions inside it.
        values: All values.
        regions: All regions.
        region: The region.
    """
    runs: dict[int, float] = {region: 1.0}

    def runs_of(inner: int) -> float:
        if inner not in runs:
            runs[inner] = regions[inner].trips * runs_of(regions[inner].parent)
        return runs[inner]

    flops = bytes_ = 0.0
    for op in ops:
        if op.primitive == LINK:
            continue
        times = runs_of(op.region)
        elements = sum(math.prod(values[v].shape) for v in op.outputs)
        flops += times * elements * _flops_per_element(op)
        touched = (*op.outputs, *(v for v in op.inputs if v >= 0))
        bytes_ += times * sum(values[v].bytes_ for v in touched)
    return flops, bytes_


def _flops_per_element(op: Op) -> float:
    if op.primitive == "dot_general":
        (contracted, _), _ = op.params["dimension_numbers"]
        return 2.0 * math.prod(op.operand_shapes[0][d] for d in contracted)
    if op.primitive == "conv_general_dilated":
        kernel = op.operand_shapes[1]
        features = kernel[op.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(kernel) / max(features, 1)
    return 1.0


def unknown_trips(eqn: Any, address: str) -> str:
    """The note on a loop whose trip count depends on data."""
    where = _jaxcompat.source_line(eqn) or address
    return f"while at {where} runs as often as its data say; counted once"


def outweighed(eqn: Any, address: str, branch: int, kept: int) -> str:
    """The note on a branch that is not counted."""
    where = _jaxcompat.source_line(eqn) or address
    return (
        f"cond at {where} is counted as branch {kept}, which costs more than {branch}"
    )
