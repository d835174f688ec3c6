"""Where mesh axes may lie: orders of the axes, and what the network makes of them.

Devices are laid out row-major, so the axis that comes last has its devices next to each
other. An order matters as far as the network has levels: the nodes of GPUs, the dims of
a torus. Kernels and memory are those of one device, whatever the order.

Of n axes with several devices there are n! orders. What a collective takes depends on
some axes alone, so that its best place can be found by itself: together such times
bound all orders from below.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

from autoshard.cost.collectives import Meshes, Rows, Vector
from autoshard.cost.network import Group
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import Cluster

Sizes = np.ndarray[Any, np.dtype[np.int64]]


def distinguishes(cluster: Cluster) -> bool:
    """Whether some order of axes may take longer than another.

    >>> from autoshard.plan.cluster import cluster
    >>> [distinguishes(cluster(c)) for c in ("h100:8", "h100:16", "v5e:2x4", "cpu:8")]
    [False, True, True, False]
    """
    if cluster.kind == "tpu":
        return cluster.num_chips > 1
    return cluster.kind == "gpu" and cluster.nodes > 1


@functools.cache
def orders_of(active: frozenset[str]) -> Rows:
    """All orders of some axes, int64[order, place], the canonical one first.

    The others stay where they are in the canonical order: they have one device each,
    and make no difference.

    >>> [[AXES[k] for k in row[-2:]] for row in orders_of(frozenset(AXES[-2:]))]
    [['context', 'tensor'], ['tensor', 'context']]
    """
    places = [k for k, axis in enumerate(AXES) if axis in active]
    found = np.tile(np.arange(len(AXES)), (len(list(_permuted(places))), 1))
    found[:, places] = list(_permuted(places))
    return found


def _permuted(places: list[int]) -> itertools.permutations[tuple[int, ...]]:
    return itertools.permutations(places)


@functools.cache
def _arrangements(active: frozenset[str], axes: frozenset[str]) -> Rows:
    """Orders of all active axes of which no two place `axes` alike.

    Where an axis lies depends on which ones are inside of it, not on their order.
    """
    inner = {AXES.index(axis) for axis in axes}
    kept: dict[Any, Any] = {}
    for row in orders_of(active):
        inside = {k: frozenset(row[at + 1 :]) for at, k in enumerate(row) if k in inner}
        kept.setdefault(tuple(sorted(inside.items())), row)
    return np.array(list(kept.values()))


class Placements:
    """Where the axes of some meshes may lie on a cluster.

    Args:
        cluster: Where.
        sizes: The meshes, int64[mesh, axis].
    """

    def __init__(self, cluster: Cluster, sizes: Sizes) -> None:
        self.cluster = cluster
        sizes = self._felt(sizes)
        self._values = np.unique(sizes)
        _, first = np.unique(self._codes(sizes), return_index=True)
        self._sizes = sizes[first]
        self._sorted = self._codes(self._sizes)
        self._groups: dict[frozenset[str], list[Group]] = {}
        self._orders: dict[int, Rows] = {}

    def _felt(self, sizes: Sizes) -> Sizes:
        """As far as it matters: an axis that fills a node leaves no room in it."""
        if self.cluster.kind == "gpu":
            return np.minimum(sizes, self.cluster.chips_per_node)
        return sizes

    def _codes(self, sizes: Sizes) -> Sizes:
        digits = np.searchsorted(self._values, sizes)
        return digits @ len(self._values) ** np.arange(len(AXES))

    def rows(self, sizes: Sizes) -> Rows:
        """Where each of some of the meshes is found."""
        return np.searchsorted(self._sorted, self._codes(self._felt(sizes)))

    def groups(self, axes: frozenset[str]) -> list[Group]:
        """What takes part in a collective over some axes, by mesh: ways to be placed.

        The fastest of these groups is as fast as the fastest order lets it be, or
        faster. On GPUs they are those of all orders, with `inside` alone: in so many
        nodes more the group spans. On a torus there is one, which has the best of each
        figure that some order has: all times fall with `links`, and rise with `hops`,
        `crossing` and `stride`.
        """
        if axes not in self._groups:
            self._groups[axes] = self._found(axes)
        return self._groups[axes]

    def _found(self, axes: frozenset[str]) -> list[Group]:
        count = len(self._sizes)
        gpu = self.cluster.kind == "gpu"
        best = np.ones((4, count))
        inside: list[tuple[Rows, Vector]] = []
        for active, rows in Meshes(self.cluster, self._sizes).by_active:
            orders = _arrangements(active, axes & active)
            each = len(orders)
            meshes = Meshes(
                self.cluster,
                np.repeat(self._sizes[rows], each, axis=0),
                orders=np.tile(orders, (len(rows), 1)),
            )
            found = meshes.group(axes)
            if gpu:
                inside.append((rows, np.reshape(found.inside, (len(rows), each))))
                continue
            members = np.asarray(found.inside)
            hops = np.where(np.asarray(found.hops) > 0, found.hops, members - 1)
            crossing = np.where(
                np.asarray(found.crossing) > 0, found.crossing, members / 4
            )
            figures = np.array([-found.links, hops, crossing, found.stride])
            table = figures.reshape(4, len(rows), each)
            best[:, rows] = table.min(axis=2)
        if not gpu:
            links, hops, crossing, stride = best
            return [Group(1.0, 1.0, -links, hops, crossing, stride)]
        most = max(part.shape[1] for _, part in inside)
        ways = np.ones((count, most))
        for rows, part in inside:
            ways[rows] = np.pad(part, ((0, 0), (0, most - part.shape[1])), "edge")
        ways.sort(axis=1)
        rises = np.diff(ways, axis=1, prepend=ways[:, :1]) > 0
        rank = np.cumsum(rises, axis=1, dtype=np.int64)
        different = np.repeat(ways[:, -1:], rank.max() + 1, axis=1)
        np.put_along_axis(different, rank, ways, axis=1)
        return [Group(column) for column in different.T]

    def orders(self, row: int) -> Rows:
        """Orders of a mesh that the network tells apart, int64[order, place].

        The canonical one comes first, the others follow in the order of `AXES`. Two are
        one where every axis, and so every group, has the same members at each level.
        """
        if row not in self._orders:
            sizes = self._sizes[row : row + 1]
            orders = orders_of(
                frozenset(a for a, n in zip(AXES, sizes[0], strict=True) if n > 1)
            )
            meshes = Meshes(
                self.cluster, np.repeat(sizes, len(orders), axis=0), orders=orders
            )
            _, first = np.unique(meshes.levels(), axis=0, return_index=True)
            self._orders[row] = orders[np.sort(first)]
        return self._orders[row]
