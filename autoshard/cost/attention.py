"""Where a program attends over a sequence that several devices share.

Found by structure: a product of attention has a dim of queries and another one of keys,
both of a class that a rule shards over `context`. One of its operands or its result has
both (scores, or their gradient), the others one each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from autoshard.ir.build import is_rematted
from autoshard.ir.mesh import AXES
from autoshard.ir.program import LINK, Op
from autoshard.plan.sharded import RESIDUAL, Dims, Reshard, ShardedProgram

CONTEXT = frozenset(["context"])

_SAME = frozenset(
    {LINK, "convert_element_type", "copy", "transpose", "reshape", "autoshard_annotate"}
)


@dataclass(frozen=True, slots=True)
class Side:
    """A value with a dim of queries or a dim of keys, at a product of attention.

    Attributes:
        value: The value.
        root: What it was before it was turned, cast or kept for later.
        name: Of the operand or result.
        spec: Mesh axes that divide it, dim by dim, `context` among them.
        first: The first op of the pass that takes or makes it.
        last: The last one; of another pass, if that takes it too and nothing lies
            between them.
        known: Whether an earlier pass of the same attention took it too.
    """

    value: int
    root: int
    name: str
    spec: Dims
    first: int
    last: int
    known: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of one attention: forward, computed again, or backward.

    Attributes:
        op: Its first product.
        ops: All ops on scores.
        moves: Product and slot of all that has a dim of keys alone.
        queries: What products take along queries: queries, gradients of the result.
        keys: What they take along keys: keys and values.
        mixed: What they make along queries: the result, gradients of queries.
        sums: What they make along keys: gradients of keys and values.
        heads: Size of the head dims that queries and keys have in common.
        head_axes: Mesh axes that divide them.
    """

    op: int
    ops: frozenset[int]
    moves: frozenset[tuple[int, str]]
    queries: tuple[Side, ...]
    keys: tuple[Side, ...]
    mixed: tuple[Side, ...]
    sums: tuple[Side, ...]
    heads: int
    head_axes: tuple[str, ...]

    @property
    def exchanged(self) -> tuple[Side, ...]:
        """What all-to-alls move: all that is new, and all results."""
        taken = (s for s in (*self.queries, *self.keys) if not s.known)
        return (*taken, *self.mixed, *self.sums)


@dataclass(frozen=True, slots=True)
class _Product:
    """A product of attention: of its operands and its result one is scores.

    Attributes:
        op: Its index.
        query: Slot along queries: 0 or 1 of the operands, 2 for the result.
        key: Slot along keys.
    """

    op: int
    query: int
    key: int

    @property
    def scores(self) -> int:
        """Slot of the scores, or of their gradient."""
        return 3 - self.query - self.key


def passes_of(sharded: ShardedProgram) -> tuple[Pass, ...]:
    """The passes of attention over a sequence that is sharded over `context`.

    None where scores themselves are moved over it.
    """
    return _Finder(sharded).found()


def in_parts(sharded: ShardedProgram, passes: tuple[Pass, ...]) -> ShardedProgram:
    """The program without moves of keys, values and their gradients over `context`.

    What is left of such a move is what it does along other axes.
    """
    there = frozenset().union(*(one.moves for one in passes))
    found = []
    for move in sharded.reshards:
        if (move.op, move.slot) in there:
            source, target = move.source, move.target
            if "context" in move.unreduced:
                source = _with_place_of(target, source)
            else:
                target = _with_place_of(source, target)
            unreduced = tuple(a for a in move.unreduced if a != "context")
            if source == target and not unreduced:
                continue
            move = replace(move, source=source, unreduced=unreduced, target=target)
        found.append(move)
    return replace(sharded, reshards=tuple(found))


def _with_place_of(like: Dims, dims: Dims) -> Dims:
    """A spec with `context` where it is in another one."""
    found = []
    for there, here in zip(like, dims, strict=True):
        axes = {a for a in here if a != "context"} | CONTEXT.intersection(there)
        same = [dim for dim in (there, here) if set(dim) == axes]
        found.append((*same, tuple(sorted(axes, key=AXES.index)))[0])
    return tuple(found)


