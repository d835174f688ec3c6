"""Dim classes: the sets of dims that want to be sharded alike.

Dims that share a factor in any op fall into one class (union-find over the factor
rules), in loops and across them. An annotation anywhere in a class names all of it.
The result does not depend on the order in which ops are visited.
"""

from __future__ import annotations

from autoshard.ir.program import Program
from autoshard.ir.trace import Traced
from autoshard.plan.sharded import LAYERS, DimClasses
from autoshard.propagate.roles import names_by_role
from autoshard.rules import rule_of


def find_classes(traced: Traced) -> DimClasses:
    """Finds and names the dim classes of a traced program.

    Raises:
        RuleMissingError: An op's primitive has no factor rule.
    """
    program = traced.program
    starts: list[int] = []
    total = 0
    for value in program.values:
        starts.append(total)
        total += len(value.shape)
    parent = list(range(total))

    def find(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    rules = tuple(rule_of(program, op) for op in program.ops)
    heads: list[list[int]] = []
    for op, rule in zip(program.ops, rules, strict=True):
        leads = [-1] * len(rule.sizes)
        slots = (
            *zip(op.inputs, rule.operands, strict=True),
            *zip(op.outputs, rule.results, strict=True),
        )
        for value, dims in slots:
            if value < 0:
                continue
            for d, dim in enumerate(dims):
                if not dim:
                    continue
                here = starts[value] + d
                factor = dim[0]
                if leads[factor] < 0:
                    leads[factor] = here
                else:
                    a, b = find(leads[factor]), find(here)
                    parent[max(a, b)] = min(a, b)
        heads.append(leads)

    of_value = tuple(
        tuple(find(start + d) for d in range(len(value.shape)))
        for start, value in zip(starts, program.values, strict=True)
    )
    of_factor = tuple(
        tuple(find(h) if h >= 0 else -1 for h in leads) for leads in heads
    )
    named = _names(traced, program, of_value)
    named.update(names_by_role(traced, rules, of_value, of_factor, named))
    return DimClasses(rules, of_value, of_factor, named)


def _names(
    traced: Traced, program: Program, of_value: tuple[tuple[int, ...], ...]
) -> dict[int, tuple[str, ...]]:
    names: dict[int, dict[str, None]] = {}

    def give(value: int, given: tuple[str | None, ...]) -> None:
        for cls, name, size in zip(
            of_value[value], given, program.values[value].shape, strict=True
        ):
            if name is not None and size > 1:
                names.setdefault(cls, {})[name] = None

    for value, info in zip(program.inputs, traced.inputs, strict=True):
        give(value, info.logical)
    for op in program.ops:
        if op.primitive == "autoshard_annotate" and op.params["names"] is not None:
            give(op.outputs[0], op.params["names"])
    for op in program.ops:
        if op.primitive == "link" and op.params["lead"]:
            outer = op.inputs[0] if op.params["kind"] == "slice" else op.outputs[0]
            if outer >= 0 and of_value[outer][0] not in names:
                names[of_value[outer][0]] = {LAYERS: None}
    return {cls: tuple(found) for cls, found in names.items()}
