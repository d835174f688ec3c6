"""Where gradients take their storage spec: at the op that makes them.

A partial sum that is to be stored in pieces is scattered, not summed everywhere and cut
afterwards; so the spec in which a gradient is stored reaches back to its origin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from autoshard.ir.program import BARRIER, LINK, Op, Program
from autoshard.ir.train_step import UPDATE_SCOPE
from autoshard.plan.early import Early
from autoshard.plan.sharded import Dims
from autoshard.propagate.project import factors_from, natural_dims, runs_with, spec_of
from autoshard.rules import FactorRule


def gradient_targets(
    program: Program,
    rules: Sequence[FactorRule],
    early: Early,
    stored: Mapping[int, Dims],
    *,
    gradient_dims: Callable[[Op], Dims],
    plain_dims: Callable[[int, Dims | None], Dims],
) -> dict[int, Dims]:
    """Specs of values on the way from what makes a gradient to where it is stored.

    Walks the ops backwards through point-by-point ops and links, from the marks of a
    `TrainStep` and from where optimizer state is met; stops at the first op of another
    kind, which is the one that makes the gradient. What the passes of a `TrainStep` go
    on with is not on the way: how the batch is worked on does not hang on how gradients
    are stored.

    Args:
        program: The program.
        rules: Factor rule per op.
        early: What the passes go on with.
        stored: Spec of each input that is sharded beyond its compute spec.
        gradient_dims: Spec in which a marked gradient is stored.
        plain_dims: Spec a value has if nothing is asked of it.

    Returns:
        Spec per value, where it differs from the plain one.
    """
    targets: dict[int, Dims] = {}
    marked = any(_is_mark(op) for op in program.ops)
    ops = [op for op in program.ops if not marked or UPDATE_SCOPE in op.scope]
    met = _optimizer_ops(ops, rules, stored)
    leads = early.leads if marked else frozenset[int]()
    inputs = set(program.inputs)
    ways_back: dict[tuple[int, Dims], tuple[Dims, ...]] = {}

    def ask(value: int, dims: Dims) -> None:
        if value in leads:
            return
        have = targets.get(value)
        if have is None:
            if dims != plain_dims(value, dims):
                targets[value] = dims
        elif have != dims and dims != plain_dims(value, dims):
            # Of what several ops ask, the same is taken in whatever order they come.
            targets[value] = max(have, dims, key=_most)

    for op, rule in zip(reversed(program.ops), reversed(rules), strict=True):
        if _is_mark(op):
            ask(op.inputs[0], gradient_dims(op))
            continue
        wanted = targets.get(op.outputs[0]) if op.outputs else None
        wanted = wanted or met.get(op.index)
        if wanted is None or rule.op_kind not in ("elementwise", "move", "link"):
            continue
        if op.primitive == BARRIER:
            continue
        if op.primitive == LINK and op.params["kind"] != "stack":
            continue  # what a loop carries has one spec, inside and out
        key = (id(rule), wanted)
        back = ways_back.get(key)
        if back is None:
            back = ways_back[key] = _back(rule, wanted)
        for value, dims in zip(op.inputs, back, strict=False):
            if value >= 0 and dims and value not in inputs:
                ask(value, dims)
    return targets


def _is_mark(op: Op) -> bool:
    return op.primitive == "autoshard_annotate" and bool(op.params["role"])


def _most(dims: Dims) -> tuple[int, Dims]:
    return sum(len(dim) for dim in dims), dims


def _back(rule: FactorRule, wanted: Dims) -> tuple[Dims, ...]:
    """Specs of the operands of which the wanted result is made; none if it is not."""
    axes = factors_from(rule, rule.results[0], wanted)
    if natural_dims(rule, axes)[0] != wanted:
        return ()
    return tuple(spec_of(dims, axes) for dims in rule.operands)


def _optimizer_ops(
    ops: Iterable[Op], rules: Sequence[FactorRule], inputs: Mapping[int, Dims]
) -> dict[int, Dims]:
    """Ops that meet stored optimizer state, and the spec they run with.

    A function that marks its gradients says itself how they are stored, so for it this
    only matters beyond the mark.
    """
    stored = dict(inputs)
    ways_on: dict[tuple[int, int, Dims], list[Dims] | None] = {}
    found: dict[int, Dims] = {}
    for op in ops:
        rule = rules[op.index]
        if rule.op_kind not in ("elementwise", "link"):
            continue
        if op.primitive == BARRIER:
            # Each operand passes by itself, and meets nothing.
            pairs = zip(op.inputs, op.outputs, strict=True)
            stored.update({r: stored[v] for v, r in pairs if v in stored})
            continue
        mine = [v for v in op.inputs if v in stored]
        if not mine:
            continue
        most = mine[0]
        if len(mine) > 1:
            most = max(mine, key=lambda v: sum(len(d) for d in stored[v]))
        slot = op.inputs.index(most)
        key = (id(rule), slot, stored[most])
        if key not in ways_on:
            ways_on[key] = _on(rule, slot, stored[most])
        natural = ways_on[key]
        if natural is None:
            continue
        stored.update(zip(op.outputs, natural, strict=True))
        if rule.op_kind == "elementwise":
            found[op.index] = natural[0]
    return found


def _on(rule: FactorRule, slot: int, spec: Dims) -> list[Dims] | None:
    """Specs of the results, if the op can run with an operand as it is stored."""
    if not runs_with(rule, slot, spec):
        return None
    return natural_dims(rule, factors_from(rule, rule.operands[slot], spec))
