"""What one op decides: its axes, the specs of its results, and what has to move."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from autoshard.ir.program import BARRIER, LINK, Op
from autoshard.ir.trace import Traced
from autoshard.ir.train_step import UPDATE_SCOPE
from autoshard.plan.sharded import DimClasses, Dims, Layout
from autoshard.propagate.project import (
    factors_from,
    natural_dims,
    runs_with,
    spec_of,
)
from autoshard.propagate.sound import sound
from autoshard.propagate.sums import Role, Sums, find_sums
from autoshard.propagate.wants import Wants
from autoshard.rules import FactorRule

_INWARDS = ("slice", "carry_out", "branch_in")
"""Links whose target takes the spec of its source."""

_WHATEVER = frozenset({"data", "elementwise", "link", "move"})
"""Kinds of op that the partitioner divides rightly along any dim."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What visiting an op decides, in terms of its operands and results.

    Attributes:
        axes: Axes per factor.
        specs: Spec per result.
        stored: Results that are in their storage spec.
        plain: Spec that each of these would have if nothing were stored otherwise.
        free: Results that are made of constants only.
        reshards: `(slot number, is result, source, unreduced, target)`.
        pins: Slots to pin.
        states: What later ops see of each result, see `_state_of`.
        quiet: Whether there is nothing but axes and specs to it.
        asked: What `Wants.divides` was asked for it.
    """

    axes: Dims
    specs: tuple[Dims, ...]
    stored: tuple[int, ...]
    free: tuple[int, ...]
    reshards: tuple[tuple[int, bool, Dims, tuple[str, ...], Dims], ...]
    pins: tuple[str, ...]
    plain: tuple[Dims, ...] = ()
    states: tuple[int, ...] = ()
    quiet: bool = False
    asked: frozenset[tuple[int, tuple[str, ...]]] = frozenset()


class UnderRules:
    """What all layouts of a program have in common that differ in storage alone.

    Ops that do not meet what is stored otherwise have the outcomes they had under
    another storage, so `propagate` works them out once.

    Args:
        traced: The program.
        classes: Its dim classes.
        layout: One of the layouts.

    Attributes:
        wants: What the rules want.
        sums: Partial sums that are added before they are reduced.
        outcomes: By all that the outcome of an op hangs on.
        states: A number for all that ops see of a value.
        updates: Per op, whether it is of an update of state.
    """

    def __init__(self, traced: Traced, classes: DimClasses, layout: Layout) -> None:
        self.wants = Wants(traced, classes, layout)
        self.sums: Sums = find_sums(traced.program, classes, self.wants)
        self.outcomes: dict[object, Outcome] = {}
        self.states: dict[object, int] = {}
        self.updates = [UPDATE_SCOPE in op.scope for op in traced.program.ops]
        self._common = _common(layout)

    def has(self, layout: Layout) -> bool:
        """Whether a layout is one of these."""
        return self._common == _common(layout)


def _common(layout: Layout) -> Layout:
    return replace(layout, params=(), gradients=(), optimizer=())


@dataclass
class Decisions:
    """The state of a pass over the ops of a program, and what each op makes of it.

    Attributes:
        traced: The program.
        classes: Its dim classes and rules.
        layout: What is applied.
        under: What it has in common with layouts of other storage.
        specs: Spec per value that is known so far.
        free: Values made of constants only.
        stored: Values in their storage spec, and that spec.
        plain: Of these, the spec they would have if nothing were stored otherwise.
        targets: Specs that values take at the op that makes them.
    """

    traced: Traced
    classes: DimClasses
    layout: Layout
    under: UnderRules
    specs: list[Dims | None] = field(default_factory=list)
    free: set[int] = field(default_factory=set)
    stored: dict[int, Dims] = field(default_factory=dict)
    plain: dict[int, Dims] = field(default_factory=dict)
    targets: dict[int, Dims] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.program = self.traced.program
        self.wants = self.under.wants.stored_as(self.layout)
        self.sums = self.under.sums
        self.specs = [None] * len(self.program.values)

    def gradient_dims(self, op: Op) -> Dims:
        """The spec in which a marked gradient is stored."""
        value, path = op.outputs[0], op.params["path"]
        base = self.wants.value_dims(value, None)
        given = self._placed.get(path) if self.layout.gradients else None
        if given is not None:
            return given
        return self.wants.stored_dims(
            value, base, self.layout.gradients, f"gradient of {path}"
        )

    @cached_property
    def _placed(self) -> dict[str, Dims]:
        """Storage of the parameters that the user placed himself, by path."""
        storage = self.classes.fixed.storage
        if not storage:
            return {}
        pairs = zip(self.program.inputs, self.traced.inputs, strict=True)
        return {
            i.path: storage[v]
            for v, i in pairs
            if v in storage and self.layout.has(storage[v])
        }

    def decide(self, op: Op, rule: FactorRule) -> Outcome:
        """Works an op out; nothing is changed by it."""
        operands = [v for v in op.inputs if v >= 0]
        stored = [v for v in operands if v in self.stored]
        result_stored = False
        kind = op.params["kind"] if op.primitive == LINK else None
        needed: Dims | None = None
        natural: list[Dims] | None = None
        if kind in ("manual_in", "manual_out"):
            axes: Dims = ((),) * len(rule.sizes)
            names = self._manual_dims(op)
            if kind == "manual_in":
                needed = names
            else:
                natural = [names]
        elif op.primitive == BARRIER:
            return self._barrier(op, rule)
        elif op.index in self.sums.role:
            axes = self.sums.role[op.index].factor_axes
        elif op.primitive == LINK:
            axes = self._link_axes(op, rule)
            result_stored = self._keeps(op)
        elif op.primitive == "autoshard_annotate" and op.params["role"]:
            result = self.gradient_dims(op)
            axes = factors_from(rule, rule.results[0], result)
            result_stored = result != self.wants.value_dims(op.outputs[0], None)
        elif (
            stored
            and rule.op_kind in ("elementwise", "move", "reduce")
            and not self._meets_data(op)
        ):
            most = max(stored, key=lambda v: sum(len(d) for d in self.stored[v]))
            slot = op.inputs.index(most)
            axes = factors_from(rule, rule.operands[slot], self.stored[most])
            result_stored = runs_with(rule, slot, self.stored[most])
            result_stored = result_stored and self._divides(rule, axes)
            if not result_stored:
                axes = self._op_axes(op, rule)
        else:
            axes = self._op_axes(op, rule)
        axes = sound(op, rule, axes, self.wants.divides)
        if natural is None:
            natural = natural_dims(rule, axes)
        pins: list[str] = []
        results = self._results(op, rule, axes, natural, result_stored, pins)
        specs, kept, free, reshards = results
        reshards += self._operands(op, rule, axes, needed, pins)
        if (
            op.primitive in ("autoshard_annotate", "sharding_constraint", "reshard")
            and 0 not in free
            and op.region not in self.wants.manual
        ):
            pins.append("out0")
        plain = self._plain(op, rule) if kept else []
        return Outcome(
            axes=axes,
            specs=tuple(specs),
            stored=tuple(kept),
            free=tuple(free),
            reshards=tuple(reshards),
            pins=tuple(pins),
            plain=tuple(plain[k] for k in kept),
        )

    def _meets_data(self, op: Op) -> bool:
        """Whether an op of the two passes works on what is made of the data, too.

        How that is divided does not hang on how state is stored.
        """
        if self.under.updates[op.index]:
            return False
        if self.classes.batched[op.outputs[0]]:
            return True
        early, values = self.classes.early.values, self.program.values
        known = (early, self.stored, self.free)
        return any(
            v >= 0 and values[v].shape and not any(v in some for some in known)
            for v in op.inputs
        )

    def _keeps(self, op: Op) -> bool:
        """Whether a link keeps the storage spec of what it takes."""
        source, kind = op.inputs[0], op.params["kind"]
        if source not in self.stored or kind == "branch_out":
            return False
        # What a loop carries on of the data is not stored because it begins as state.
        data = op.outputs[0] not in self.classes.early.values
        return kind != "carry_in" or self.under.updates[op.index] or not data

    def _plain(self, op: Op, rule: FactorRule) -> list[Dims]:
        """Spec per result if nothing were stored otherwise than as it is used."""
        if op.primitive == LINK:
            source = self._used(op.inputs[0])
            axes = factors_from(rule, rule.operands[0], source)
        else:
            axes = self._op_axes(op, rule)
        made = natural_dims(rule, sound(op, rule, axes, self.wants.divides))
        pairs = zip(op.outputs, made, strict=True)
        return [self.wants.value_dims(v, natural) for v, natural in pairs]

    def _divides(self, rule: FactorRule, axes: Dims) -> bool:
        """Whether what is stored divides further on, too, where sizes are known."""
        return all(
            self.wants.divides(rule.sizes[f], wanted)
            for f, wanted in enumerate(axes)
            if wanted
        )

    def _barrier(self, op: Op, rule: FactorRule) -> Outcome:
        """Everything passes as it is, state in its storage spec."""
        axes: list[tuple[str, ...]] = [()] * len(rule.sizes)
        specs: list[Dims] = []
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            spec = self.specs[value] if value >= 0 else None
            specs.append(spec or ((),) * len(dims))
            for dim, wanted in zip(dims, specs[-1], strict=True):
                if dim:
                    axes[dim[0]] = wanted
        stored = tuple(k for k, v in enumerate(op.inputs) if v in self.stored)
        free = tuple(k for k, v in enumerate(op.inputs) if v in self.free)
        plain = tuple(self.plain[op.inputs[k]] for k in stored)
        return Outcome(tuple(axes), tuple(specs), stored, free, (), (), plain)

    def end_of(self, role: Role) -> Dims:
        """The spec in which a delayed sum is reduced."""
        target = self.targets.get(role.end)
        return target or self.wants.value_dims(role.end, role.natural)

    def _manual_dims(self, op: Op) -> Dims:
        """What a manual region takes or gives, in canonical axes."""
        canonical = self.classes.canonical
        where = f"shard_map at {op.source or op.address}"
        return tuple(canonical(tuple(dim), where) for dim in op.params["names"])

    def _op_axes(self, op: Op, rule: FactorRule) -> Dims:
        # An update is divided as state is stored, the two passes as if it were not.
        spec = self.specs.__getitem__ if self.under.updates[op.index] else self._used
        operands = [
            (spec(v) or (), v not in self.free) if v >= 0 else ((), False)
            for v in op.inputs
        ]
        return self.wants.op_axes(op, rule, operands)

    def _used(self, value: int) -> Dims | None:
        """The spec of a value, or that in which it is used if it is stored."""
        return self.plain.get(value, self.specs[value])

    def _link_axes(self, op: Op, rule: FactorRule) -> Dims:
        """A loop takes values as they come in, and as they must go on or go out."""
        source, target = op.inputs[0], op.outputs[0]
        kind = op.params["kind"]
        if kind in _INWARDS or (kind == "carry_in" and self._keeps(op)):
            return factors_from(rule, rule.operands[0], self.specs[source])
        wanted = self.specs[target]
        if wanted is None and kind == "branch_out":
            # All branches give it, and none of them decides.
            wanted = self.targets.get(target) or self.wants.value_dims(target, None)
        if wanted is None:
            natural = natural_dims(
                rule, factors_from(rule, rule.operands[0], self.specs[source])
            )[0]
            wanted = self.targets.get(target)
            if wanted is None and self._keeps(op):
                wanted = natural
            elif wanted is None:
                used = factors_from(rule, rule.operands[0], self._used(source))
                [natural] = natural_dims(rule, used)
                wanted = self.wants.value_dims(target, natural)
        return factors_from(rule, rule.results[0], wanted)

    def _results(
        self,
        op: Op,
        rule: FactorRule,
        axes: Dims,
        natural: list[Dims],
        result_stored: bool,
        pins: list[str],
    ) -> tuple[list[Dims], list[int], list[int], list]:
        unreduced = tuple(
            a for f, kind in enumerate(rule.kinds) if kind == "reduce" for a in axes[f]
        )
        role = self.sums.role.get(op.index)
        if role is not None:
            # Partial sums stay so until the last op that adds them up.
            unreduced = role.axes if role.last else ()
        scalars = all(
            v < 0 or v in self.free or not self.program.values[v].shape
            for v in op.inputs
        )
        makes_free = (
            scalars
            and rule.op_kind in ("data", "elementwise", "move", "link")
            # What a loop carries is constant only before its first run.
            and op.params.get("kind")
            not in ("carry_in", "carry", "carry_out", "branch_out", "manual_out")
        )
        specs: list[Dims] = []
        kept: list[int] = []
        free: list[int] = []
        reshards = []
        for k, (value, made) in enumerate(zip(op.outputs, natural, strict=True)):
            spec = self.specs[value]
            in_storage = False
            if spec is None:
                if role is not None and not role.last:
                    spec = made
                else:
                    spec = made if result_stored else self.wants.value_dims(value, made)
                if value in self.targets and (role is None or role.last):
                    spec = self.targets[value]
                    in_storage = True
            if in_storage or (result_stored and spec == made):
                kept.append(k)
            specs.append(spec)
            if makes_free and self.program.values[value].shape:
                free.append(k)
            elif unreduced or made != spec:
                reshards.append((k, True, made, unreduced, spec))
            elif (
                op.primitive == LINK
                and op.region not in self.wants.manual
                and (
                    k in kept
                    or value in self.stored
                    or self.wants.is_residual(value, spec)
                )
            ):
                # Keeps the partitioner from gathering the whole stack up front, or
                # from keeping the gathered form of what a layer saves.
                pins.append(f"out{k}")
        return specs, kept, free, reshards

    def _operands(
        self,
        op: Op,
        rule: FactorRule,
        axes: Dims,
        given: Dims | None,
        pins: list[str],
    ) -> list[tuple[int, bool, Dims, tuple[str, ...], Dims]]:
        reshards = []
        role = self.sums.role.get(op.index)
        for k, (value, dims) in enumerate(zip(op.inputs, rule.operands, strict=True)):
            if value < 0 or (given is None and not dims):
                continue
            if value in self.free:
                if rule.op_kind not in _WHATEVER and _needs_whole(rule, dims):
                    pins.append(f"in{k}")
                continue
            needed = spec_of(dims, axes) if given is None else given
            if role is not None and role.whole == k:
                needed = self.end_of(role)
            spec = self.specs[value]
            assert spec is not None
            if needed != spec:
                reshards.append((k, False, spec, (), needed))
            elif rule.op_kind == "scatter" and any(needed):
                # Else the partitioner shards the updates as it shards the result,
                # and moves them instead of the much smaller partial sums.
                pins.append(f"in{k}")
        return reshards


def _needs_whole(rule: FactorRule, dims: tuple[tuple[int, ...], ...]) -> bool:
    """Whether an operand may not be divided along some dim that is longer than one.

    Constants lie as the partitioner likes, but not where it would then divide an op
    along a dim that the rule says each device needs whole.
    """
    return any(
        rule.kinds[dim[0]] == "blocked" and rule.sizes[dim[0]] > 1
        for dim in dims
        if dim
    )
