"""Partial sums that are added before they are reduced: one collective for several.

The gradient of an activation that three weights read is a sum of three products, each
of which is a partial sum under tensor parallelism. Added first and reduced once, they
cost a third. The same holds wherever only products meet in additions: the sum stays
`unreduced` from the products to the last addition.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from autoshard.ir.program import Op, Program
from autoshard.plan.sharded import Delayed, DimClasses, Dims
from autoshard.propagate.project import factors_from, natural_dims, spec_of
from autoshard.propagate.wants import Wants

_ADDS = frozenset({"add", "add_any", "sub"})
_CARRIERS = frozenset({"neg", "reshape", "transpose", "copy"})
"""Linear ops of one operand that neither grow a value nor round it."""


@dataclass(frozen=True, slots=True)
class Role:
    """What an op does in a delayed sum.

    Attributes:
        axes: Axes over which its result is unreduced.
        last: Whether the sum is reduced after it.
        factor_axes: Axes per factor with which it runs.
        whole: Its operand that is no partial sum, or -1: it is added after the
            reduction, in the spec of the result.
        end: The value that the last op makes.
        natural: Spec of the partial sum there.
    """

    axes: tuple[str, ...]
    last: bool
    factor_axes: Dims
    whole: int
    end: int = field(compare=False)
    natural: Dims = field(compare=False)


@dataclass(frozen=True)
class Sums:
    """All delayed sums of a program: a role per op, and the sums themselves."""

    role: dict[int, Role] = field(default_factory=dict)
    delayed: tuple[Delayed, ...] = ()


@dataclass(frozen=True, slots=True)
class Tree:
    """Products that meet in additions.

    Attributes:
        roots: The products.
        rest: The other ops, in order of execution.
        whole: Per op that adds something else to the sum, the slot of that operand.
    """

    roots: tuple[int, ...]
    rest: tuple[int, ...]
    whole: tuple[tuple[int, int], ...] = ()


def trees(program: Program) -> list[Tree]:
    """All maximal trees of two products or more.

    Every value within is used once, by the next op of the tree, in the same region.
    """
    uses: Counter[int] = Counter(v for op in program.ops for v in op.inputs if v >= 0)
    uses.update(v for v in program.outputs if v >= 0)
    pending: dict[int, Tree] = {}

    def open_at(value: int, region: int) -> Tree | None:
        if uses[value] != 1:
            return None
        tree = pending.get(value)
        return tree if tree and program.values[value].region == region else None

    for op in program.ops:
        name = op.primitive
        if name == "dot_general":
            pending[op.outputs[0]] = Tree((op.index,), ())
        elif name in _CARRIERS:
            tree = open_at(op.inputs[0], op.region)
            if tree is not None and not tree.whole:
                del pending[op.inputs[0]]
                pending[op.outputs[0]] = Tree(tree.roots, (*tree.rest, op.index))
        elif name in _ADDS and min(op.inputs) >= 0 and op.inputs[0] != op.inputs[1]:
            a, b = (open_at(v, op.region) for v in op.inputs)
            tree = _added(program, op, a, b)
            if tree is not None:
                for value in op.inputs:
                    pending.pop(value, None)
                pending[op.outputs[0]] = tree
    found = []
    for tree in pending.values():
        rest, whole = list(tree.rest), dict(tree.whole)
        while rest and (
            program.ops[rest[-1]].primitive not in _ADDS or rest[-1] in whole
        ):
            # What follows the last partial sum works on the reduced one.
            whole.pop(rest.pop(), None)
        if rest:
            found.append(Tree(tree.roots, tuple(rest), tuple(whole.items())))
    return found


def _added(program: Program, op: Op, a: Tree | None, b: Tree | None) -> Tree | None:
    if a is not None and b is not None:
        if op.primitive == "sub" and (a.whole or b.whole):
            return None
        rest = tuple(sorted((*a.rest, *b.rest, op.index)))
        return Tree((*a.roots, *b.roots), rest, (*a.whole, *b.whole))
    tree, other = (a, 1) if a is not None else (b, 0)
    if tree is None or op.primitive == "sub":
        return None
    if program.values[op.inputs[other]].region != op.region:
        return None
    return Tree(tree.roots, (*tree.rest, op.index), (*tree.whole, (op.index, other)))


def find_sums(program: Program, classes: DimClasses, wants: Wants) -> Sums:
    """The sums that a layout leaves unreduced until the last addition.

    All products of a tree must have one factor that the same axes reduce, and all
    additions must meet equal specs; else each product is reduced by itself.
    """
    role: dict[int, Role] = {}
    delayed: list[Delayed] = []
    if not wants.strong and not classes.fixed.factors:
        return Sums()
    for tree in trees(program):
        found = _fit(program, classes, wants, tree)
        if found is not None:
            sum_, roles = found
            delayed.append(sum_)
            role.update(roles)
    return Sums(role, tuple(delayed))


def _fit(
    program: Program, classes: DimClasses, wants: Wants, tree: Tree
) -> tuple[Delayed, dict[int, Role]] | None:
    specs: dict[int, Dims] = {}
    factor_axes: dict[int, Dims] = {}
    split: list[int] = []
    pending: tuple[str, ...] = ()
    for index in tree.roots:
        op, rule = program.ops[index], classes.rules[index]
        axes = wants.op_axes(op, rule, [((), False) for _ in op.inputs])
        reduced = [f for f, k in enumerate(rule.kinds) if k == "reduce" and axes[f]]
        if len(reduced) != 1 or (pending and axes[reduced[0]] != pending):
            return None
        if op.outputs[0] in classes.fixed.dims:
            return None  # the user says how the product itself lies
        pending = axes[reduced[0]]
        split.append(reduced[0])
        factor_axes[index] = axes
        specs[op.outputs[0]] = natural_dims(rule, axes)[0]
    for index in tree.rest:
        op, rule = program.ops[index], classes.rules[index]
        partial = [k for k, v in enumerate(op.inputs) if v in specs]
        if len({specs[op.inputs[k]] for k in partial}) != 1:
            return None
        slot, spec = partial[0], specs[op.inputs[partial[0]]]
        axes = factors_from(rule, rule.operands[slot], spec)
        if spec_of(rule.operands[slot], axes) != spec:
            return None
        factor_axes[index] = axes
        specs[op.outputs[0]] = natural_dims(rule, axes)[0]
    last, whole = tree.rest[-1], dict(tree.whole)
    end = program.ops[last].outputs[0]
    roles = {
        index: Role(pending, index == last, axes, whole.get(index, -1), end, specs[end])
        for index, axes in factor_axes.items()
    }
    return Delayed(tree.roots, tree.rest, pending, tuple(split)), roles
