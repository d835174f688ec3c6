"""Time of collectives for many meshes of one cluster at once.

Devices are laid out row-major, by default in the order of `AXES`, so that the last axis
is innermost. What a group of them takes is said by `autoshard.cost.network`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from autoshard.cost.network import Fabric, Group, Vector, prepare
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import Cluster

if TYPE_CHECKING:
    from autoshard.cost.placement import Placements

Rows = np.ndarray[Any, np.dtype[np.int64]]
"""Indices of candidates."""


@dataclass
class Meshes:
    """Candidate meshes as one array.

    Attributes:
        cluster: Where they are.
        sizes: int64[candidate, axis], in the order of `AXES`.
        orders: int64[candidate, place], which axis comes at each place, the outermost
            first; None where all have the order of `AXES`.
        anywhere: Places that axes may have, where the order is open: every collective
            then takes what it takes at its own best place, or less. Of these are the
            meshes; None where the order is known.
    """

    cluster: Cluster
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    orders: Rows | None = None
    anywhere: Placements | None = None
    _products: dict[frozenset[str], Vector] = field(default_factory=dict)
    _groups: dict[frozenset[str], Group] = field(default_factory=dict)
    _times: dict[tuple[str, frozenset[str]], Callable[[Vector], Vector]] = field(
        default_factory=dict
    )

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def by_active(self) -> list[tuple[frozenset[str], Rows]]:
        """The candidates by the axes of which they have several devices."""
        bits = (self.sizes > 1) @ (1 << np.arange(len(AXES)))
        return [
            (
                frozenset(a for k, a in enumerate(AXES) if pattern >> k & 1),
                np.flatnonzero(bits == pattern),
            )
            for pattern in np.flatnonzero(np.bincount(bits)).tolist()
        ]

    def take(self, rows: Rows) -> Meshes:
        """Some of the candidates."""
        orders = None if self.orders is None else self.orders[rows]
        return Meshes(self.cluster, self.sizes[rows], orders, self.anywhere)

    @property
    def canonical(self) -> bool:
        """Whether all have the order of `AXES`."""
        return self.orders is None or bool((np.diff(self.orders, axis=1) > 0).all())

    def free(self, anywhere: Placements) -> Meshes:
        """The same candidates with their order open."""
        return Meshes(
            self.cluster, self.sizes, anywhere=anywhere, _products=self._products
        )

    @cached_property
    def strides(self) -> Vector:
        """Devices from one member of an axis to the next, float64[axis, candidate]."""
        sizes = self.sizes
        if self.orders is not None:
            sizes = np.take_along_axis(sizes, self.orders, axis=1)
        inside = np.ones((len(AXES), len(sizes)))
        np.cumprod(sizes.T[:0:-1], axis=0, out=inside[1:])
        if self.orders is None:
            return inside[::-1]
        found = np.empty_like(inside)
        np.put_along_axis(found, self.orders.T, inside[::-1], axis=0)
        return found

    @cached_property
    def fabric(self) -> Fabric:
        """Figures of the cluster's network."""
        return Fabric.of(self.cluster)

    def product(self, axes: frozenset[str]) -> Vector:
        """Product of the sizes of some axes, per candidate."""
        found = self._products.get(axes)
        if found is None:
            columns = [AXES.index(a) for a in axes]
            found = self.sizes[:, columns].prod(axis=1).astype(np.float64)
            self._products[axes] = found
        return found

    def _spans(self, axes: frozenset[str], period: int) -> tuple[Vector, Vector]:
        """Members of each group within one run of `period` devices, and their reach.

        The reach is the devices from one end of these members to the other, those of
        other groups included.
        """
        inside = np.ones(len(self.sizes))
        reach = np.ones(len(self.sizes))
        for axis in sorted(axes, key=AXES.index):
            stride = self.strides[AXES.index(axis)]
            within = self._within(axis, period)
            inside *= within
            reach = np.where(within > 1, np.maximum(reach, stride * within), reach)
        return inside, reach

    def _within(self, axis: str, period: int) -> Vector:
        """Members of one axis within one run of `period` devices."""
        k = AXES.index(axis)
        return np.clip(np.minimum(self.sizes[:, k], period / self.strides[k]), 1, None)

    def levels(self) -> np.ndarray[Any, Any]:
        """What the network sees of each candidate's order, float64[candidate, figure].

        Of GPUs the members of each axis in a node, on a torus the strides of the axes
        of several devices.
        """
        if self.cluster.kind == "gpu":
            period = self.cluster.chips_per_node
            return np.array([self._within(axis, period) for axis in AXES]).T
        return np.where(self.sizes > 1, self.strides.T, 1.0)

    def group(self, axes: frozenset[str]) -> Group:
        """Who takes part in a collective over some axes, per candidate."""
        if axes not in self._groups:
            of_kind = {"gpu": self._in_nodes, "tpu": self._in_torus}
            find = of_kind.get(self.cluster.kind)
            found = find(axes) if find else Group(inside=self.product(axes))
            self._groups[axes] = found
        return self._groups[axes]

    def _in_nodes(self, axes: frozenset[str]) -> Group:
        total = self.product(axes)
        inside = np.minimum(self._spans(axes, self.cluster.chips_per_node)[0], total)
        return Group(inside=inside, outside=total / inside)

    def _in_torus(self, axes: frozenset[str]) -> Group:
        """Members along each dim: a closed ring where they go all the way round it."""
        cluster = self.cluster
        links, hops, crossing = (np.zeros(len(self.sizes)) for _ in range(3))
        stride = np.ones(len(self.sizes))
        period = 1
        below = np.ones(len(self.sizes))
        for size, closed in reversed(
            list(zip(cluster.shape, cluster.rings, strict=True))
        ):
            start, period = period, period * size
            inside, reach = self._spans(axes, period)
            along = inside / below
            # Devices of the dim from the first member to the last; groups that lie in
            # between pass over the same links.
            extent = np.maximum(np.where(along > 1, reach / start, 1.0), along)
            apart = extent / along
            ring = closed & (extent >= size) & (size > 2)
            links += np.where(along > 1, (1.0 + ring) / apart, 0.0)
            # Round a ring both ways at once, half of it is the farthest.
            hops += np.where(ring, np.floor(along / 2), along - 1) * apart
            load = along / np.where(ring, 8.0, 4.0) * apart
            crossing = np.where(along > 1, np.maximum(crossing, load), crossing)
            stride = np.maximum(stride, apart)
            below = inside
        links = np.where(links > 0, links, 1.0)
        return Group(self.product(axes), 1.0, links, hops, crossing, stride)

    def time_s(self, kind: str, axes: frozenset[str], bytes_: Vector) -> Vector:
        """Seconds of one run of a collective, per candidate.

        Args:
            kind: One of `network.KINDS`; or `slice`, which moves nothing.
            axes: Mesh axes it runs over; of size one they cost nothing.
            bytes_: Bytes of the large buffer on one device.
        """
        if kind == "slice":
            return np.zeros(len(self.sizes))
        if (kind, axes) not in self._times:
            group, *others = self._ways(axes)
            found = prepare(kind, group, self.fabric, *others)
            self._times[kind, axes] = found
        return self._times[kind, axes](bytes_)

    def _ways(self, axes: frozenset[str]) -> list[Group]:
        """The group of some axes; several where their place is open."""
        if self.anywhere is None:
            return [self.group(axes)]
        total = self.product(axes)
        found = []
        for group in self.anywhere.groups(axes):
            of = {
                f.name: value[self._places]
                for f in fields(group)
                if isinstance(value := getattr(group, f.name), np.ndarray)
            }
            if "inside" in of:
                found.append(replace(group, **of, outside=total / of["inside"]))
            else:
                found.append(replace(group, **of, inside=total))
        return found

    @cached_property
    def _places(self) -> Rows:
        assert self.anywhere is not None
        return self.anywhere.rows(self.sizes)


