"""Candidates that are priced together, in one order of their axes and in others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoshard.cost import Pricer, Prices
from autoshard.cost.collectives import Rows
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.stages import Cut, Kernels
from autoshard.plan.cluster import Cluster
from autoshard.search.placing import Placing
from autoshard.search.watch import Watch

_TOGETHER = 2**16
"""Orders that are priced at once."""

_ROUNDING = 1e-12
"""Relative difference below which two orders take as long."""

Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Kept:
    """Priced candidates that are not left out.

    Attributes:
        sizes: Mesh sizes, int64[candidate, axis].
        cuts: Microbatches, int64[candidate].
        orders: Of the axes, int64[candidate, place].
        step_s: Seconds a step.
        peak_bytes: Per chip.
        staged: How they are cut, and which candidates of the cut they are; None where
            they have one stage.
    """

    sizes: np.ndarray
    cuts: np.ndarray
    orders: Rows
    step_s: Vector
    peak_bytes: Vector
    staged: tuple[Cut, Rows] | None


class Batch:
    """Candidates of one pricer, all of one stage or all of several.

    Args:
        pricer: What prices them.
        cluster: Where.
        sizes: Of their meshes, int64[candidate, axis].
        cuts: Their microbatches, int64[candidate].
        pipelines: How their stages may take turns; none where they have one.
        placing: How their axes may be laid out.
        watch: What is not wanted, and where it is counted.
    """

    def __init__(
        self,
        pricer: Pricer,
        cluster: Cluster,
        sizes: np.ndarray,
        cuts: np.ndarray,
        pipelines: Sequence[Pipeline],
        placing: Placing,
        watch: Watch,
    ) -> None:
        self.pricer, self.cluster = pricer, cluster
        self.sizes, self.cuts = sizes, cuts
        self.pipelines, self.placing, self.watch = pipelines, placing, watch
        self.kept: list[Kept] = []
        self.first = self._priced(
            np.arange(len(sizes)), placing.orders(len(sizes)), watch.step_s, None
        )
        for prices in self.first:
            rows, orders = np.arange(len(sizes)), placing.orders(len(sizes))
            wanted = prices.step_s <= watch.step_s
            self._keep(prices, rows, orders, prices.peak_bytes, wanted)

    def _priced(
        self, rows: Rows, orders: Rows, limit_s: float, kernels: Kernels | None
    ) -> list[Prices]:
        """Some of them in some order; again if their kernels are known."""
        given = self.cluster, self.sizes[rows], self.cuts[rows].astype(float)
        anywhere = None if kernels else self.placing.anywhere
        how = orders, anywhere, kernels
        if self.pipelines:
            return self.pricer.price_stages(*given, self.pipelines, limit_s, *how)
        return [self.pricer.price(*given, limit_s, *how)]

    def _keep(
        self, prices: Prices, rows: Rows, orders: Rows, peaks: Vector, wanted: Any
    ) -> None:
        valid = _valid(prices)
        at = np.flatnonzero(valid & wanted)
        self.watch.indivisible += int((~valid).sum())
        self.watch.pruned += int(valid.sum()) - len(at)
        self.kept.append(
            Kept(
                sizes=self.sizes[rows[at]],
                cuts=self.cuts[rows[at]],
                orders=orders[at],
                step_s=prices.step_s[at],
                peak_bytes=peaks[at],
                staged=(prices.cut, at) if prices.cut else None,
            )
        )

    def reorder(self, limits_s: Sequence[Vector]) -> None:
        """Prices other orders of those that may be better in them.

        Args:
            limits_s: What they must stay within, for each way of taking turns.
        """
        may = np.zeros(len(self.sizes), dtype=bool)
        for prices, limit_s in zip(self.first, limits_s, strict=True):
            assert prices.least_s is not None
            here = prices.least_s <= limit_s
            if not self.pipelines:  # memory is the same in every order
                here &= prices.peak_bytes <= self.watch.bytes_
            may |= here
        rows = np.flatnonzero(may)
        self.watch.alike += self.placing.alike(self.sizes[rows])
        of_row, orders = self.placing.others(self.sizes[rows])
        kernels = self.first[0].kernels
        assert kernels is not None
        for start in range(0, len(orders), _TOGETHER):
            some = slice(start, start + _TOGETHER)
            at = rows[of_row[some]]
            most = float(np.max([limit_s[at].max() for limit_s in limits_s]))
            found = self._priced(at, orders[some], most, kernels.take(at))
            for prices, first, limit_s in zip(found, self.first, limits_s, strict=True):
                before = np.where(_valid(first), first.step_s, np.inf)[at]
                peaks = prices.peak_bytes if self.pipelines else first.peak_bytes[at]
                better = prices.step_s < before * (1 - _ROUNDING)
                better |= ~(peaks >= first.peak_bytes[at])
                wanted = better & (prices.step_s <= limit_s[at])
                self._keep(prices, at, orders[some], peaks, wanted)


def _valid(prices: Prices) -> np.ndarray:
    """Which candidates can be cut into their stages."""
    if prices.cut is None:
        return np.ones(len(prices.step_s), dtype=bool)
    return prices.cut.valid


def reorder(batches: Sequence[Batch], watch: Watch) -> None:
    """Prices other orders of axes, as far as they may be better than what is known.

    Args:
        batches: Candidates of one structure, priced in their first order.
        watch: What is known of others.
    """
    priced = [(b, p) for b in batches for p in b.first]
    if not priced:
        return
    limits_s = watch.limits_s(
        np.concatenate([b.sizes for b, _ in priced]),
        np.concatenate([np.where(_valid(p), p.step_s, np.inf) for _, p in priced]),
        np.concatenate([p.peak_bytes for _, p in priced]),
    )
    ends = np.cumsum([len(b.sizes) for b, _ in priced])
    each: Iterator[Vector] = iter(np.split(limits_s, ends[:-1]))
    for batch in batches:
        batch.reorder([next(each) for _ in batch.first])
