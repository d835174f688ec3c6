"""Assigning axes: a spec for every value, the axes of every op, and the moves.

Ops are visited once, in order of execution. Each value's spec follows from what the
user fixed and from the classes of its dims, by priority; each op runs with the axes its
factors have; where the two differ a reshard is recorded, and nowhere else is data
moved. Ops that look the same from where they stand (the copies of a layer) have the
same outcome, which is worked out once.

State has two specs (ZeRO). Its storage spec holds along chains of point-by-point ops
(casts, optimizer arithmetic); the first op that needs more gathers it. Gradients take
their storage spec at the op that makes them, so that partial sums are scattered rather
than summed everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

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
from autoshard.propagate.divide import what_divides
from autoshard.propagate.exchanges import between_neighbours, in_manual_region
from autoshard.propagate.gradients import gradient_targets
from autoshard.propagate.project import (
    factors_from,
    natural_dims,
    runs_with,
    spec_of,
)
from autoshard.propagate.sums import Role, Sums, find_sums
from autoshard.propagate.wants import Wants
from autoshard.rules import FactorRule

_INWARDS = ("slice", "carry_out", "branch_in")
"""Links whose target takes the spec of its source."""


_NAMED = frozenset({BARRIER, "autoshard_annotate", "sharding_constraint", "reshard"})
"""Primitives that are treated in a way of their own, beyond their rule."""


def _has_gaps(program: Program, op: Op, rule: FactorRule) -> bool:
    """Whether some dim of a result, longer than one, has no factor of its own."""
    return any(
        not dim and size > 1
        for value, dims in zip(op.outputs, rule.results, strict=True)
        for dim, size in zip(dims, program.values[value].shape, strict=True)
    )


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


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What visiting an op decides, in terms of its operands and results.

    Attributes:
        axes: Axes per factor.
        specs: Spec per result.
        stored: Results that are in their storage spec.
        free: Results that are made of constants only.
        reshards: `(slot number, is result, source, unreduced, target)`.
        pins: Slots to pin.
        states: What later ops see of each result, see `_state_of`.
        quiet: Whether there is nothing but axes and specs to it.
    """

    axes: Dims
    specs: tuple[Dims, ...]
    stored: tuple[int, ...]
    free: tuple[int, ...]
    reshards: tuple[tuple[int, bool, Dims, tuple[str, ...], Dims], ...]
    pins: tuple[str, ...]
    states: tuple[int, ...] = ()
    quiet: bool = False


