"""Which values of a program kernels must write, and the kernels that this makes.

What collectives move must exist in memory. That differs between layouts, and between
meshes of one layout, where some axes have one device; all else does not. So there are
few different sets of kernels, and each is found once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from autoshard.cost.fusion import SAME, Kernel, apart, is_optional, kernels
from autoshard.ir.program import LINK, Program
from autoshard.plan.early import Early
from autoshard.rules import FactorRule


class Fusions:
    """The kernels of one program, whatever is moved.

    Args:
        program: The program.
        rules: Factor rule per op.
        crossing: Values that go from copy to copy of a block, as what a loop carries.
        early: Values that are made first.
    """

    def __init__(
        self,
        program: Program,
        rules: Sequence[FactorRule],
        crossing: Collection[int],
        early: Early,
    ) -> None:
        self._program, self._rules, self._early = program, rules, early
        self._always = {v for v in program.outputs if v >= 0} | {*crossing}
        self._same = [op for op in reversed(program.ops) if op.primitive in SAME]
        for op in program.ops:
            linked = op.primitive == LINK and op.params["kind"] != "slice"
            self._always.update(
                v
                for v in op.inputs
                if v >= 0 and (linked or program.values[v].region != op.region)
            )
        pairs = zip(program.ops, rules, strict=True)
        optional = (op.outputs for op, rule in pairs if is_optional(op, rule))
        self._optional = {v for results in optional for v in results}
        self._parts = [
            (ops, self._optional.intersection(v for op in ops for v in op.outputs))
            for ops in apart(program, rules)
        ]
        self._needed: dict[frozenset[int], frozenset[int]] = {}
        self._found: dict[tuple[int, frozenset[int]], tuple[Kernel, ...]] = {}
        self._one: dict[object, Kernel] = {}

    def kernels(self, moved: frozenset[int]) -> tuple[Kernel, ...]:
        """The kernels. One that is the same for other values is the same object.

        Args:
            moved: Values that collectives move.
        """
        needed = self._needed.get(moved)
        if needed is None:
            needed = self._needed[moved] = self._must_exist(moved)
        each = (self._of_part(k, needed) for k in range(len(self._parts)))
        return tuple(kernel for found in each for kernel in found)

    def _of_part(self, k: int, needed: frozenset[int]) -> tuple[Kernel, ...]:
        ops, values = self._parts[k]
        key = k, needed & values
        if key not in self._found:
            self._found[key] = tuple(
                self._one.setdefault(_content(kernel), kernel)
                for kernel in kernels(
                    self._program, self._rules, key[1], ops, self._early
                )
            )
        return self._found[key]

    def _must_exist(self, moved: frozenset[int]) -> frozenset[int]:
        found = self._always | moved
        for op in self._same:
            for v, result in zip(op.inputs, op.outputs, strict=True):
                if result in found:
                    found.add(v)
        return frozenset(found & self._optional)


def _content(kernel: Kernel) -> object:
    return (
        (kernel.op, kernel.space, kernel.kind),
        (tuple(kernel.reads.items()), tuple(kernel.writes)),
        (kernel.ops, kernel.reduces, kernel.wide_bytes),
    )
