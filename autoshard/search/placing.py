"""The orders of mesh axes that a strategy allows."""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import numpy as np

from autoshard.cost.collectives import Meshes, Rows
from autoshard.cost.placement import Placements, distinguishes
from autoshard.ir.mesh import AXES, arranged
from autoshard.plan.cluster import Cluster
from autoshard.plan.strategy import Strategy


@dataclass(frozen=True)
class Placing:
    """How candidates may be laid out.

    Attributes:
        cluster: Where.
        first: The order in which they are priced first, int64[place].
        hole: Whether others are allowed.
        anywhere: Where axes may lie then; None where no other order is, or where the
            network does not tell them apart.
    """

    cluster: Cluster
    first: Rows
    hole: bool
    anywhere: Placements | None

    @staticmethod
    def of(strategy: Strategy, cluster: Cluster, sizes: np.ndarray) -> Placing:
        """What a strategy allows for some meshes, int64[mesh, axis]."""
        order = strategy.order
        hole = order == "auto"
        axes = AXES if order == "auto" else arranged(order)
        several = hole and distinguishes(cluster)
        return Placing(
            cluster=cluster,
            first=np.array([AXES.index(axis) for axis in axes]),
            hole=hole,
            anywhere=Placements(cluster, sizes) if several else None,
        )

    @property
    def usual(self) -> Placing:
        """The same with the usual order alone: for attention with its keys in parts.

        How its devices group along an axis is known in that order, see `cost.context`.
        """
        return Placing(self.cluster, np.arange(len(AXES)), hole=False, anywhere=None)

    def orders(self, count: int) -> Rows:
        """The first order of so many candidates, int64[candidate, place]."""
        return np.broadcast_to(self.first, (count, len(AXES)))

    def meshes(self, sizes: np.ndarray) -> Meshes:
        """So many meshes in the first order, for bounds that hold in all of them."""
        return Meshes(self.cluster, sizes, self.orders(len(sizes)), self.anywhere)

    def alike(self, sizes: np.ndarray) -> int:
        """Orders of some meshes in which these are what they are in another one."""
        if not self.hole:
            return 0
        active, count = np.unique((sizes > 1).sum(axis=1), return_counts=True)
        pairs = zip(active.tolist(), count.tolist(), strict=True)
        whole = sum(factorial(axes) * n for axes, n in pairs)
        if self.anywhere is None:
            return whole - len(sizes)
        return whole - sum(len(found) for found in self._each(sizes))

    def others(self, sizes: np.ndarray) -> tuple[Rows, Rows]:
        """All other orders of some meshes that the network tells apart.

        Returns:
            Which mesh each is of, and the order: int64[order], int64[order, place].
        """
        return _listed([found[1:] for found in self._each(sizes)])

    def all_orders(self, sizes: np.ndarray) -> tuple[Rows, Rows]:
        """The same, with the first order of each."""
        return _listed(self._each(sizes))

    def _each(self, sizes: np.ndarray) -> list[Rows]:
        assert self.anywhere is not None
        return [self.anywhere.orders(row) for row in self.anywhere.rows(sizes).tolist()]


def _listed(each: list[Rows]) -> tuple[Rows, Rows]:
    rows = np.repeat(np.arange(len(each)), [len(found) for found in each])
    return rows, np.concatenate([*each, np.zeros((0, len(AXES)), dtype=np.int64)])
