"""Assigning axes: a spec for every value, the axes of every op, and the reshards.

Ops are visited once, in order of execution. Each value's spec follows from the classes
of its dims and the layout's rules, by priority; each op runs with the axes its factors
have; where the two differ a reshard is recorded, and nowhere else is data moved.

State has two specs (ZeRO). Its storage spec holds along chains of point-by-point ops
(casts, optimizer arithmetic); the first op that needs more gathers it. Gradients take
their storage spec at the op that makes them, so that partial sums are scattered rather
than summed everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd

from autoshard.ir.program import LINK, Op
from autoshard.ir.trace import Traced
from autoshard.plan.sharded import (
    LAYERS,
    OUTPUT,
    RESIDUAL,
    DimClasses,
    Dims,
    Layout,
    Reshard,
    ShardedProgram,
)
from autoshard.propagate.gradients import gradient_targets
from autoshard.propagate.project import factors_from, natural_dims, runs_with
from autoshard.rules import FactorRule


def propagate(traced: Traced, classes: DimClasses, layout: Layout) -> ShardedProgram:
    """Applies a layout to a program.

    Args:
        traced: The program.
        classes: Its classes, from `find_classes`.
        layout: Rules and storage. With `layout.sizes` known, a state leaf that no
            dim of which divides stays as computed, and a note says so.

    Returns:
        The sharded program.
    """
    return _Propagation(traced, classes, layout).run()


@dataclass
class _Propagation:
    traced: Traced
    classes: DimClasses
    layout: Layout
    notes: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.program = self.traced.program
        self.strong: dict[int, list[tuple[int, tuple[str, ...]]]] = {}
        self.weak: dict[int, tuple[str, ...]] = {}
        self._read_rules()
        named = self.classes.names
        self.activations = self._reached_by_data()
        self.embed_like = {c for c, n in named.items() if "embed" in n}
        self.layer_like = {c for c, n in named.items() if LAYERS in n}

    def _read_rules(self) -> None:
        for cls, names in self.classes.names.items():
            for order, (logical, axes) in enumerate(self.layout.rules):
                base = logical.removesuffix(RESIDUAL)
                if base not in names or not axes:
                    continue
                if base != logical:
                    self.weak[cls] = axes
                else:
                    self.strong.setdefault(cls, []).append((order, axes))
            found = self.strong.get(cls, [])
            if len({axes for _, axes in found}) > 1:
                self.notes[
                    f"dims named {' and '.join(names)} are tied by the program but "
                    f"have different rules; the first, {'+'.join(found[0][1])}, holds"
                ] = None
            if found:
                self.strong[cls] = found[:1]

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

    # -- specs of values ---------------------------------------------------------

    def strong_dims(self, value: int) -> list[tuple[str, ...]]:
        """Axes per dim by the rules alone; an axis goes to the first that wants it."""
        shape = self.program.values[value].shape
        wants = []
        for d, cls in enumerate(self.classes.of_value[value]):
            if shape[d] > 1:
                wants += [(order, d, axes) for order, axes in self.strong.get(cls, ())]
        dims: list[tuple[str, ...]] = [()] * len(shape)
        used: set[str] = set()
        for _, d, axes in sorted(wants):
            if not used & set(axes):
                dims[d] = axes
                used |= set(axes)
        return dims

    def value_dims(self, value: int, natural: Dims | None) -> Dims:
        """The spec of a value that is no state.

        The residual rule holds for activations (values computed from the data) in
        which nothing else takes its axes: always if they have the embed dim, else
        only if the op that makes them makes them so.
        """
        dims = self.strong_dims(value)
        classes = self.classes.of_value[value]
        if value in self.activations:
            residual = any(c in self.embed_like for c in classes)
            for d, cls in enumerate(classes):
                axes = self.weak.get(cls)
                if axes is None or dims[d] or self.program.values[value].shape[d] == 1:
                    continue
                if any(set(axes) & set(taken) for taken in dims):
                    continue
                if residual or (natural is not None and natural[d] == axes):
                    dims[d] = axes
        return tuple(dims)

    def _is_residual(self, value: int) -> bool:
        """Whether some dim is sharded by a residual rule alone."""
        spec = self.specs[value]
        assert spec is not None
        return any(
            axes and self.weak.get(cls) == axes
            for axes, cls in zip(spec, self.classes.of_value[value], strict=True)
        )

    def storage_dims(
        self, value: int, base: Dims, axes: tuple[str, ...], path: str
    ) -> Dims:
        """Adds storage axes to the dim that shards best, never to a loop's own dim."""
        taken = {a for dim in base for a in dim}
        axes = tuple(
            a for a in axes if a not in taken and self.layout.sizes.get(a, 2) > 1
        )
        shape = self.program.values[value].shape
        if not axes or not shape:
            return base
        order = sorted(
            (d for d in range(len(shape)) if shape[d] > 1),
            key=lambda d: (
                self.classes.of_value[value][d] in self.layer_like,
                bool(base[d]),
                -gcd(shape[d], 1 << 12),
                -shape[d],
                d,
            ),
        )
        order = [
            d for d in order if self.classes.of_value[value][d] not in self.layer_like
        ]
        for d in order:
            if shape[d] % self.layout.size((*base[d], *axes)) == 0:
                return tuple(
                    (*dim, *axes) if d == k else dim for k, dim in enumerate(base)
                )
        if self.layout.sizes:
            self.notes[
                f"{path} {shape} is not sharded over {'+'.join(axes)} in memory: no "
                f"dim is divisible by {self.layout.size(axes)}"
            ] = None
        return base

    # -- the pass ----------------------------------------------------------------

    def run(self) -> ShardedProgram:
        program = self.program
        self.specs: list[Dims | None] = [None] * len(program.values)
        self.free: set[int] = set()
        self.stored: dict[int, Dims] = {}
        self.reshards: list[Reshard] = []
        self.pins: list[tuple[int, str]] = []
        self.factor_axes: list[Dims] = []
        compute = self._place_inputs()
        self.targets = gradient_targets(
            program,
            self.classes.rules,
            self.stored,
            gradient_dims=self._gradient_dims,
            plain_dims=self.value_dims,
        )
        for op, rule in zip(program.ops, self.classes.rules, strict=True):
            self._visit(op, rule)
        for v in range(len(program.values)):
            if self.specs[v] is None:  # constants bound to the jaxpr
                self.specs[v] = self.value_dims(v, None)
        self._finish_outputs()
        return ShardedProgram(
            traced=self.traced,
            classes=self.classes,
            layout=self.layout,
            specs=tuple(self.specs),  # type: ignore[arg-type]
            factor_axes=tuple(self.factor_axes),
            reshards=tuple(self.reshards),
            free=frozenset(self.free),
            stored=frozenset(self.stored),
            pins=tuple(self.pins),
            divides=self._divides(),
            compute=compute,
            notes=tuple(self.notes),
        )

    def _place_inputs(self) -> tuple[Dims, ...]:
        axes_of = {"params": self.layout.params, "optimizer": self.layout.optimizer}
        compute = []
        for value, info in zip(self.program.inputs, self.traced.inputs, strict=True):
            dims = self.value_dims(value, None)
            compute.append(dims)
            stored = self.storage_dims(
                value, dims, axes_of.get(info.state, ()), info.path
            )
            self.specs[value] = stored
            if stored != dims:
                self.stored[value] = stored
        return tuple(compute)

    def _visit(self, op: Op, rule: FactorRule) -> None:
        gradient = op.primitive == "autoshard_annotate" and op.params["role"]
        operands = [v for v in op.inputs if v >= 0]
        for v in operands:
            if self.specs[v] is None:
                self.specs[v] = self.value_dims(v, None)
        stored = [v for v in operands if v in self.stored]
        result_stored = False
        if op.primitive == LINK:
            axes = self._link_axes(op, rule)
            result_stored = op.inputs[0] in self.stored
        elif gradient:
            result = self._gradient_dims(op)
            axes = factors_from(rule, rule.results[0], result)
            result_stored = result != self.value_dims(op.outputs[0], None)
        elif stored and rule.op_kind in ("elementwise", "move", "reduce"):
            most = max(stored, key=lambda v: sum(len(d) for d in self.stored[v]))
            slot = op.inputs.index(most)
            axes = factors_from(rule, rule.operands[slot], self.stored[most])
            result_stored = runs_with(rule, slot, self.stored[most])
            if not result_stored:
                axes = self._op_axes(op, rule)
        else:
            axes = self._op_axes(op, rule)
        self.factor_axes.append(axes)
        self._results(op, rule, axes, result_stored)
        self._operands(op, rule, axes)
        if op.primitive == "autoshard_annotate" and op.outputs[0] not in self.free:
            self.pins.append((op.index, "out0"))

    def _gradient_dims(self, op: Op) -> Dims:
        value = op.outputs[0]
        return self.storage_dims(
            value,
            self.value_dims(value, None),
            self.layout.gradients,
            f"gradient of {op.params['path']}",
        )

    def _link_axes(self, op: Op, rule: FactorRule) -> Dims:
        """A loop takes values as they come in, and as they must go on or go out."""
        source, target = op.inputs[0], op.outputs[0]
        if op.params["kind"] in ("slice", "carry_out"):
            return factors_from(rule, rule.operands[0], self.specs[source])
        if op.params["kind"] == "carry_in" and source in self.stored:
            return factors_from(rule, rule.operands[0], self.specs[source])
        wanted = self.specs[target]
        if wanted is None:
            natural = natural_dims(
                rule, factors_from(rule, rule.operands[0], self.specs[source])
            )[0]
            wanted = self.targets.get(target)
            if wanted is None:
                stored = source in self.stored
                wanted = natural if stored else self.value_dims(target, natural)
        return factors_from(rule, rule.results[0], wanted)

    def _op_axes(self, op: Op, rule: FactorRule) -> Dims:
        """Axes per factor by the rules; an axis goes to the first that wants it."""
        axes: list[tuple[str, ...]] = [()] * len(rule.sizes)
        classes = self.classes.of_factor[op.index]
        wants = [
            (order, f, want)
            for f, cls in enumerate(classes)
            if rule.kinds[f] != "blocked"
            for order, want in self.strong.get(cls, ())
        ]
        used: set[str] = set()
        for _, f, want in sorted(wants):
            if not used & set(want):
                axes[f] = want
                used |= set(want)
        for f, cls in enumerate(classes):
            want = self.weak.get(cls)
            if want is None or axes[f] or rule.kinds[f] == "blocked":
                continue
            if not used & set(want) and self._some_operand_has(op, rule, f, want):
                axes[f] = want
                used |= set(want)
        return tuple(axes)

    def _some_operand_has(
        self, op: Op, rule: FactorRule, factor: int, axes: tuple[str, ...]
    ) -> bool:
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            if value < 0 or value in self.free:
                continue
            spec = self.specs[value]
            assert spec is not None
            for d, dim in enumerate(dims):
                if dim and dim[0] == factor and spec[d] == axes:
                    return True
        return False

    def _results(
        self, op: Op, rule: FactorRule, axes: Dims, result_stored: bool
    ) -> None:
        unreduced = tuple(
            a for f, kind in enumerate(rule.kinds) if kind == "reduce" for a in axes[f]
        )
        scalars = all(
            v < 0 or v in self.free or not self.program.values[v].shape
            for v in op.inputs
        )
        makes_free = (
            scalars
            and rule.op_kind in ("data", "elementwise", "move", "link")
            # What a loop carries is constant only before its first run.
            and op.params.get("kind") not in ("carry_in", "carry", "carry_out")
        )
        for k, (value, natural) in enumerate(
            zip(op.outputs, natural_dims(rule, axes), strict=True)
        ):
            if self.specs[value] is None:
                if result_stored:
                    self.specs[value] = natural
                else:
                    self.specs[value] = self.value_dims(value, natural)
                if value in self.targets:
                    self.specs[value] = self.stored[value] = self.targets[value]
            if result_stored and self.specs[value] == natural:
                self.stored[value] = natural
            if makes_free and self.program.values[value].shape:
                self.free.add(value)
                continue
            spec = self.specs[value]
            assert spec is not None
            if unreduced or natural != spec:
                self.reshards.append(
                    Reshard(op.index, f"out{k}", value, natural, unreduced, spec)
                )
            elif op.primitive == LINK and (
                value in self.stored or self._is_residual(value)
            ):
                # Keeps the partitioner from gathering the whole stack up front, or
                # from keeping the gathered form of what a layer saves.
                self.pins.append((op.index, f"out{k}"))

    def _operands(self, op: Op, rule: FactorRule, axes: Dims) -> None:
        for k, (value, dims) in enumerate(zip(op.inputs, rule.operands, strict=True)):
            if value < 0 or value in self.free or not dims:
                continue
            needed = tuple(axes[dim[0]] if dim else () for dim in dims)
            spec = self.specs[value]
            assert spec is not None
            if needed != spec:
                self.reshards.append(
                    Reshard(op.index, f"in{k}", value, spec, (), needed)
                )
            elif rule.op_kind == "scatter" and any(needed):
                # Else the partitioner shards the updates as it shards the result,
                # and moves them instead of the much smaller partial sums.
                self.pins.append((op.index, f"in{k}"))

    # -- the end -----------------------------------------------------------------

    def _finish_outputs(self) -> None:
        for k, (value, source) in enumerate(
            zip(self.program.outputs, self.traced.out_source, strict=True)
        ):
            if value < 0:
                continue
            spec = self.specs[value]
            assert spec is not None
            target = self.specs[self.program.inputs[source]] if source >= 0 else spec
            assert target is not None
            if spec != target and value not in self.free:
                self.reshards.append(
                    Reshard(OUTPUT, f"out{k}", value, spec, (), target)
                )

    def _divides(self) -> frozenset[tuple[int, tuple[str, ...]]]:
        pairs: set[tuple[int, tuple[str, ...]]] = set()
        for value, spec in zip(self.program.values, self.specs, strict=True):
            assert spec is not None
            if value.index in self.stored:
                continue  # storage that does not divide is left out, with a note
            pairs.update((n, d) for n, d in zip(value.shape, spec, strict=True) if d)
        for op, rule, axes in zip(
            self.program.ops, self.classes.rules, self.factor_axes, strict=True
        ):
            if any(v in self.stored for v in (*op.inputs, *op.outputs)):
                continue
            pairs.update((n, a) for n, a in zip(rule.sizes, axes, strict=True) if a)
        return frozenset(pairs)
