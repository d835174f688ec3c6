"""Time of one collective, from the figures of a network and from who takes part.

Everything is an array with one element per candidate, or a scalar: either the figures
are those of one cluster and the groups differ (many meshes of one program), or every
candidate is on a cluster of its own.

A transfer of V bytes over a link of peak rate B takes `V / (B x efficiency) x ramp`.
`ramp` falls from 2 for small messages to 1 for large ones, half-way where a rank's
piece of the buffer is `half_bytes`: small messages are sent with a flag beside each
word of data (NCCL's LL protocol), at half of the rate, large ones without (Hu et al.
2025, arXiv:2507.04786, section on protocols). To this come `latency_s` per step and
`launch_s` once.

On GPUs an all-reduce is the fastest of (as NCCL chooses, src/graph/tuning.cc):

- ring: 2 (n - 1) steps; every link passes on 2 S (n - 1) / n bytes (Patarasuk and Yuan
  2009, doi:10.1016/j.jpdc.2008.09.002). Through several nodes there are as many rings,
  and network cards at work, as the group has members in each; all steps keep the pace
  of the slowest link;
- tree, which is hierarchical: a chain in each node and a double binary tree over the
  nodes (Sanders et al. 2009, doi:10.1016/j.parco.2009.09.001), 2 log2(nodes) steps of
  the network; the nodes of a tree send their buffer up and down, 2 S bytes;
- in the switch, where it can add (NVLink SHARP): S (n + 1) / n bytes leave and reach
  each chip, as every chip reads the sum of its piece and writes it to all.

All-gather and reduce-scatter are half of a ring. The parts of an exchange (all-to-all)
go straight to their receivers, one message to each node over each card (NCCL's PXN).

A network that many nodes share is slower than that of two nodes: `congestion` is the
exponent of that loss.

On a torus (TPU) the buffer is cut over the links that a group may use, both directions
of each closed dim (Chan et al. 2007, doi:10.1002/cpe.1206); an exchange is bound by
the busiest link of its dims. Slices are joined by a ring over the data-center network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from autoshard.plan.chip import Figure
from autoshard.plan.cluster import Cluster

Vector = np.ndarray[Any, np.dtype[np.float64]]
Figures = Vector | float

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute")

Way = tuple[Figures, Figures, Figures]
"""An algorithm: buffers over a chip's inner links, over its card, and the latency."""

TINY = float(np.finfo(np.float64).tiny)

LINK_EFFICIENCY = 0.8
"""Share of a link's peak taken where the chip's file has no `efficiency`: the least of
the rings inside of a node that were measured (H200 0.81, A100 0.78, B200 0.76;
github.com/stas00/ml-engineering, network/README.md), rounded."""


@dataclass(frozen=True, slots=True)
class Fabric:
    """Figures of a network, each a float or float64[candidate].

    Attributes:
        kind: "gpu", "tpu" or "cpu".
        chips_per_node: Chips on one node's inner links.
        inner_bytes_per_s: Peak of NVLink per chip, of one ICI link, or of the host; one
            direction.
        inner_latency_s: One step over it.
        outer_bytes_per_s: Peak of the network per chip; of the data-center network on
            TPUs. One direction.
        outer_latency_s: One step over it.
        inner_efficiency: Share of the peak that large messages reach.
        outer_efficiency: The same of the network between two nodes.
        inner_half_bytes: A rank's piece of the buffer at which the ramp is half-way.
        outer_half_bytes: The same of the network.
        switch_efficiency: Share of the inner peak at which the switch adds; 0 where it
            cannot.
        congestion: N > 2 nodes get (2 / N) ** congestion of the rate of two.
        launch_s: Time of a collective that moves nothing.

    >>> from autoshard.plan.cluster import cluster
    >>> Fabric.of(cluster("h100:64")).inner_bytes_per_s
    450000000000.0
    """

    kind: str
    chips_per_node: Figures
    inner_bytes_per_s: Figures
    inner_latency_s: Figures
    outer_bytes_per_s: Figures
    outer_latency_s: Figures
    inner_efficiency: Figures = LINK_EFFICIENCY
    outer_efficiency: Figures = LINK_EFFICIENCY
    inner_half_bytes: Figures = 0.0
    outer_half_bytes: Figures = 0.0
    switch_efficiency: Figures = 0.0
    congestion: Figures = 0.0
    launch_s: Figures = 0.0

    @classmethod
    def of(cls, cluster: Cluster) -> Self:
        """The figures of a cluster; those that its file lacks at their defaults."""
        inner, outer = cluster.links[0], cluster.links[-1]
        return cls(
            kind=cluster.kind,
            chips_per_node=float(cluster.chips_per_node),
            inner_bytes_per_s=inner.bytes_per_s.value,
            inner_latency_s=inner.latency_s.value,
            outer_bytes_per_s=outer.bytes_per_s.value,
            outer_latency_s=outer.latency_s.value,
            inner_efficiency=_value(inner.efficiency, LINK_EFFICIENCY),
            outer_efficiency=_value(outer.efficiency, LINK_EFFICIENCY),
            inner_half_bytes=_value(inner.half_bytes, 0.0),
            outer_half_bytes=_value(outer.half_bytes, 0.0),
            switch_efficiency=_value(inner.switch_efficiency, 0.0),
            congestion=_value(outer.congestion, 0.0),
            launch_s=_value(inner.launch_s, 0.0),
        )

    def as_torus(self) -> Self:
        """The same figures, read as those of a torus."""
        return replace(self, kind="tpu")


