"""Assigning axes: a spec for every value, the axes of every op, and the moves.

Ops are visited once, in order of execution. Each value's spec follows from what the
user fixed and from the classes of its dims, by priority; each op runs with the axes its
factors have; where the two differ a reshard is recorded, and nowhere else is data
moved. Ops that look the same from where they stand (the copies of a layer) have the
same outcome, which is worked out once.

State has two specs (ZeRO). Its storage spec holds along chains of point-by-point ops
(casts, optimizer arithmetic); the first op that needs more, or that works on what is
made of the data, gathers it. Gradients take their storage spec at the op that makes
them, so that partial sums are scattered rather than summed everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from autoshard.ir.program import BARRIER, LINK, Op, Program
from autoshard.ir.trace import Traced
from autoshard.plan.sharded import (
    OUTPUT,
    DimClasses,
    Dims,
    Exchange,
    Layout,
    Reshard,
    ShardedProgram,
)
from autoshard.propagate.decide import Decisions, Outcome, UnderRules
from autoshard.propagate.divide import what_divides
from autoshard.propagate.exchanges import between_neighbours, in_manual_region
from autoshard.propagate.gradients import gradient_targets
from autoshard.rules import FactorRule

_AT_ONCE = frozenset({"gather", "reduce", "scatter"})
"""Kinds of op whose partial sums the partitioner completes over all axes together."""

_NAMED = frozenset({BARRIER, "autoshard_annotate", "sharding_constraint", "reshard"})
"""Primitives that are treated in a way of their own, beyond their rule."""


def _has_gaps(program: Program, op: Op, rule: FactorRule) -> bool:
    """Whether some dim of a result, longer than one, has no factor of its own."""
    return any(
        not dim and size > 1
        for value, dims in zip(op.outputs, rule.results, strict=True)
        for dim, size in zip(dims, program.values[value].shape, strict=True)
    )


def propagate(
    traced: Traced,
    classes: DimClasses,
    layout: Layout,
    under: UnderRules | None = None,
) -> ShardedProgram:
    """Applies a layout to a program.

    Args:
        traced: The program.
        classes: Its classes, from `find_classes`.
        layout: Rules and storage. With `layout.sizes` known, a state leaf that no
            dim of which divides stays as computed, and a note says so.
        under: What was found of the program with other storage, all else of the layout
            being the same; it is added to.

    Returns:
        The sharded program.
    """
    if under is None:
        under = UnderRules(traced, classes, layout)
    assert under.has(layout), layout
    return _Propagation(traced, classes, layout, under).run()


@dataclass
class _Propagation(Decisions):
    reshards: list[Reshard] = field(default_factory=list)
    pins: list[tuple[int, str]] = field(default_factory=list)
    factor_axes: list[Dims] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    state: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.outcomes, self.states = self.under.outcomes, self.under.states
        self.state = [-1] * len(self.program.values)

    # -- the pass ----------------------------------------------------------------

    def run(self) -> ShardedProgram:
        program, rules = self.program, self.classes.rules
        compute = self._place_inputs()
        for value in program.inputs:
            self.state[value] = self._state_of(value)
        self.targets = gradient_targets(
            program,
            rules,
            self.classes.early,
            self.stored,
            gradient_dims=self.gradient_dims,
            plain_dims=self.wants.value_dims,
        )
        self.odd = self._odd_ops()
        for op in program.ops:
            self._visit(op, rules[op.index])
        for v in range(len(program.values)):
            if self.specs[v] is None:  # constants bound to the jaxpr
                self.specs[v] = self.wants.value_dims(v, None)
        self._finish_outputs()
        divides, padded = what_divides(
            program,
            self.classes,
            compute=compute,
            specs=self.specs,
            factor_axes=self.factor_axes,
            stored=self.stored,
            delayed=self.sums.delayed,
        )
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
            divides=divides,
            padded=padded,
            compute=compute,
            notes=tuple(self.wants.notes),
            exchanges=tuple(self.exchanges),
            delayed=self.sums.delayed,
            conflicts=tuple(self.wants.conflicts),
            asked=frozenset(self.wants.asked),
        )

    def _place_inputs(self) -> tuple[Dims, ...]:
        axes_of = {"params": self.layout.params, "optimizer": self.layout.optimizer}
        compute = []
        for value, info in zip(self.program.inputs, self.traced.inputs, strict=True):
            dims = self.wants.value_dims(value, None)
            compute.append(dims)
            stored = self.wants.stored_dims(
                value, dims, axes_of.get(info.state, ()), info.path
            )
            self.specs[value] = stored
            if stored != dims:
                self.stored[value], self.plain[value] = stored, dims
        return tuple(compute)

    # -- one op ------------------------------------------------------------------

    def _visit(self, op: Op, rule: FactorRule) -> None:
        state, outputs, index = self.state, op.outputs, op.index
        wants = self.wants
        seen = []
        for v in op.inputs:
            if v < 0:
                seen.append(-2)
                continue
            if state[v] < 0:
                self.specs[v] = self.wants.value_dims(v, None)
                state[v] = self._state_of(v)
            seen.append(state[v])
        name = op.primitive
        key = (
            id(rule),
            wants.wish_of_factor[index],
            op.params["kind"] if name == LINK else name if name in _NAMED else "",
            outputs[0] in wants.activations if outputs else False,
            self.classes.batched[outputs[0]] if outputs else False,
            self.under.updates[index],
            *seen,
            *[state[v] for v in outputs],
            *([wants.claims.get(v) for v in outputs] if wants.claims else ()),
        )
        if index in self.odd:
            key = (key, self._more(op, rule))
        outcome = self.outcomes.get(key)
        if outcome is None:
            outcome = self._first(op, rule)
            self.outcomes[key] = outcome
        else:
            self._apply(op, rule, outcome)
        wants.asked |= outcome.asked
        for v, number in zip(outputs, outcome.states, strict=True):
            state[v] = number

    def _first(self, op: Op, rule: FactorRule) -> Outcome:
        """Visits an op that is like none before it."""
        asked, self.wants.asked = self.wants.asked, set()
        outcome = self.decide(op, rule)
        own, self.wants.asked = frozenset(self.wants.asked), asked
        self._apply(op, rule, outcome)
        quiet = not (
            outcome.stored
            or outcome.free
            or outcome.reshards
            or outcome.pins
            or rule.halos
            or rule.op_kind == "collective"
        )
        states = tuple([self._state_of(v) for v in op.outputs])
        return replace(outcome, states=states, quiet=quiet, asked=own)

    def _odd_ops(self) -> set[int]:
        """Ops of which an outcome hangs on more than what they are and see."""
        program, rules = self.program, self.classes.rules
        some = {id(rule): i for i, rule in enumerate(rules)}
        self.gaps = gaps = {
            number
            for number, i in some.items()
            if _has_gaps(program, program.ops[i], rules[i])
        }
        if self.classes.fixed.dims or self.wants.manual:
            return set(range(len(program.ops)))
        odd = {i for i, rule in enumerate(rules) if id(rule) in gaps}
        odd.update(self.sums.role)
        odd.update(program.values[v].producer for v in self.targets)
        odd.update(
            op.index
            for op in program.ops
            if op.primitive == "autoshard_annotate" and op.params["role"]
        )
        return odd

    def _more(self, op: Op, rule: FactorRule) -> object:
        """What else an outcome hangs on, for the few ops where it does."""
        index, fixed, targets = op.index, self.classes.fixed, self.targets
        more: list[object] = []
        role = self.sums.role.get(index)
        if role is not None:
            more += [role, self.end_of(role)]
        if fixed.dims:
            more.append(fixed.factors.get(index))
            more += [fixed.dims.get(v) for v in op.outputs]
        for v in op.outputs:
            if v in targets:
                more += [v - op.outputs[0], targets[v]]
        if self.wants.manual and op.region in self.wants.manual:
            more.append("manual")
        if id(rule) in self.gaps:  # what is wanted there, no factor tells
            more += [self.wants.wish_of_value[v] for v in op.outputs]
            more += [self.program.values[v].shape for v in op.outputs]
        if op.primitive == "autoshard_annotate" and op.params["role"]:
            more += [op.params["path"], self.layout.gradients]
        elif op.primitive == LINK and "names" in op.params:
            more.append(str(op.params["names"]))
        return tuple(more)

    def _state_of(self, value: int) -> int:
        """A number for all that ops see of a value."""
        key = (
            self.specs[value],
            self.plain.get(value),
            value in self.free,
            value in self.wants.activations,
            value in self.classes.early.values,
        )
        return self.states.setdefault(key, len(self.states))

    def _apply(self, op: Op, rule: FactorRule, outcome: Outcome) -> None:
        self.factor_axes.append(outcome.axes)
        for value, spec in zip(op.outputs, outcome.specs, strict=True):
            self.specs[value] = spec
        if outcome.quiet:
            return
        for k, plain in zip(outcome.stored, outcome.plain, strict=True):
            v = op.outputs[k]
            self.stored[v], self.plain[v] = outcome.specs[k], plain
        for k in outcome.free:
            self.free.add(op.outputs[k])
        for k, is_result, source, unreduced, target in outcome.reshards:
            value = op.outputs[k] if is_result else op.inputs[k]
            slot = f"out{k}" if is_result else f"in{k}"
            at_once = len(unreduced) > 1 and rule.op_kind in _AT_ONCE
            self.reshards.append(
                Reshard(op.index, slot, value, source, unreduced, target, at_once)
            )
        for slot in outcome.pins:
            self.pins.append((op.index, slot))
        if rule.halos:
            self.exchanges += between_neighbours(op, rule, outcome.axes)
        elif rule.op_kind == "collective":
            self.exchanges += in_manual_region(self.program, op, self.classes.aliases)

    # -- the end -----------------------------------------------------------------

    def _finish_outputs(self) -> None:
        for k, (value, source) in enumerate(
            zip(self.program.outputs, self.traced.out_source, strict=True)
        ):
            if value < 0:
                continue
            spec = self.specs[value]
            assert spec is not None
            if source >= 0:
                target = self.specs[self.program.inputs[source]]
            else:
                target = self._divided(value, spec)
            assert target is not None
            if spec != target and value not in self.free:
                self.reshards.append(
                    Reshard(OUTPUT, f"out{k}", value, spec, (), target)
                )

    def _divided(self, value: int, spec: Dims) -> Dims:
        """A result's spec without axes that do not divide it, as JAX pads no result."""
        shape = self.program.values[value].shape
        target = tuple(
            dim if self.wants.divides(n, dim) else ()
            for n, dim in zip(shape, spec, strict=True)
        )
        if target != spec:
            self.wants.notes[
                f"a result of shape {shape} is gathered at the end: it does not divide "
                f"over {'+'.join(a for dim in spec for a in dim)}"
            ] = None
        return target