class _Finder:
    """Finds the passes of attention in a program with a layout."""

    def __init__(self, sharded: ShardedProgram) -> None:
        self.sharded = sharded
        self.program = sharded.traced.program
        self.rules = sharded.classes.rules
        names = sharded.classes.names
        wanted = {
            logical
            for logical, axes in sharded.layout.rules
            if "context" in axes and not logical.endswith(RESIDUAL)
        }
        self.seq = {c for c, own in names.items() if wanted.intersection(own)}
        self.batch = {c for c, own in names.items() if "batch" in own}
        self.up: list[int] = []

    def found(self) -> tuple[Pass, ...]:
        """All passes, in order; none where scores themselves are moved."""
        products: dict[int, _Product] = {}
        part: dict[int, int] = {}
        of_op: dict[int, int] = {}
        for op in self.program.ops:
            pair = self._pair(op)
            if pair is None:
                continue
            product = self._product(op, *pair)
            if product is not None:
                products[op.index] = product
            makes = product is not None and product.scores == 2
            parts = {self._root(part[v]) for v in op.inputs if v in part}
            if not parts and not makes:
                continue  # a mask
            if not parts:
                parts = {len(self.up)}
                self.up.append(len(self.up))
            for other in parts:
                self.up[other] = min(parts)
            of_op[op.index] = min(parts)
            if product is None or makes:
                part.update(dict.fromkeys(op.outputs, min(parts)))
        groups: dict[tuple[int, int, bool], list[int]] = {}
        for index, own in of_op.items():
            op = self.program.ops[index]
            key = (self._root(own), op.region, is_rematted(op))
            groups.setdefault(key, []).append(index)
        if self._scores_move(products):
            return ()
        taken: dict[int, set[int]] = {}
        passes = []
        for (own, _, _), ops in groups.items():
            together: list[Pass] = []
            for some in self._split(ops, products):
                inside = [products[i] for i in some if i in products]
                if inside:
                    one = self._pass(some, inside, taken.setdefault(own, set()))
                    together = [*(_kept(before, one) for before in together), one]
            passes += together
        return tuple(passes)

    def _root(self, part: int) -> int:
        while self.up[part] != part:
            part = self.up[part]
        return part

    def _pair(self, op: Op) -> tuple[int, int] | None:
        """The factors of queries and of keys of an op on scores."""
        classes, axes = (
            self.sharded.classes.of_factor[op.index],
            self.sharded.factor_axes[op.index],
        )
        sizes = self.rules[op.index].sizes
        found = [f for f, c in enumerate(classes) if c in self.seq and sizes[f] > 1]
        if len(found) != 2:
            return None
        mine = [f for f in found if "context" in axes[f]]
        if len(mine) != 1:
            return None
        return mine[0], found[found[0] == mine[0]]

    def _product(self, op: Op, query: int, key: int) -> _Product | None:
        rule = self.rules[op.index]
        if rule.op_kind != "matmul" or len(rule.operands) != 2:
            return None
        has = [
            (any(query in dim for dim in dims), any(key in dim for dim in dims))
            for dims in (*rule.operands, rule.results[0])
        ]
        if sorted(has) != [(False, True), (True, False), (True, True)]:
            return None
        return _Product(op.index, has.index((True, False)), has.index((False, True)))

    def _scores_move(self, products: dict[int, _Product]) -> bool:
        """Whether `context` changes its place in scores, or queries move over it."""
        for move in self.sharded.reshards:
            product = products.get(move.op)
            if product is None or _slot(move) == product.key:
                continue
            same = _place(move.source) == _place(move.target)
            if "context" in move.unreduced or not same:
                return True
        return False

    def _split(
        self, ops: list[int], products: dict[int, _Product]
    ) -> Iterator[list[int]]:
        """The forward part of some ops, and the backward part.

        A forward pass ends with the product that mixes values, before any gradient of
        keys or values; a backward pass makes such gradients before those of queries.
        """
        inside = [products[i] for i in ops if i in products]
        mixes = [p.op for p in inside if p.query == 2]
        sums = [p.op for p in inside if p.key == 2]
        if mixes and sums and mixes[0] < sums[0]:
            yield [i for i in ops if i <= mixes[0]]
            yield [i for i in ops if i > mixes[0]]
        else:
            yield ops

    def _pass(self, ops: list[int], products: list[_Product], taken: set[int]) -> Pass:
        sides: dict[str, dict[int, Side]] = {}
        for product in products:
            op, rule = self.program.ops[product.op], self.rules[product.op]
            values = (*op.inputs, op.outputs[0])
            places = (*rule.operands, rule.results[0])
            axes = self.sharded.factor_axes[product.op]
            for slot, taking, making in (
                (product.query, "queries", "mixed"),
                (product.key, "keys", "sums"),
            ):
                found = sides.setdefault(making if slot == 2 else taking, {})
                root = self._origin(values[slot]) if slot < 2 else values[slot]
                old = found.get(root)
                if old is not None:
                    found[root] = replace(old, last=product.op)
                    continue
                spec = [axes[dim[0]] if dim else () for dim in places[slot]]
                if slot == product.key:
                    d = self._key_dim(product)
                    spec[d] = (*spec[d], "context")
                known = root in taken
                ends = product.op, product.op
                name = f"{op.primitive} " + (f"in{slot}" if slot < 2 else "out0")
                found[root] = Side(values[slot], root, name, tuple(spec), *ends, known)
        for kind in ("queries", "keys"):
            taken.update(sides.get(kind, ()))
        heads, head_axes = self._heads(products[0])

        def of(kind: str) -> tuple[Side, ...]:
            return tuple(sides.get(kind, {}).values())

        return Pass(
            op=products[0].op,
            ops=frozenset(ops),
            moves=frozenset(
                (p.op, "out0" if p.key == 2 else f"in{p.key}") for p in products
            ),
            queries=of("queries"),
            keys=of("keys"),
            mixed=of("mixed"),
            sums=of("sums"),
            heads=heads,
            head_axes=head_axes,
        )

    def _key_dim(self, product: _Product) -> int:
        """Which dim of what lies along keys is that of keys."""
        pair = self._pair(self.program.ops[product.op])
        rule = self.rules[product.op]
        assert pair is not None
        dims = (*rule.operands, rule.results[0])[product.key]
        return next(d for d, dim in enumerate(dims) if pair[1] in dim)

    def _origin(self, value: int) -> int:
        """What a value was before it was turned, cast, or kept for later."""
        while True:
            producer = self.program.values[value].producer
            op = self.program.ops[producer] if producer >= 0 else None
            if op is None or op.primitive not in _SAME or op.inputs[0] < 0:
                return value
            value = op.inputs[0]

    def _heads(self, product: _Product) -> tuple[int, tuple[str, ...]]:
        """Size and axes of the dims that both operands and the result share."""
        rule = self.rules[product.op]
        classes = self.sharded.classes.of_factor[product.op]
        places = (*rule.operands, rule.results[0])
        shared = set.intersection(*({f for d in dims for f in d} for dims in places))
        own = sorted(f for f in shared if classes[f] not in self.batch)
        axes = self.sharded.factor_axes[product.op]
        return prod(rule.sizes[f] for f in own), tuple(a for f in own for a in axes[f])


def _kept(before: Pass, one: Pass) -> Pass:
    """A pass whose operands are kept for a later one that takes them too."""
    last = {side.root: side.last for side in (*one.queries, *one.keys)}

    def of(sides: tuple[Side, ...]) -> tuple[Side, ...]:
        return tuple(replace(s, last=last.get(s.root, s.last)) for s in sides)

    return replace(before, queries=of(before.queries), keys=of(before.keys))


def _slot(move: Reshard) -> int:
    return 2 if move.slot.startswith("out") else int(move.slot[2:])


def _place(dims: Dims) -> int | None:
    return next((d for d, dim in enumerate(dims) if "context" in dim), None)
