"""Which ops of a program become one kernel, and what each kernel reads and writes.

A fusing compiler makes values that are cheap to make again wherever they are needed, so
what goes through memory is not what ops read and write but what kernels do. The rules
are those by which XLA fuses, as its compiled programs show them:

- a product takes cheap point-by-point ops before it into its kernel, those of its shape
  after it, and reductions of these;
- another reduction is a kernel that makes what it reduces as it goes;
- what must exist (results, what a loop keeps or carries, what a collective moves, the
  operands of lookups) is written by a kernel, one for several that read the same and
  have the same shape;
- nothing else is written.

The TPU compiler keeps the result of a product as the product makes it. Where that lies
transposed to the state it updates, the update follows the gradient, and state is copied
to that layout and back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from autoshard.ir.program import BARRIER, Op, Program
from autoshard.ir.train_step import UPDATE_SCOPE
from autoshard.plan.early import Early
from autoshard.rules import FactorRule

_POINTWISE = ("elementwise", "data", "move")
SAME = ("autoshard_annotate", "stop_gradient", "copy", BARRIER)
"""Primitives whose results are their operands."""
_COSTLY = frozenset(
    (
        *("exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc"),
        *("pow", "sin", "cos", "tan", "cbrt"),
    )
)
"""Ops that take many passes of the vector unit, which no kernel repeats for another
(as in XLA's `InstructionFusion::IsExpensive`)."""

Place = tuple[int, int]
"""An operand: op and slot."""


@dataclass(slots=True)
class Kernel:
    """Ops that run as one pass over memory.

    Attributes:
        op: The product or lookup, or the op whose result was the first to be written;
            the kernel runs as often as it does.
        space: The value whose shape the kernel runs over.
        kind: "product", "reduce", "apart" for a lookup or a foreign call, "copy" from
            one layout to another, else "loop".
        reads: Values that are read, each with the operand that it is first read for.
        writes: Values that are written.
        ops: How many ops it is of.
        reduces: Whether it reduces what it makes.
        wide_bytes: Of the widest element it computes with.
    """

    op: int
    space: int
    kind: str
    reads: dict[int, Place] = field(default_factory=dict)
    writes: list[int] = field(default_factory=list)
    ops: int = 1
    reduces: bool = False
    wide_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How to make a value from values in memory.

    Attributes:
        reads: The values in memory.
        ops: How many ops it takes.
        costly: Whether one of them is not to be repeated.
        wide_bytes: Of the widest element on the way.
    """

    reads: dict[int, Place] = field(default_factory=dict)
    ops: int = 0
    costly: bool = False
    wide_bytes: int = 0

    @staticmethod
    def of(parts: Iterable[_Recipe], ops: int, costly: bool, wide: int) -> _Recipe:
        parts = tuple(parts)
        reads: dict[int, Place] = {}
        for part in parts:
            for v, place in part.reads.items():
                reads.setdefault(v, place)
        return _Recipe(
            reads,
            ops + sum(part.ops for part in parts),
            costly or any(part.costly for part in parts),
            max([wide, *(part.wide_bytes for part in parts)]),
        )


def _turns(op: Op) -> bool:
    """Whether an op moves the last dim elsewhere."""
    order = op.params.get("permutation", ())
    return op.primitive == "transpose" and order[-1] != len(order) - 1


def is_optional(op: Op, rule: FactorRule) -> bool:
    """Whether the results of an op are written only if they must exist."""
    kind = rule.op_kind
    if op.primitive in SAME or kind in ("link", "collective", "reduce"):
        return False
    return kind in (*_POINTWISE, "matmul") or bool(rule.flops_per_point)


def apart(program: Program, rules: Sequence[FactorRule]) -> list[list[Op]]:
    """Ops of a program by which may have to do with each other in kernels.

    Those are ops of which one makes what the other reads, and ops that read the same;
    what a loop takes and gives is in memory between them.
    """
    ops = [
        op
        for op, rule in zip(program.ops, rules, strict=True)
        if op.primitive in SAME or rule.op_kind not in ("link", "collective")
    ]
    count = len(ops) + len(program.values)
    uses = [
        (k, len(ops) + v)
        for k, op in enumerate(ops)
        for v in (*op.inputs, *op.outputs)
        if v >= 0
    ]
    ends = np.array(uses, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(uses)), ends), shape=(count, count))
    _, part = connected_components(graph, directed=False)
    found: dict[int, list[Op]] = defaultdict(list)
    for op, own in zip(ops, part[: len(ops)].tolist(), strict=True):
        found[own].append(op)
    return list(found.values())


def kernels(
    program: Program,
    rules: Sequence[FactorRule],
    needed: Collection[int],
    ops: Sequence[Op] | None = None,
    early: Early | None = None,
) -> tuple[Kernel, ...]:
    """The kernels of a program, in an order in which they can run.

    Args:
        program: The program.
        rules: Factor rule per op.
        needed: Values that must exist in memory.
        ops: Only those of some of its ops, as `apart` finds them.
        early: Values that are made before all others, wherever the program makes them;
            none by default.

    >>> import numpy as np
    >>> from autoshard.ir.trace import trace
    >>> from autoshard.propagate import find_classes
    >>> traced = trace(lambda w, x: x @ w + 1, (np.ones((4, 6)), np.ones((8, 4))))
    >>> program, rules = traced.program, find_classes(traced).rules
    >>> [kernel.kind for kernel in kernels(program, rules, program.outputs)]
    ['product']
    """
    fusion = _Fusion(program, rules, needed, early or Early())
    return (*fusion.run(program.ops if ops is None else ops), *fusion.copies())


class _Fusion:
    """One walk over a program."""

    def __init__(
        self,
        program: Program,
        rules: Sequence[FactorRule],
        needed: Collection[int],
        early: Early,
    ) -> None:
        self.program, self.rules, self.needed = program, rules, needed
        self.early = early
        self.found: list[Kernel] = []
        self.recipes: dict[int, _Recipe] = {}
        # Kernel that has a value at hand, and how to make it from what that writes.
        self.home: dict[int, int] = {}
        self.again: dict[int, _Recipe] = {}
        self.reduced: set[int] = set()  # not at hand for a product's own kernel
        self.ended: set[int] = set()  # at hand only when the kernel has ended
        self.turned: set[int] = set()  # made by a product, with other minor dims
        self.closed: set[int] = set()  # to be joined by nothing that comes later
        self.after: list[int] = []  # per kernel, the last one that it waits for
        self.same: dict[int, int] = {}
        # Per value the kernels that read or write it.
        self.touching: dict[int, set[int]] = defaultdict(set)

    def run(self, ops: Iterable[Op]) -> list[Kernel]:
        first: list[Op] = []
        rest: list[Op] = []
        for op in ops:
            if op.primitive in SAME:
                for v, result in zip(op.inputs, op.outputs, strict=True):
                    self.same[result] = self.same.get(v, v)
            elif self.rules[op.index].op_kind not in ("link", "collective"):
                (first if op.index in self.early.ops else rest).append(op)
        self._visit(first)
        for op in rest:
            self._settle(op)
        self._visit(rest)
        return self.found

    def _settle(self, op: Op) -> None:
        """Writes early values that no kernel of a later op makes for itself.

        What is costly is not repeated for each element of the batch that meets it.
        """
        kind = self.rules[op.index].op_kind
        made = kind in _POINTWISE or kind == "reduce"
        met = self.early.met.get(op.index, ()) if made else op.inputs
        apart = not (made or is_optional(op, self.rules[op.index]))
        for v in sorted({self.same.get(v, v) for v in met}):
            recipe = self.recipes.get(v)
            if recipe and recipe.reads and (recipe.costly or apart):
                self._write(v)

    def _visit(self, ops: Iterable[Op]) -> None:
        for op in ops:
            rule = self.rules[op.index]
            kind = rule.op_kind
            if kind in _POINTWISE:
                self._pointwise(op)
            elif kind == "reduce":
                self._reduce(op)
            elif kind == "matmul" or rule.flops_per_point:
                self._product(op)
            else:
                self._apart(op)

    def copies(self) -> list[Kernel]:
        """Copies of arguments and results to another layout, on TPUs."""
        program, found = self.program, []
        arguments, results = set(program.inputs), set(program.outputs)
        for kernel in [k for k in self.found if k.kind == "loop"]:
            if not self.turned.intersection(kernel.reads):
                continue
            size = self._numel(kernel.space)
            moved = [v for v in kernel.reads if v in arguments]
            moved += [v for v in kernel.writes if v in results]
            for v in moved:
                if self._numel(v) == size:
                    place = kernel.reads.get(v, (-1, 0))
                    copy = Kernel(kernel.op, v, "copy", {v: place}, [v])
                    found.append(copy)
        return found

    # -- kinds of ops ------------------------------------------------------------

    def _pointwise(self, op: Op) -> None:
        host = self._host(op)
        width = max(self._width(v) for v in (*op.inputs, *op.outputs))
        costly = op.primitive in _COSTLY
        # A literal is broadcast, which is an op of its own.
        literal = any(v < 0 for v in op.inputs)
        spread = literal and self.rules[op.index].op_kind != "data"
        inner = [v for _, v in self._inputs(op) if host and self.home.get(v) == host[0]]
        outer = [
            self._source(v, (op.index, slot))
            for slot, v in self._inputs(op)
            if v not in inner
        ]
        if host is None:
            recipe = _Recipe.of(outer, 1 + spread, costly, width)
            for result in op.outputs:
                self.recipes[result] = recipe
                if result in self.needed and recipe.reads:
                    self._write(result)
            return
        index, _ = host
        parts = [*outer, *(self.again[v] for v in inner)]
        made = _Recipe.of(parts, 1 + spread, costly, width)
        self._join(index, _Recipe.of(outer, 1 + spread, costly, width))
        # Turned twice is as it was.
        turned = bool(self.turned.intersection(inner)) != _turns(op)
        for result in op.outputs:
            self.home[result], self.again[result] = index, made
            self.turned |= {result} if turned else set()
            if result in self.needed:
                self._put(index, result)

    def _reduce(self, op: Op) -> None:
        host = self._host(op)
        if host is not None:
            index, kernel = host
        else:
            parts = [self._source(v, (op.index, slot)) for slot, v in self._inputs(op)]
            width = max(self._width(v) for v in op.inputs)
            recipe = _Recipe.of(parts, 1, costly=False, wide=width)
            if not recipe.reads:  # of constants
                self.recipes.update(dict.fromkeys(op.outputs, recipe))
                return
            # Sums of a whole array are taken by loops that read it anyway.
            whole = all(self._numel(v) == 1 for v in op.outputs)
            kind = "loop" if whole else "reduce"
            index, kernel = self._beside(kind, op, op.inputs[0], recipe)
        kernel.reduces = True
        for result in op.outputs:
            self.home[result] = index
            self.reduced.add(result)
            self.ended.add(result)
            self._put(index, result)

    def _product(self, op: Op) -> None:
        kernel = Kernel(op.index, op.outputs[0], "product")
        for slot, v in self._inputs(op):
            if v in self.recipes and self.recipes[v].costly:
                self._write(v)
            self._read(kernel, self._source(v, (op.index, slot)))
        self._add(kernel)
        for result in op.outputs:
            self.home[result] = len(self.found) - 1
            self.again[result] = _Recipe({result: (-1, 0)})
            if result in self.needed:
                self._put(self.home[result], result)

    def _apart(self, op: Op) -> None:
        kernel = Kernel(op.index, op.outputs[0], "apart")
        for slot, v in self._inputs(op):
            if v in self.recipes:
                self._write(v)
            self._read(kernel, self._source(v, (op.index, slot)))
        self._add(kernel)
        for result in op.outputs:
            self.home[result] = len(self.found) - 1
            self.reduced.add(result)
            self._put(self.home[result], result)

    # -- kernels -----------------------------------------------------------------

    def _host(self, op: Op) -> tuple[int, Kernel] | None:
        """The product in whose kernel an op can run, if any."""
        inputs = [v for _, v in self._inputs(op)]
        # No work on the batch is done where what was made first is.
        apart = () if op.index in self.early.ops else self.early.values
        homes = [self.home[v] for v in inputs if v in self.home and v not in apart]
        index = max((h for h in homes if self.found[h].kind == "product"), default=-1)
        if index < 0 or self._group(self.found[index].op) != self._group(op.index):
            return None
        kernel = self.found[index]
        reduces = self.rules[op.index].op_kind == "reduce"
        shaped = op.inputs[:1] if reduces else op.outputs
        if {self._numel(v) for v in shaped} != {self._numel(kernel.space)}:
            return None
        others = set()
        for v in inputs:
            if self.home.get(v) == index and v in self.reduced:
                return None
            reads = self.recipes[v].reads if v in self.recipes else (v,)
            others |= {self.home[r] for r in reads if r in self.home} - {
                index if v not in self.recipes else -1
            }
        # What waits for this kernel comes too late for it.
        late = {other for other in others if other >= index}
        if any(other == index or self.after[other] >= index for other in late):
            return None
        self.closed |= late
        self.after[index] = max([self.after[index], *late])
        return index, kernel

    def _write(self, v: int) -> None:
        """Gives a value that has a recipe a kernel that writes it."""
        op = self.program.ops[self.program.values[v].producer]
        recipe = self.recipes.pop(v)
        index, _ = self._beside("loop", op, v, recipe)
        self.home[v] = index
        self.reduced.add(v)
        self._put(index, v)

    def _beside(
        self, kind: str, op: Op, space: int, recipe: _Recipe
    ) -> tuple[int, Kernel]:
        """A kernel for a recipe: one of its shape that reads the same, or a new one."""
        latest = max((self._when(v) for v in recipe.reads), default=-1)
        size, group = self._numel(space), self._group(op.index)
        # Only those that share more than a scalar with it, or than what is made first.
        own = UPDATE_SCOPE in op.scope or op.index in self.early.ops
        near = {
            index
            for v in recipe.reads
            if self._numel(v) != 1 and (own or v not in self.early.values)
            for index in self.touching[v]
            if index >= latest
        }
        for index in sorted(near, reverse=True):
            kernel = self.found[index]
            if (
                kernel.kind != kind
                or index in self.closed
                or self._numel(kernel.space) != size
                or self._group(kernel.op) != group
            ):
                continue
            waits = any(
                self.home.get(v) == index and (v in self.ended or kind == "reduce")
                for v in recipe.reads
            )
            if waits:
                continue
            kernel.ops += recipe.ops
            self._join(index, recipe)
            self.after[index] = max(self.after[index], min(latest, index - 1))
            return index, kernel
        kernel = Kernel(op.index, space, kind, ops=recipe.ops)
        self._read(kernel, recipe)
        self._add(kernel)
        return len(self.found) - 1, kernel

    def _when(self, v: int) -> int:
        """The last kernel that must have run before another may read a value."""
        index = self.home.get(v, -1)
        if index < 0 or self._numel(self.found[index].space) > 1:
            return index
        return self.after[index]  # a scalar's kernel can run as early as it may

    def _add(self, kernel: Kernel) -> None:
        self.after.append(max((self._when(v) for v in kernel.reads), default=-1))
        for v in kernel.reads:
            self.touching[v].add(len(self.found))
        self.found.append(kernel)

    def _join(self, index: int, recipe: _Recipe) -> None:
        """Has a kernel read what a recipe does."""
        self._read(self.found[index], recipe)
        for v in recipe.reads:
            self.touching[v].add(index)

    def _put(self, index: int, v: int) -> None:
        """Has a kernel write a value."""
        self.found[index].writes.append(v)
        self.touching[v].add(index)

    def _read(self, kernel: Kernel, recipe: _Recipe) -> None:
        for v, place in recipe.reads.items():
            if v not in kernel.writes:
                kernel.reads.setdefault(v, place)
        kernel.wide_bytes = max(kernel.wide_bytes, recipe.wide_bytes)

    def _source(self, v: int, place: Place) -> _Recipe:
        """How another kernel comes by a value: read, or made again."""
        if v in self.recipes:
            return self.recipes[v]
        if v not in self.home:
            return _Recipe({v: place})
        writes = self.found[self.home[v]].writes
        if v not in writes:
            again = self.again[v]
            (raw,) = [r for r, p in again.reads.items() if p[0] < 0] or [v]
            if raw != v and not again.costly and self._bytes(raw) < self._bytes(v):
                if raw not in writes:
                    self._put(self.home[v], raw)
                reads = {r: p if p[0] >= 0 else place for r, p in again.reads.items()}
                return _Recipe(reads, again.ops, False, again.wide_bytes)
            self._put(self.home[v], v)
        return _Recipe({v: place})

    # -- values ------------------------------------------------------------------

    def _inputs(self, op: Op) -> list[tuple[int, int]]:
        """`(slot, value)` of operands that are no literals, seen through copies."""
        pairs = enumerate([self.same.get(v, v) for v in op.inputs])
        return [(s, v) for s, v in pairs if v >= 0]

    def _group(self, op: int) -> tuple[int, bool]:
        """Where an op runs: loop body, and forward and backward pass or update."""
        found = self.program.ops[op]
        return found.region, UPDATE_SCOPE in found.scope

    def _numel(self, v: int) -> int:
        value = self.program.values[v]
        return value.bytes_ // max(1, self._width(v))

    def _bytes(self, v: int) -> int:
        return self.program.values[v].bytes_

    def _width(self, v: int) -> int:
        return self.program.values[v].dtype.itemsize if v >= 0 else 0