def _value(figure: Figure | None, otherwise: float) -> float:
    return otherwise if figure is None else figure.value


@dataclass(frozen=True, slots=True)
class Group:
    """Who takes part in a collective, each a float or float64[candidate].

    Attributes:
        inside: Members in one node (gpu), in one slice (tpu), in all (cpu).
        outside: Nodes (gpu) or slices (tpu) that the group spans.
        links: tpu: ICI links that a member may use at once: two per closed dim, one per
            open dim, each divided by the groups that lie between each other along the
            dim and pass over the same links.
        hops: tpu: links from one end to the other, along all dims; taken as
            `inside - 1` where it is 0.
        crossing: tpu: buffers that cross the busiest link in an exchange: the most, of
            all dims, of n / 8 (closed) and n / 4 (open) for n members along the dim,
            times the groups between each other; taken as that of an open line where it
            is 0.
        stride: tpu: links between a member and the next, which as many groups share.
        sharers: Collectives that run at the same time over the same links, this one
            included.

    >>> Group(inside=8.0, outside=2.0).members
    16.0
    """

    inside: Figures
    outside: Figures = 1.0
    links: Figures = 1.0
    hops: Figures = 0.0
    crossing: Figures = 0.0
    stride: Figures = 1.0
    sharers: Figures = 1.0

    @property
    def members(self) -> Figures:
        """How many take part."""
        return self.inside * self.outside

    @classmethod
    def strided(cls, fabric: Fabric, members: Figures, stride: Figures = 1.0) -> Self:
        """The group of a mesh axis, or of neighbouring axes, laid out row-major.

        Args:
            fabric: Where it is; on a TPU the group is a line of one slice.
            members: Size of the axis.
            stride: Devices from one member to the next: the product of the axes inside
                of it.

        >>> from autoshard.plan.cluster import cluster
        >>> group = Group.strided(Fabric.of(cluster("h100:64")), 16.0, stride=4.0)
        >>> float(group.inside), float(group.outside)
        (2.0, 8.0)
        """
        members = np.asarray(members, dtype=np.float64)
        if fabric.kind != "gpu":
            return cls(inside=members)
        inside = np.minimum(np.maximum(fabric.chips_per_node / stride, 1.0), members)
        return cls(inside=inside, outside=members / inside)


def time_s(kind: str, bytes_: Figures, group: Group, fabric: Fabric) -> Vector:
    """Seconds of one run of a collective that overlaps with nothing.

    Args:
        kind: One of `KINDS`. In a `permute` each member sends its buffer to one other.
        bytes_: Bytes of the larger side on one device: what an all-gather makes, a
            reduce-scatter takes, the others take and make.
        group: Who takes part.
        fabric: Over what.

    Returns:
        Seconds, of the shape that the arguments have together; 0 for a group of one.

    Raises:
        ValueError: The kind is none of `KINDS`.

    >>> fabric = Fabric("gpu", 8.0, 450e9, 0.0, 50e9, 0.0, inner_efficiency=1.0)
    >>> float(time_s("all_reduce", 450e9, Group(inside=4.0), fabric))
    1.5
    """
    return prepare(kind, group, fabric)(bytes_)