@dataclass
class _Propagation:
    traced: Traced
    classes: DimClasses
    layout: Layout
    specs: list[Dims | None] = field(default_factory=list)
    free: set[int] = field(default_factory=set)
    stored: dict[int, Dims] = field(default_factory=dict)
    reshards: list[Reshard] = field(default_factory=list)
    pins: list[tuple[int, str]] = field(default_factory=list)
    factor_axes: list[Dims] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    outcomes: dict[object, _Outcome] = field(default_factory=dict)
    state: list[int] = field(default_factory=list)
    states: dict[object, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.program = self.traced.program
        self.wants = Wants(self.traced, self.classes, self.layout)
        self.specs = [None] * len(self.program.values)
        self.state = [-1] * len(self.program.values)
        self.sums: Sums = find_sums(self.program, self.classes, self.wants)

    # -- the pass ----------------------------------------------------------------

    def run(self) -> ShardedProgram:
        program, rules = self.program, self.classes.rules
        compute = self._place_inputs()
        for value in program.inputs:
            self.state[value] = self._state_of(value)
        self.targets = gradient_targets(
            program,
            rules,
            self.stored,
            gradient_dims=self._gradient_dims,
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
                self.stored[value] = stored
        return tuple(compute)

    def _gradient_dims(self, op: Op) -> Dims:
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
        return {i.path: storage[v] for v, i in pairs if any(storage.get(v, ()))}

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
            *seen,
            *[state[v] for v in outputs],
        )
        if index in self.odd:
            key = (key, self._more(op, rule))
        outcome = self.outcomes.get(key)
        if outcome is None:
            outcome = self._decide(op, rule)
            self._apply(op, rule, outcome)
            quiet = not (
                outcome.stored
                or outcome.free
                or outcome.reshards
                or outcome.pins
                or rule.halos
                or rule.op_kind == "collective"
            )
            states = tuple([self._state_of(v) for v in outputs])
            outcome = replace(outcome, states=states, quiet=quiet)
            self.outcomes[key] = outcome
        else:
            self._apply(op, rule, outcome)
        for v, number in zip(outputs, outcome.states, strict=True):
            state[v] = number

    def _odd_ops(self) -> set[int]:
        """Ops of which an outcome hangs on more than what they are and see."""
        program, rules = self.program, self.classes.rules
        if self.classes.fixed.dims or self.wants.manual:
            return set(range(len(program.ops)))
        some = {id(rule): i for i, rule in enumerate(rules)}
        gaps = {
            number
            for number, i in some.items()
            if _has_gaps(program, program.ops[i], rules[i])
        }
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
            more += [role, self._end_of(role)]
        if fixed.dims:
            more.append(fixed.factors.get(index))
            more += [fixed.dims.get(v) for v in op.outputs]
        for v in op.outputs:
            if v in targets:
                more += [v - op.outputs[0], targets[v]]
        if self.wants.manual and op.region in self.wants.manual:
            more.append("manual")
        if _has_gaps(self.program, op, rule):  # what is wanted there, no factor tells
            more += [self.wants.wish_of_value[v] for v in op.outputs]
            more += [self.program.values[v].shape for v in op.outputs]
        if op.primitive == "autoshard_annotate" and op.params["role"]:
            more.append(op.params["path"])
        elif op.primitive == LINK and "names" in op.params:
            more.append(str(op.params["names"]))
        return tuple(more)

    def _state_of(self, value: int) -> int:
        """A number for all that ops see of a value."""
        key = (
            self.specs[value],
            value in self.stored,
            value in self.free,
            value in self.wants.activations,
        )
        return self.states.setdefault(key, len(self.states))

    def _apply(self, op: Op, rule: FactorRule, outcome: _Outcome) -> None:
        self.factor_axes.append(outcome.axes)
        for value, spec in zip(op.outputs, outcome.specs, strict=True):
            self.specs[value] = spec
        if outcome.quiet:
            return
        for k in outcome.stored:
            self.stored[op.outputs[k]] = outcome.specs[k]
        for k in outcome.free:
            self.free.add(op.outputs[k])
        for k, is_result, source, unreduced, target in outcome.reshards:
            value = op.outputs[k] if is_result else op.inputs[k]
            slot = f"out{k}" if is_result else f"in{k}"
            at_once = len(unreduced) > 1 and rule.op_kind in ("gather", "scatter")
            self.reshards.append(
                Reshard(op.index, slot, value, source, unreduced, target, at_once)
            )
        for slot in outcome.pins:
            self.pins.append((op.index, slot))
        if rule.halos:
            self.exchanges += between_neighbours(op, rule, outcome.axes)
        elif rule.op_kind == "collective":
            self.exchanges += in_manual_region(self.program, op, self.classes.aliases)

    def _decide(self, op: Op, rule: FactorRule) -> _Outcome:
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
            result_stored = op.inputs[0] in self.stored and kind != "branch_out"
        elif op.primitive == "autoshard_annotate" and op.params["role"]:
            result = self._gradient_dims(op)
            axes = factors_from(rule, rule.results[0], result)
            result_stored = result != self.wants.value_dims(op.outputs[0], None)
        elif stored and rule.op_kind in ("elementwise", "move", "reduce"):
            most = max(stored, key=lambda v: sum(len(d) for d in self.stored[v]))
            slot = op.inputs.index(most)
            axes = factors_from(rule, rule.operands[slot], self.stored[most])
            result_stored = runs_with(rule, slot, self.stored[most])
            if not result_stored:
                axes = self._op_axes(op, rule)
        else:
            axes = self._op_axes(op, rule)
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
        return _Outcome(
            axes, tuple(specs), tuple(kept), tuple(free), tuple(reshards), tuple(pins)
        )

    def _barrier(self, op: Op, rule: FactorRule) -> _Outcome:
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
        return _Outcome(tuple(axes), tuple(specs), stored, free, (), ())

    def _end_of(self, role: Role) -> Dims:
        """The spec in which a delayed sum is reduced."""
        target = self.targets.get(role.end)
        return target or self.wants.value_dims(role.end, role.natural)

    def _manual_dims(self, op: Op) -> Dims:
        """What a manual region takes or gives, in canonical axes."""
        canonical = self.classes.canonical
        where = f"shard_map at {op.source or op.address}"
        return tuple(canonical(tuple(dim), where) for dim in op.params["names"])

    def _op_axes(self, op: Op, rule: FactorRule) -> Dims:
        operands = [
            (self.specs[v] or (), v not in self.free) if v >= 0 else ((), False)
            for v in op.inputs
        ]
        return self.wants.op_axes(op, rule, operands)

    def _link_axes(self, op: Op, rule: FactorRule) -> Dims:
        """A loop takes values as they come in, and as they must go on or go out."""
        source, target = op.inputs[0], op.outputs[0]
        kind = op.params["kind"]
        if kind in _INWARDS or (kind == "carry_in" and source in self.stored):
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
            if wanted is None:
                stored = source in self.stored
                wanted = natural if stored else self.wants.value_dims(target, natural)
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
            if value < 0 or value in self.free or (given is None and not dims):
                continue
            needed = spec_of(dims, axes) if given is None else given
            if role is not None and role.whole == k:
                needed = self._end_of(role)
            spec = self.specs[value]
            assert spec is not None
            if needed != spec:
                reshards.append((k, False, spec, (), needed))
            elif rule.op_kind == "scatter" and any(needed):
                # Else the partitioner shards the updates as it shards the result,
                # and moves them instead of the much smaller partial sums.
                pins.append(f"in{k}")
        return reshards

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
