"""Time of collectives on the link levels of a cluster, for many meshes at once.

Volumes are those of ring algorithms: an all-gather or reduce-scatter over n devices
moves (n - 1) / n of the large buffer through every device, an all-reduce twice that
(Thakur et al. 2005, doi:10.1177/1094342005051521). Devices are laid out row-major in
the order of `AXES`, so the last axis stays innermost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import Cluster

LINK_EFFICIENCY = 0.8
"""Share of a link's peak that large collectives reach: the bus bandwidths of about
360 of 450 GB/s in a node of H100s and 40 of 50 GB/s between nodes that public NCCL
tests print (github.com/stas00/ml-engineering, network/benchmarks)."""

Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Meshes:
    """Candidate meshes as one array.

    Attributes:
        cluster: Where they are.
        sizes: int64[candidate, axis], in the order of `AXES`.
    """

    cluster: Cluster
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    _products: dict[frozenset[str], Vector] = field(default_factory=dict)
    _links: dict[frozenset[str], tuple[Vector, Vector, Vector]] = field(
        default_factory=dict
    )

    def __len__(self) -> int:
        return len(self.sizes)

    def product(self, axes: frozenset[str]) -> Vector:
        """Product of the sizes of some axes, per candidate."""
        found = self._products.get(axes)
        if found is None:
            columns = [AXES.index(a) for a in axes]
            found = self.sizes[:, columns].prod(axis=1).astype(np.float64)
            self._products[axes] = found
        return found

    def _spans(self, axes: frozenset[str], period: int) -> Vector:
        """Members of each group that lie within one run of `period` devices."""
        inside = np.ones(len(self.sizes))
        stride = np.ones(len(self.sizes))
        for axis in reversed(AXES):
            size = self.sizes[:, AXES.index(axis)]
            if axis in axes:
                inside *= np.clip(np.minimum(size, period / stride), 1, None)
            stride = stride * size
        return inside

    def link(self, axes: frozenset[str]) -> tuple[Vector, Vector, Vector]:
        """`(bytes_per_s, latency_s, inner share)` of a ring over some axes.

        A group that leaves the node is a ring through several nodes, with as many
        network cards at work as it has members in a node. On a torus it may use both
        directions of every dim that it spans.
        """
        if axes not in self._links:
            self._links[axes] = self._link(axes)
        return self._links[axes]

    def _link(self, axes: frozenset[str]) -> tuple[Vector, Vector, Vector]:
        cluster = self.cluster
        total = self.product(axes)
        inner = cluster.links[0]
        bandwidth = inner.bytes_per_s.value
        if cluster.kind == "gpu":
            inside = np.minimum(self._spans(axes, cluster.chips_per_node), total)
            outside = total / inside
            net = cluster.links[1]
            rate = np.where(
                outside > 1,
                np.minimum(bandwidth, inside * net.bytes_per_s.value),
                bandwidth,
            )
            latency = (inside - 1) * inner.latency_s.value + np.ceil(
                np.log2(outside)
            ) * net.latency_s.value
            return rate * LINK_EFFICIENCY, latency, inside / total
        if cluster.kind == "tpu":
            rate = np.zeros(len(self.sizes))
            steps = np.zeros(len(self.sizes))
            period = 1
            for size, ring in reversed(
                list(zip(cluster.shape, cluster.rings, strict=True))
            ):
                below = self._spans(axes, period)
                period *= size
                along = self._spans(axes, period) / below
                rate += np.where(along > 1, bandwidth * (2.0 if ring else 1.0), 0.0)
                steps += along - 1
            rate = np.where(rate > 0, rate, bandwidth)
            return rate * LINK_EFFICIENCY, steps * inner.latency_s.value, np.ones(1)
        ones = np.ones(len(self.sizes))
        return (
            ones * bandwidth * LINK_EFFICIENCY,
            (total - 1) * inner.latency_s.value,
            ones,
        )

    def time_s(self, kind: str, axes: frozenset[str], bytes_: Vector) -> Vector:
        """Seconds of one run of a collective, per candidate.

        Args:
            kind: `all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all`,
                `permute` (each device sends its buffer to one other); `slice` moves
                nothing.
            axes: Mesh axes it runs over; of size one they cost nothing.
            bytes_: Bytes of the large buffer on one device.
        """
        if kind == "slice":
            return np.zeros(len(self.sizes))
        total = self.product(axes)
        rate, latency, inside = self.link(axes)
        volume = bytes_ * (total - 1) / total
        if kind == "permute":
            # One hop; the ring's latency counts all of them.
            time = bytes_ / rate + latency / np.maximum(total - 1, 1)
        elif kind == "all_reduce":
            time = 2 * (volume / rate + latency)
        elif kind == "all_to_all" and self.cluster.kind == "gpu":
            net = self.cluster.links[-1].bytes_per_s.value * LINK_EFFICIENCY
            node = self.cluster.links[0].bytes_per_s.value * LINK_EFFICIENCY
            time = (
                np.maximum(
                    bytes_ * (1 - inside) / net, bytes_ * (inside - 1 / total) / node
                )
                + latency
            )
        else:
            time = volume / rate + latency
        return np.where(total > 1, time, 0.0)
