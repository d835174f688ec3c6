"""Where gradients take their storage spec: at the op that makes them.

A partial sum that is to be stored in pieces is scattered, not summed everywhere and cut
afterwards; so the spec in which a gradient is stored reaches back to its origin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from autoshard.ir.program import LINK, Op, Program
from autoshard.plan.sharded import Dims
from autoshard.propagate.project import factors_from, natural_dims, runs_with
from autoshard.rules import FactorRule


def gradient_targets(
    program: Program,
    rules: Sequence[FactorRule],
    stored: Mapping[int, Dims],
    *,
    gradient_dims: Callable[[Op], Dims],
    plain_dims: Callable[[int, Dims | None], Dims],
) -> dict[int, Dims]:
    """Specs of values on the way from what makes a gradient to where it is stored.

    Walks the ops backwards through point-by-point ops and links, from the marks of a
    `TrainStep` and from where optimizer state is met; stops at the first op of another
    kind, which is the one that makes the gradient.

    Args:
        program: The program.
        rules: Factor rule per op.
        stored: Spec of each input that is sharded beyond its compute spec.
        gradient_dims: Spec in which a marked gradient is stored.
        plain_dims: Spec a value has if nothing is asked of it.

    Returns:
        Spec per value, where it differs from the plain one.
    """
    targets: dict[int, Dims] = {}
    met = _optimizer_ops(program, rules, stored)
    inputs = set(program.inputs)
    for op, rule in zip(reversed(program.ops), reversed(rules), strict=True):
        if op.primitive == "autoshard_annotate" and op.params["role"]:
            targets.setdefault(op.inputs[0], gradient_dims(op))
            continue
        wanted = targets.get(op.outputs[0]) or met.get(op.index)
        if wanted is None or rule.op_kind not in ("elementwise", "move", "link"):
            continue
        if op.primitive == LINK and op.params["kind"] != "stack":
            continue  # what a loop carries has one spec, inside and out
        axes = factors_from(rule, rule.results[0], wanted)
        if natural_dims(rule, axes)[0] != wanted:
            continue
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            if value >= 0 and dims and value not in inputs:
                back = tuple(axes[dim[0]] if dim else () for dim in dims)
                targets.setdefault(value, back)
    return {v: dims for v, dims in targets.items() if dims != plain_dims(v, dims)}


def _optimizer_ops(
    program: Program, rules: Sequence[FactorRule], inputs: Mapping[int, Dims]
) -> dict[int, Dims]:
    """Ops that meet stored optimizer state, and the spec they run with.

    A function that marks its gradients says itself how they are stored, so for it this
    only matters beyond the mark.
    """
    stored = dict(inputs)
    found: dict[int, Dims] = {}
    for op, rule in zip(program.ops, rules, strict=True):
        if rule.op_kind not in ("elementwise", "link"):
            continue
        mine = [v for v in op.inputs if v in stored]
        if not mine:
            continue
        most = max(mine, key=lambda v: sum(len(d) for d in stored[v]))
        slot = op.inputs.index(most)
        if not runs_with(rule, slot, stored[most]):
            continue
        axes = factors_from(rule, rule.operands[slot], stored[most])
        natural = natural_dims(rule, axes)
        stored.update(zip(op.outputs, natural, strict=True))
        if rule.op_kind == "elementwise":
            found[op.index] = natural[0]
    return found