def prepare(
    kind: str, group: Group, fabric: Fabric, *others: Group
) -> Callable[[Figures], Vector]:
    """`time_s` of the bytes alone, for many collectives of one group.

    Args:
        kind: One of `KINDS`.
        group: Who takes part.
        fabric: Over what.
        *others: Other groups of as many members, if there is a choice: the time is that
            of the fastest.

    Returns:
        `bytes_ -> seconds`.

    Raises:
        ValueError: The kind is none of `KINDS`.

    >>> fabric = Fabric("gpu", 8.0, 4.0, 0.0, 1.0, 0.0, 1.0, 1.0)
    >>> shift = prepare("permute", Group(inside=8.0), fabric)
    >>> float(shift(8.0)), float(shift(16.0))
    (2.0, 4.0)
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no collective; there are {', '.join(KINDS)}")
    ways = _node_ways if fabric.kind == "gpu" else _torus_ways
    inner = group.sharers / (fabric.inner_bytes_per_s * fabric.inner_efficiency)
    outer = group.sharers / (fabric.outer_bytes_per_s * fabric.outer_efficiency)
    found = []
    for each in (group, *others):
        crowd = np.maximum(np.asarray(each.outside) / 2, 1.0) ** fabric.congestion
        of_group = [
            (np.asarray(near), np.asarray(far), np.asarray(latency) + fabric.launch_s)
            for near, far, latency in ways(kind, each, fabric)
        ]
        found.append((of_group, outer * crowd))
    members = np.asarray(group.members, dtype=np.float64)
    alone = members <= 1
    crosses = any(np.any(np.asarray(each.outside) > 1) for each in (group, *others))
    join = np.maximum if fabric.kind == "gpu" else np.add

    def seconds(bytes_: Figures) -> Vector:
        piece = bytes_ / members
        moved_in = bytes_ * inner * _ramp(piece, fabric.inner_half_bytes)
        ramp = _ramp(piece, fabric.outer_half_bytes) if crosses else 1.0
        times = []
        for of_group, crowded in found:
            moved_out = bytes_ * crowded * ramp if crosses else 0.0
            for near, far, latency in of_group:
                time = moved_in * near
                if crosses:
                    time = join(time, moved_out * far)
                times.append(time + latency)
        best = functools.reduce(np.minimum, times)
        return np.where(alone, 0.0, best)

    return seconds


def _ramp(piece: Vector, half_bytes: Figures) -> Vector:
    # The smallest positive float keeps 0 / 0 away, and is lost beside any piece.
    return 1.0 + half_bytes / (piece + half_bytes + TINY)


def _node_ways(kind: str, group: Group, fabric: Fabric) -> list[Way]:
    """Over the links in a node and the cards between nodes, which work side by side."""
    inside, outside = np.asarray(group.inside), np.asarray(group.outside)
    members = inside * outside
    near, far = fabric.inner_latency_s, fabric.outer_latency_s
    across = outside > 1
    if kind == "permute":
        # A hop that leaves the node has one card to itself.
        one = np.where(across, 1.0, 0.0)
        return [(1 - one, one, np.where(across, far, near))]
    if kind == "all_to_all":
        steps = (inside - 1) * near + (outside - 1) * far
        return [((inside - 1) / members, 1 - inside / members, steps)]
    share = (members - 1) / members
    # Of several rings, each leaves the node from another chip, over that chip's card.
    stays = np.where(across, (inside - 1) / inside, 1.0)
    cards = np.where(across, 1 / inside, 0.0)
    steps = (members - 1) * np.where(across, np.maximum(near, far), near)
    if kind != "all_reduce":
        return [(share * stays, share * cards, steps)]
    ring = (2 * share * stays, 2 * share * cards, 2 * steps)
    chain = 2 * (inside - 1) / inside
    switch = np.asarray(fabric.switch_efficiency, dtype=np.float64)
    adds = (switch > 0) & (inside > 1)
    slower = fabric.inner_efficiency / np.where(adds, switch, 1.0)
    in_switch = (inside + 1) / inside * slower
    node = np.where(adds, np.minimum(chain, in_switch), chain)
    # Between two nodes each is a root once and a leaf once, and sends but S bytes.
    sent = np.where(outside > 2, 2.0, 1.0) * cards
    levels = np.ceil(np.log2(outside))
    tree = (node, sent, 2 * ((inside - 1) * near + levels * far))
    return [ring, tree]


def _torus_ways(kind: str, group: Group, fabric: Fabric) -> list[Way]:
    """Over neighbour links, then between slices over the data-center network."""
    inside, outside = np.asarray(group.inside), np.asarray(group.outside)
    hops = np.where(np.asarray(group.hops) > 0, group.hops, inside - 1)
    steps = hops * fabric.inner_latency_s + (outside - 1) * fabric.outer_latency_s
    if kind == "permute":
        one = np.where(outside > 1, 1.0, 0.0)
        near = fabric.inner_latency_s * np.asarray(group.stride)
        step = np.where(outside > 1, fabric.outer_latency_s, near)
        return [((1 - one) * group.stride, one, step)]
    if kind == "all_to_all":
        # Devices of one host copy from any other.
        line = inside / 4 if fabric.kind == "tpu" else (inside - 1) / inside
        crossing = np.where(np.asarray(group.crossing) > 0, group.crossing, line)
        within = np.where(inside > 1, crossing / outside, 0.0)
        return [(within, 1 - 1 / outside, steps)]
    # Within slices on the whole buffer, between them on each member's piece of it.
    within = (inside - 1) / inside / group.links
    between = (outside - 1) / outside / inside
    times = 2 if kind == "all_reduce" else 1
    return [(times * within, times * between, times * steps)]
