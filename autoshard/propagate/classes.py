"""Dim classes: the sets of dims that want to be sharded alike.

Dims that share a factor in any op fall into one class (connected components over the
factor rules), in loops and across them. An annotation anywhere in a class names all of
it. The result does not depend on the order in which ops are visited.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from autoshard.ir.program import LINK, Program
from autoshard.ir.trace import Traced
from autoshard.plan.early import made_first
from autoshard.plan.ragged import Ragged
from autoshard.plan.sharded import LAYERS, DimClasses
from autoshard.propagate.fixed import fix
from autoshard.propagate.roles import names_by_role
from autoshard.rules import FactorRule, rules_of

Ints = np.ndarray[Any, np.dtype[np.int64]]

Hint = tuple[str, str] | None
"""A name and where it comes from."""


def find_classes(
    traced: Traced,
    *,
    replicate: Iterable[str] = (),
    aliases: Mapping[str, str] | None = None,
    hints: Mapping[str, Sequence[Hint]] | None = None,
) -> DimClasses:
    """Finds and names the dim classes of a traced program.

    Args:
        traced: The program.
        replicate: Primitives without a rule that may be computed whole everywhere.
        aliases: Canonical axis per name the user gave a mesh axis, beyond the
            well-known ones.
        hints: Names found in another trace of the same step, per path and dim, for
            classes that nothing names here: what a dim is does not change with the
            number of microbatches, but the structure that tells may.

    Raises:
        RuleMissingError: An op's primitive has no factor rule.
        NameUnknownError: A mesh axis of an annotation is unknown.

    >>> import jax, jax.numpy as jnp
    >>> from autoshard.ir.trace import trace
    >>> x, w = jax.ShapeDtypeStruct((8, 4), "float32"), jnp.ones((4, 2))
    >>> classes = find_classes(trace(lambda w, x: x @ w, [w, x]))
    >>> classes.rules[0].text
    'i k, k j -> i j {i=8 j=2 k=4} reduce k'
    """
    program = traced.program
    opted = frozenset(replicate)
    rules = rules_of(
        program, opted, representative=traced.blocks.representative.tolist()
    )
    edges = DimGraph(program, rules)
    labels = edges.components(_replaced(traced))
    of_value = Ragged(labels, edges.starts)
    of_factor = edges.factor_classes(labels)
    names, origins, named_at = _names(traced, program, of_value)
    for value, info in zip(program.inputs, traced.inputs, strict=True):
        for cls, hint in zip(
            of_value[value], (hints or {}).get(info.path, ()), strict=False
        ):
            if hint is not None and cls not in names:
                names[cls] = (hint[0],)
                origins[cls, hint[0]] = hint[1]
    for cls, (name, origin) in names_by_role(
        traced, rules, of_value, of_factor, names
    ).items():
        names[cls] = (name,)
        origins[cls, name] = origin
    batch = {cls for cls, own in names.items() if "batch" in own}
    batched = tuple(any(cls in batch for cls in dims) for dims in of_value)
    return DimClasses(
        rules=rules,
        of_value=of_value,
        of_factor=of_factor,
        names=names,
        blocks=traced.blocks,
        origins=origins,
        named_at=tuple(named_at),
        fixed=fix(traced, rules, aliases or {}),
        replicated=tuple(
            op.index
            for op in (program.ops if opted else ())
            if rules[op.index].op_kind == "replicated"
        ),
        aliases=dict(aliases or {}),
        batched=batched,
        early=made_first(traced, rules, batched),
    )


class DimGraph:
    """Which dims of a program are tied, and by which op.

    Attributes:
        starts: Node of the first dim of each value, and at the end their number.
    """

    def __init__(self, program: Program, rules: tuple[FactorRule, ...]) -> None:
        self.program, self.rules = program, rules
        ranks = np.fromiter(
            (len(v.shape) for v in program.values), np.int64, len(program.values)
        )
        self.starts: Ints = np.concatenate([[0], np.cumsum(ranks)])
        # Ops of one rule and with literals at the same places are handled as arrays.
        grouped: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for op in program.ops:
            mask = 0
            for k, v in enumerate(op.inputs):
                if v < 0:
                    mask |= 1 << k
            grouped[id(rules[op.index]), mask, len(op.inputs)].append(op.index)
        self.groups = [
            (np.array(group, dtype=np.int64), *self._slots(group))
            for group in grouped.values()
        ]

    def _slots(self, group: list[int]) -> tuple[Ints, list[list[tuple[int, int]]]]:
        """The values of a group, int[op, slot], and per factor its dims."""
        ops = self.program.ops
        rule = self.rules[group[0]]
        values = np.array(
            [(*ops[i].inputs, *ops[i].outputs) for i in group], dtype=np.int64
        ).reshape(len(group), -1)
        places: list[list[tuple[int, int]]] = [[] for _ in rule.sizes]
        first = (*ops[group[0]].inputs, *ops[group[0]].outputs)
        for slot, dims in enumerate((*rule.operands, *rule.results)):
            if first[slot] < 0:
                continue
            for d, dim in enumerate(dims):
                if dim:
                    places[dim[0]].append((slot, d))
        return values, places

    def edges(self) -> tuple[Ints, Ints, Ints]:
        """`(node, node, op)` for every pair of dims that an op ties."""
        left, right, which = [], [], []
        for ops, values, places in self.groups:
            for dims in places:
                if len(dims) < 2:
                    continue
                (slot, d), *others = dims
                lead = self.starts[values[:, slot]] + d
                for other, e in others:
                    left.append(lead)
                    right.append(self.starts[values[:, other]] + e)
                    which.append(ops)
        if not left:
            none = np.zeros(0, np.int64)
            return none, none, none
        return np.concatenate(left), np.concatenate(right), np.concatenate(which)

    def components(self, alike: Sequence[tuple[int, int]] = ()) -> Ints:
        """Class per dim: the smallest node it is tied with.

        Args:
            alike: Pairs of values of which all dims are tied.
        """
        left, right, _ = self.edges()
        total = int(self.starts[-1])
        for a, b in alike:
            rank = np.arange(self.starts[a + 1] - self.starts[a])
            left = np.concatenate([left, self.starts[a] + rank])
            right = np.concatenate([right, self.starts[b] + rank])
        graph = coo_array(
            (np.ones(len(left), np.int8), (left, right)), shape=(total, total)
        )
        count, labels = connected_components(graph, directed=False)
        smallest = np.full(count, total, dtype=np.int64)
        np.minimum.at(smallest, labels, np.arange(total))
        return smallest[labels]

    def factor_classes(self, labels: Ints) -> Ragged:
        """Class per factor per op."""
        counts = np.fromiter(
            (len(rule.sizes) for rule in self.rules), np.int64, len(self.rules)
        )
        starts = np.concatenate([[0], np.cumsum(counts)])
        flat = np.full(int(starts[-1]), -1, dtype=np.int64)
        for ops, values, places in self.groups:
            begin = starts[ops]
            for f, dims in enumerate(places):
                if dims:
                    slot, d = dims[0]
                    flat[begin + f] = labels[self.starts[values[:, slot]] + d]
        return Ragged(flat, starts)


def _replaced(traced: Traced) -> list[tuple[int, int]]:
    """State that a step writes and never reads, and what it writes: no op ties them."""
    program = traced.program
    read = {value for op in program.ops for value in op.inputs}
    return [
        (program.inputs[source], value)
        for value, source in zip(program.outputs, traced.out_source, strict=True)
        if source >= 0 and value >= 0 and program.inputs[source] not in read
    ]


def _names(
    traced: Traced, program: Program, of_value: Ragged
) -> tuple[
    dict[int, tuple[str, ...]],
    dict[tuple[int, str], str],
    list[tuple[int, int, str, str]],
]:
    names: dict[int, dict[str, None]] = {}
    origins: dict[tuple[int, str], str] = {}
    at: list[tuple[int, int, str, str]] = []

    def give(value: int, given: tuple[str | None, ...], origin: str) -> None:
        for d, (cls, name, size) in enumerate(
            zip(of_value[value], given, program.values[value].shape, strict=True)
        ):
            if name is not None and size > 1:
                names.setdefault(cls, {})[name] = None
                origins.setdefault((cls, name), origin)
                at.append((value, d, name, origin))

    for value, info in zip(program.inputs, traced.inputs, strict=True):
        if any(info.logical):
            role = "role of" if info.state == "data" else "annotation of"
            give(value, info.logical, f"{role} {info.path}")
    lead = []
    for op in program.ops:
        if op.primitive == "autoshard_annotate" and op.params["names"] is not None:
            origin = f"{op.params['kind']} at {op.source or op.address}"
            give(op.outputs[0], op.params["names"], origin)
        elif op.primitive == LINK and op.params["lead"]:
            lead.append(op)
    for op in lead:
        outer = op.inputs[0] if op.params["kind"] == "slice" else op.outputs[0]
        cls = of_value[outer][0] if outer >= 0 else -1
        if outer >= 0 and cls not in names:
            names[cls] = {LAYERS: None}
            origins[cls, LAYERS] = f"the loop at {op.source or op.address}"
            at.append((outer, 0, LAYERS, origins[cls, LAYERS]))
    # By alphabet, not by appearance: the order of ops says nothing.
    return {cls: tuple(sorted(found)) for cls, found in names.items()}, origins, at
