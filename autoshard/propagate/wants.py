"""What a layout wants of each value and of each op, apart from all others.

First comes what the user fixed in mesh axes, then the strategy's rules in their order
of priority, then the residual rules for activations in which nothing else takes the
axes. One axis shards one dim of a value, and one factor of an op. Where rules contest
an axis, `autoshard.propagate.claims` says which goes first, and the other has the rest
of its axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from math import gcd

from autoshard.ir.program import Op
from autoshard.ir.trace import Traced
from autoshard.plan.sharded import (
    LAYERS,
    RESIDUAL,
    Conflict,
    DimClasses,
    Dims,
    Layout,
)
from autoshard.propagate.claims import claim_of, claims, contested
from autoshard.rules import FactorRule

Axes = tuple[str, ...]


def rules_of(
    names: Sequence[str], rules: Iterable[tuple[str, Axes]]
) -> tuple[list[tuple[int, Axes, str]], Axes]:
    """The rules for a class of dims, by its logical names.

    Returns:
        `(order, axes, logical axis)` of those that shard it, of which the first
        decides; and the axes of its residual rule, none without one.
    """
    found: list[tuple[int, Axes, str]] = []
    weak: Axes = ()
    for order, (logical, axes) in enumerate(rules):
        base = logical.removesuffix(RESIDUAL)
        if base not in names or not axes:
            continue
        if base != logical:
            weak = axes
        else:
            found.append((order, axes, logical))
    return found, weak


class Wants:
    """The wishes of a layout for one program.

    Attributes:
        strong: `(order, axes)` per class that a rule shards.
        weak: Axes per class that a residual rule shards.
        claims: Per value of which rules contest an axis, which of them goes first.
        activations: Values that are computed from the data inputs.
        manual: Regions in which every device works by itself.
        conflicts: Rules that meet in one class.
        notes: Leaves that could not be stored as asked, in words.
        asked: What `divides` was asked.
    """

    def __init__(self, traced: Traced, classes: DimClasses, layout: Layout) -> None:
        self.traced, self.classes, self.layout = traced, classes, layout
        self.program = traced.program
        self.strong: dict[int, tuple[int, Axes]] = {}
        self.weak: dict[int, Axes] = {}
        self.conflicts: dict[Conflict, None] = dict.fromkeys(classes.fixed.conflicts)
        self.notes: dict[str, None] = {}
        self.asked: set[tuple[int, Axes]] = set()
        self._read_rules()
        self.claims = claims(self.program, classes, self.strong)
        self.activations = self._reached_by_data()
        named = classes.names
        self._embed_like = {c for c, n in named.items() if "embed" in n}
        self._layer_like = {c for c, n in named.items() if LAYERS in n}
        self.manual = self._manual_regions()
        wishes = self._wishes()
        self.wish_of_value = classes.of_value.mapped(wishes)
        self.wish_of_factor = classes.of_factor.mapped(wishes)
        self._value_memo: dict[object, Dims] = {}

    def stored_as(self, layout: Layout) -> Wants:
        """The same wishes for a layout that differs in storage alone."""
        assert layout.rules == self.layout.rules, (layout.rules, self.layout.rules)
        found = copy(self)
        found.layout, found.notes, found.asked = layout, {}, set()
        return found

    def divides(self, size: int, axes: Axes) -> bool:
        """Whether a size divides over axes; while their sizes are not known, it does.

        Every decision that hangs on sizes of axes is asked here.
        """
        if axes:
            self.asked.add((size, axes))
        return size % self.layout.size(axes) == 0

    def _read_rules(self) -> None:
        for cls, names in self.classes.names.items():
            found, weak = rules_of(names, self.layout.rules)
            if weak:
                self.weak[cls] = weak
            if not found:
                continue
            order, axes, kept = found[0]
            self.strong[cls] = (order, axes)
            for _, other, lost in found[1:]:
                if other != axes:
                    self._rules_meet(cls, kept, axes, lost, other)

    def _wishes(self) -> dict[int, int]:
        """A number per class, the same for classes of which the same is wanted.

        All that is decided of a dim depends on it, so the copies of a layer, whose
        dims are in classes of their own, have their decisions in common.
        """
        numbers: dict[object, int] = {(None, None, False, False): 0}
        found = {}
        for cls in {*self.strong, *self.weak, *self._embed_like, *self._layer_like}:
            wish = (
                self.strong.get(cls),
                self.weak.get(cls),
                cls in self._embed_like,
                cls in self._layer_like,
            )
            found[cls] = numbers.setdefault(wish, len(numbers))
        return found

    def _rules_meet(self, cls: int, kept: str, axes: Axes, lost: str, no: Axes) -> None:
        origins = self.classes.origins
        self.conflicts[
            Conflict(
                where=f"dims named {kept} and {lost}, which the program ties",
                kept=f"{kept} = {'+'.join(axes)}",
                kept_origin=origins.get((cls, kept), "the strategy"),
                lost=f"{lost} = {'+'.join(no)}",
                lost_origin=origins.get((cls, lost), "the strategy"),
                moved_bytes=0,
            )
        ] = None

    def _reached_by_data(self) -> frozenset[int]:
        found = {
            value
            for value, info in zip(self.program.inputs, self.traced.inputs, strict=True)
            if info.state == "data"
        }
        for op in self.program.ops:
            if not found.isdisjoint(op.inputs):
                found.update(op.outputs)
        return frozenset(found)

    def _manual_regions(self) -> frozenset[int]:
        found: set[int] = set()
        for index, region in enumerate(self.program.regions):
            if getattr(region, "manual", None) or region.parent in found:
                found.add(index)
        return frozenset(found)

    # -- values ------------------------------------------------------------------

    def _strong_dims(self, value: int, natural: Dims | None) -> list[Axes]:
        """Axes per dim by the rules alone; an axis goes to the first that wants it."""
        shape = self.program.values[value].shape
        fixed = self.classes.fixed.dims.get(value)
        dims: list[Axes] = [()] * len(shape)
        used: set[str] = set()
        if fixed is not None:
            for d, axes in enumerate(fixed):
                dims[d] = axes or ()
                used.update(dims[d])
        wants = []
        for d, cls in enumerate(self.classes.of_value[value]):
            want = self.strong.get(cls)
            open_ = shape[d] > 1 and (fixed is None or fixed[d] is None)
            if want and open_ and used.isdisjoint(want[1]):
                wants.append((0, want[0], d, want[1]))
        met = contested(want[1::2] for want in wants)
        if met:
            first = dict(self.claims.get(value, ()))
            if not first and natural is not None:
                first = {o: 1 for _, o, d, _ in wants if met & set(natural[d])}
            wants = [(-first.get(w[1], 0), *w[1:]) for w in wants]
        wants.sort()
        for *_, d, axes in wants:
            dims[d] = tuple([a for a in axes if a not in used])
            used.update(axes)
        return dims

    def value_dims(self, value: int, natural: Dims | None) -> Dims:
        """The spec of a value that is no state.

        The residual rule holds for activations (values computed from the data) in
        which nothing else takes its axes: always if they have the embed dim, else
        only if the op that makes them makes them so. It shards its dim beyond what a
        rule for all activations shards of it.

        Args:
            value: The value.
            natural: What the op that makes it makes, where that is known.
        """
        record = self.program.values[value]
        active = value in self.activations
        key = (
            self.wish_of_value[value],
            record.shape,
            self.classes.fixed.dims.get(value),
            active,
            natural,
            record.region in self.manual,
            self.claims.get(value),
        )
        found = self._value_memo.get(key)
        if found is None:
            found = self._value_memo[key] = self._value_dims(value, natural)
        return found

    def _value_dims(self, value: int, natural: Dims | None) -> Dims:
        record = self.program.values[value]
        if record.region in self.manual:
            return ((),) * len(record.shape)
        dims = self._strong_dims(value, natural)
        if value not in self.activations or not self.weak:
            return tuple(dims)
        classes = self.classes.of_value[value]
        fixed = self.classes.fixed.dims.get(value)
        residual = any(c in self._embed_like for c in classes)
        for d, cls in enumerate(classes):
            axes = self.weak.get(cls)
            if axes is None or record.shape[d] == 1:
                continue
            if fixed is not None and fixed[d] is not None:
                continue
            if dims[d] != self._strong_axes(cls):
                continue  # another dim has taken them
            if any(set(axes) & set(taken) for taken in dims):
                continue
            together = (*dims[d], *axes)
            if residual or (natural is not None and natural[d] == together):
                dims[d] = together
        return tuple(dims)

    def _strong_axes(self, cls: int) -> Axes:
        return self.strong[cls][1] if cls in self.strong else ()

    def is_residual(self, value: int, spec: Dims) -> bool:
        """Whether some dim is sharded by a residual rule alone."""
        return bool(self.weak) and any(
            cls in self.weak and axes == (*self._strong_axes(cls), *self.weak[cls])
            for axes, cls in zip(spec, self.classes.of_value[value], strict=True)
        )

    def stored_dims(self, value: int, base: Dims, axes: Axes, path: str) -> Dims:
        """Adds storage axes to the dim that shards best, never to a loop's own dim.

        State that the user placed himself stays where he put it, unless he named only
        axes that this mesh does not have.
        """
        given = self.classes.fixed.storage.get(value)
        if given is not None and self.layout.has(given):
            return given
        taken = {a for dim in base for a in dim}
        axes = tuple(
            a for a in axes if a not in taken and self.layout.sizes.get(a, 2) > 1
        )
        shape = self.program.values[value].shape
        if not axes or not shape:
            return base
        classes = self.classes.of_value[value]
        order = sorted(
            (
                d
                for d in range(len(shape))
                if shape[d] > 1 and classes[d] not in self._layer_like
            ),
            key=lambda d: (bool(base[d]), -gcd(shape[d], 1 << 12), -shape[d], d),
        )
        for d in order:
            if self.divides(shape[d], (*base[d], *axes)):
                return tuple(
                    (*dim, *axes) if d == k else dim for k, dim in enumerate(base)
                )
        if self.layout.sizes:
            self.notes[
                f"{path} {shape} is not sharded over {'+'.join(axes)} in memory: no "
                f"dim is divisible by {self.layout.size(axes)}"
            ] = None
        return base

    # -- ops ---------------------------------------------------------------------

    def op_axes(
        self, op: Op, rule: FactorRule, operands: Sequence[tuple[Dims, bool]]
    ) -> Dims:
        """Axes per factor; an axis goes to the first factor that wants it.

        Of two factors of one class (queries and keys) the first is that which more
        operands are sharded along, so that fewer of them move.

        Args:
            op: The op.
            rule: Its rule.
            operands: Spec per operand, and whether it counts: constants and literals
                do not.
        """
        axes: list[Axes] = [()] * len(rule.sizes)
        if op.region in self.manual:
            return tuple(axes)
        used: set[str] = set()
        fixed = self.classes.fixed.factors.get(op.index)
        if fixed is not None:
            axes = list(fixed)
            used = {a for factor in axes for a in factor}
        classes = self.classes.of_factor[op.index]
        wants = []
        for f, cls in enumerate(classes):
            want = self.strong.get(cls)
            if want and not axes[f] and rule.divisible[f] and used.isdisjoint(want[1]):
                having = sum(_having(rule, operands, f, want[1]))
                wants.append((0, want[0], -having, f, want[1]))
        met = contested((want[1], want[-1]) for want in wants)
        if met:
            first = self._first(op, rule, operands, met)
            wants = [(-first.get(w[1], 0), *w[1:]) for w in wants]
        wants.sort()
        for *_, f, want in wants:
            axes[f] = tuple([a for a in want if a not in used])
            used.update(want)
        for f, cls in enumerate(classes) if self.weak else ():
            want = self.weak.get(cls)
            if want is None or not rule.divisible[f] or not used.isdisjoint(want):
                continue
            if axes[f] != self._strong_axes(cls):
                continue  # another factor has taken them, or the user fixed it
            together = (*axes[f], *want)
            if any(_having(rule, operands, f, together)):
                axes[f] = together
                used.update(want)
        return tuple(axes)

    def _first(
        self,
        op: Op,
        rule: FactorRule,
        operands: Sequence[tuple[Dims, bool]],
        met: frozenset[str],
    ) -> dict[int, int]:
        """How much rules, by their order, are to go before others in an op.

        In other ops than products those do that have the axes already.
        """
        classes = self.classes.of_factor[op.index]
        if rule.op_kind == "matmul":
            return dict(claim_of(rule, classes, self.strong))
        found: dict[int, int] = {}
        for (spec, counts), dims in zip(operands, rule.operands, strict=True):
            for axes, dim in zip(spec, dims, strict=True) if counts else ():
                want = self.strong.get(classes[dim[0]]) if dim else None
                if want and not met.isdisjoint(axes):
                    found[want[0]] = found.get(want[0], 0) + 1
        return found


def _having(
    rule: FactorRule, operands: Iterable[tuple[Dims, bool]], factor: int, axes: Axes
) -> Iterator[bool]:
    """For each operand dim that leads a factor, whether these axes shard it."""
    return (
        spec[d] == axes
        for (spec, counts), dims in zip(operands, rule.operands, strict=True)
        if counts
        for d, dim in enumerate(dims)
        if dim and dim[0] == factor
    )
