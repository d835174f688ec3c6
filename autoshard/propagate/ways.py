"""Ways through a program, from dim to dim: the shortest one back to an origin.

Dims are nodes. Two are tied where an op that shards the factor they share has both of
them sharded by it, so that a step of a way is one op that really carries the axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, dijkstra

from autoshard.plan.sharded import Dims
from autoshard.propagate.classes import DimGraph, Ints

Flags = np.ndarray[Any, np.dtype[np.bool_]]

_FEW = 4
"""Operands of one factor up to which every pair of them may be an edge."""

_AGAINST = 16.0
"""Length of a step from a result to an operand, or from one operand to another; one
from an operand to a result has length 1."""


@dataclass(frozen=True, slots=True)
class Edges:
    """Pairs of dims.

    Attributes:
        left: A dim.
        right: Another one.
        shared: As bits, axes that both have and that the op shards their factor with.
        flows: Whether `right` is made of `left`.
    """

    left: Ints
    right: Ints
    shared: Ints
    flows: Flags

    def where(self, keep: Flags) -> Edges:
        """Some of them."""
        return Edges(
            self.left[keep], self.right[keep], self.shared[keep], self.flows[keep]
        )


@dataclass(frozen=True, slots=True)
class Way:
    """The way back of every dim.

    Attributes:
        before: The next dim towards the origin; the dim itself at an origin, and -1
            where there are no axes to follow.
        length: Of the whole way.
        root: The origin.
    """

    before: Ints
    length: np.ndarray[Any, np.dtype[np.float64]]
    root: Ints


def find_edges(
    graph: DimGraph,
    factor_axes: Sequence[Dims],
    bits_of: Mapping[tuple[str, ...], int],
    held: Ints,
) -> Edges:
    """Every pair of dims that an op ties, where it shards their factor.

    An operand is tied with the results; with another operand only where no result has
    the axes, as in a contraction.

    Args:
        graph: The dims of a program.
        factor_axes: Axes per factor per op.
        bits_of: The bits of a tuple of axes.
        held: int[dim], as bits the axes that shard it.
    """
    found: list[tuple[Ints, Ints, Ints, bool]] = []
    masks: dict[Dims, list[int]] = {}
    for group, values, places in graph.groups:
        rule = graph.rules[group[0]]
        if not rule.sizes:
            continue
        rows = []
        for i in group.tolist():
            axes = factor_axes[i]
            row = masks.get(axes)
            if row is None:
                row = masks[axes] = [bits_of[a] for a in axes]
            rows.append(row)
        used = np.array(rows, dtype=np.int64)
        for f, dims in enumerate(places):
            if len(dims) < 2 or not used[:, f].any():
                continue
            nodes = [graph.starts[values[:, slot]] + d for slot, d in dims]
            bits = [used[:, f] & held[n] for n in nodes]
            cut = sum(slot < len(rule.operands) for slot, _ in dims)
            made = np.zeros(len(group), dtype=np.int64)
            for r in range(cut, len(dims)):
                made |= bits[r]
                for o in range(cut):
                    found.append((nodes[o], nodes[r], bits[o] & bits[r], True))
            siblings = (
                combinations(range(cut), 2)
                if cut <= _FEW
                else ((0, other) for other in range(1, cut))
            )
            for o, p in siblings:
                both = np.where(made, 0, bits[o] & bits[p])
                found.append((nodes[o], nodes[p], both, False))
    if not found:
        none = np.zeros(0, np.int64)
        return Edges(none, none, none, none.astype(bool))
    kept = [np.flatnonzero(bits) for _, _, bits, _ in found]
    pairs = list(zip(found, kept, strict=True))
    left = np.concatenate([edge[0][some] for edge, some in pairs])
    right = np.concatenate([edge[1][some] for edge, some in pairs])
    shared = np.concatenate([edge[2][some] for edge, some in pairs])
    flows = np.repeat([edge[3] for edge in found], [len(some) for some in kept])
    return Edges(left, right, shared, flows)


def find_ways(edges: Edges, bits: Ints, tiers: Sequence[Flags]) -> Way:
    """The way of every dim back to the nearest origin.

    Args:
        edges: Steps that may be taken.
        bits: int[dim], nonzero where there are axes to follow.
        tiers: bool[dim] each: origins, the best kind first. Each connected part begins
            at the first kind that it has any of, and at its first dim if it has none.
    """
    total = len(bits)
    live = bits != 0
    left, right = edges.left, edges.right
    ties = coo_array((np.ones(len(left), np.int8), (left, right)), (total, total))
    count, part = connected_components(ties, directed=False)
    first = np.full(count, total, dtype=np.int64)
    np.minimum.at(first, part[live], np.flatnonzero(live))
    lead = np.zeros(total, dtype=bool)
    lead[first[first < total]] = True
    open_ = np.ones(count, dtype=bool)
    begins = np.zeros(total, dtype=bool)
    for tier in (*tiers, lead):
        here = live & tier & open_[part]
        begins |= here
        open_[part[here]] = False
    begin = np.flatnonzero(begins)
    matrix = _matrix(edges, begin, total)
    length, found = dijkstra(matrix, indices=total, return_predecessors=True)
    before = found[:-1].astype(np.int64)
    before[begin] = begin
    before[~live] = -1
    root = np.where(before < 0, np.arange(total), before)
    while True:
        farther = root[root]
        if np.array_equal(farther, root):
            return Way(before, length[:-1], root)
        root = farther


def _matrix(edges: Edges, begin: Ints, total: int) -> csr_array:
    """Lengths of all steps, and of those from one more node to every origin."""
    rows = np.concatenate([edges.left, edges.right, np.full(len(begin), total)])
    columns = np.concatenate([edges.right, edges.left, begin])
    lengths = np.concatenate(
        [
            np.where(edges.flows, 1.0, _AGAINST),
            np.full(len(edges.left), _AGAINST),
            np.ones(len(begin)),
        ]
    )
    # Of two edges between the same dims the shorter one counts, not their sum.
    order = np.lexsort((lengths, columns, rows))
    rows, columns, lengths = rows[order], columns[order], lengths[order]
    fresh = np.ones(len(rows), dtype=bool)
    fresh[1:] = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1])
    return csr_array(
        (lengths[fresh], (rows[fresh], columns[fresh])), shape=(total + 1, total + 1)
    )