def taken(found: Any, rows: Rows | slice) -> Any:
    """What was found for some of the candidates: `scattered` the other way round.

    >>> taken((np.arange(4), "same"), np.array([2]))
    (array([2]), 'same')
    """
    if isinstance(found, np.ndarray):
        return found[..., rows]
    if isinstance(found, tuple | list):
        return type(found)(taken(part, rows) for part in found)
    if is_dataclass(found) and not isinstance(found, type):
        parts = {f.name: taken(getattr(found, f.name), rows) for f in fields(found)}
        return replace(found, **parts)
    return found


def scattered(parts: Sequence[tuple[Rows, Any]], count: int) -> Any:
    """Puts together what was found for several groups of candidates.

    Args:
        parts: Which candidates each group has, and what was found for them: arrays
            whose last dim they are, in tuples, lists and dataclasses of the same form.
            What is neither is the same for all.
        count: Candidates of all groups.

    >>> groups = [(np.array([2]), np.array([0.5])), (np.array([0, 1]), np.zeros(2))]
    >>> scattered(groups, 3).tolist()
    [0.0, 0.0, 0.5]
    """
    _, like = parts[0]
    if isinstance(like, np.ndarray):
        whole = np.zeros((*like.shape[:-1], count), dtype=like.dtype)
        for rows, part in parts:
            whole[..., rows] = part
        return whole
    if isinstance(like, tuple | list):
        each = range(len(like))
        return type(like)(
            scattered([(rows, part[k]) for rows, part in parts], count) for k in each
        )
    if is_dataclass(like) and not isinstance(like, type):
        found = {
            f.name: scattered([(r, getattr(p, f.name)) for r, p in parts], count)
            for f in fields(like)
        }
        return replace(like, **found)
    return like
