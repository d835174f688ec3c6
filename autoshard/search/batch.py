"""Candidates that are priced together, in one order of their axes and in others.

What is in the host's memory makes a step only slower: those that fit without are not
priced with it. What it takes, and what it frees, is the same in every order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autoshard.cost import Pricer, Prices, Wish
from autoshard.cost.collectives import Rows, taken
from autoshard.cost.offload import Offload, host_room_bytes
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.stages import Cut
from autoshard.plan.cluster import Cluster
from autoshard.search.placing import Placing
from autoshard.search.watch import Watch

_TOGETHER = 2**12
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
        peak_bytes: Per chip; infinite where the host's memory is too small.
        context_heads: Devices of `context` that share heads, int64[candidate].
        host_bytes: Per chip, in the host's memory.
        offload: What is there.
        staged: How they are cut, and which candidates of the cut they are; None where
            they have one stage.
    """

    sizes: np.ndarray
    cuts: np.ndarray
    orders: Rows
    step_s: Vector
    peak_bytes: Vector
    context_heads: Rows
    host_bytes: Vector
    offload: Offload
    staged: tuple[Cut, Rows] | None


class Batch:
    """Candidates of one pricer, all of one stage or all of several.

    Args:
        pricer: What prices them.
        cluster: Where.
        sizes: Of their meshes, int64[candidate, axis].
        cuts: Their microbatches, int64[candidate].
        pipelines: How their stages may take turns; none where they have one.
        offloads: What may be in the host's memory.
        placing: How their axes may be laid out.
        watch: What is not wanted, and where it is counted.
        known: What they cost with something else there, for each pipeline; of the cuts
            only those that are valid are wanted.
        limit_s: Seconds a step that they must stay within; by default as the watch has
            it.
    """

    def __init__(
        self,
        pricer: Pricer,
        cluster: Cluster,
        sizes: np.ndarray,
        cuts: np.ndarray,
        pipelines: Sequence[Pipeline],
        offloads: Sequence[Offload],
        placing: Placing,
        watch: Watch,
        known: Sequence[Prices] = (),
        limit_s: float = float("inf"),
    ) -> None:
        self.pricer, self.cluster = pricer, cluster
        self.sizes, self.cuts = sizes, cuts
        self.placing, self.watch, self.known = placing, watch, known
        self.limit_s = min(limit_s, watch.step_s)
        self.wish = Wish(pipelines, offloads, self.limit_s, placing.anywhere)
        self.room = host_room_bytes(cluster) if any(offloads) else float("inf")
        self.kept: list[Kept] = []
        rows, orders = np.arange(len(sizes)), placing.orders(len(sizes))
        self.again = False
        if placing.anywhere is not None and len(sizes) <= _TOGETHER:
            others = placing.others(sizes)
            if len(others[0]) <= _TOGETHER:
                self._price_all(orders, *others)
                return
        self.again = placing.anywhere is not None
        self.first = self._priced(rows, orders, self.wish, known)
        self.least_s = [
            prices.step_s if prices.least_s is None else prices.least_s
            for prices in self.first
        ]
        for prices in self.first:
            self._keep(prices, rows, orders, prices.step_s <= self.limit_s)

    def _priced(
        self,
        rows: Rows,
        orders: Rows,
        wish: Wish,
        known: Sequence[Prices],
        same: Rows | None = None,
    ) -> list[Prices]:
        """Some of them in some order."""
        sizes, cuts = self.sizes[rows], self.cuts[rows].astype(float)
        found = self.pricer.price_all(
            self.cluster, sizes, cuts, wish, orders, known, same
        )
        return [
            replace(p, peak_bytes=self._fitting(p.peak_bytes, p.host_bytes))
            for p in found
        ]

    def _fitting(self, peak_bytes: Vector, host_bytes: Vector) -> Vector:
        """No chip is large enough where the host's memory is too small."""
        return np.where(host_bytes > self.room, np.inf, peak_bytes)

    def _price_all(self, orders: Rows, of_row: Rows, others: Rows) -> None:
        """Prices all orders at once, which for a few takes hardly longer than one."""
        self.watch.alike += self.placing.alike(self.sizes)
        count = len(self.sizes)
        of = np.concatenate([np.arange(count), of_row])
        orders = np.concatenate([orders, others])
        wish, known = replace(self.wish, anywhere=None), taken(self.known, of)
        self.first, self.least_s = [], []
        for prices in self._priced(of, orders, wish, known, same=of):
            wanted = prices.step_s <= self.limit_s
            better = prices.step_s < prices.step_s[of] * (1 - _ROUNDING)
            better[:count] = True
            self._keep(prices, of, orders, wanted & better)
            least_s = np.full(count, np.inf)
            np.minimum.at(least_s, of, prices.step_s)
            self.least_s.append(least_s)
            self.first.append(taken(prices, slice(count)))

    def _keep(self, prices: Prices, rows: Rows, orders: Rows, wanted: Any) -> None:
        valid = _valid(prices)
        at = np.flatnonzero(valid & wanted)
        if not self.known:  # where they were counted already
            self.watch.indivisible += int((~valid).sum())
        self.watch.pruned += int(valid.sum()) - len(at)
        self.kept.append(
            Kept(
                sizes=self.sizes[rows[at]],
                cuts=self.cuts[rows[at]],
                orders=orders[at],
                step_s=prices.step_s[at],
                peak_bytes=prices.peak_bytes[at],
                context_heads=prices.context_heads[at],
                host_bytes=prices.host_bytes[at],
                offload=prices.offload,
                staged=(prices.cut, at) if prices.cut else None,
            )
        )

    def offloaded(self, offloads: Sequence[Offload], limit_s: float) -> list[Batch]:
        """Those that need too much memory, with more in that of the host; or none.

        Args:
            offloads: What may be there.
            limit_s: Seconds a step that they must stay within.
        """
        tight = []
        for prices, least_s in zip(self.first, self.least_s, strict=True):
            may = _valid(prices) & (least_s <= limit_s)
            self._find_peaks(prices, np.flatnonzero(may))
            tight.append(may & ~(prices.peak_bytes <= self.watch.enough_bytes))
        rows = np.flatnonzero(np.any(tight, axis=0))
        if not offloads or not len(rows):
            return []
        known = [
            replace(prices, cut=prices.cut and replace(prices.cut, valid=own))
            for prices, own in zip(self.first, tight, strict=True)
        ]
        return [
            Batch(
                self.pricer,
                self.cluster,
                self.sizes[rows],
                self.cuts[rows],
                self.wish.pipelines,
                offloads,
                self.placing,
                self.watch,
                taken(known, rows),
                limit_s,
            )
        ]

    def reorder(self, limits_s: Sequence[Vector]) -> None:
        """Prices other orders of those that may be better in them.

        Args:
            limits_s: What they must stay within, for each way of taking turns.
        """
        may = np.zeros(len(self.sizes), dtype=bool)
        for prices, limit_s in zip(self.first, limits_s, strict=True):
            assert prices.least_s is not None
            # Memory is the same in every order, and NaN where it is not known yet.
            fits = ~(prices.peak_bytes > self.watch.bytes_)
            may |= _valid(prices) & fits & (prices.least_s <= limit_s)
        rows = np.flatnonzero(may)
        self.watch.alike += self.placing.alike(self.sizes[rows])
        of_row, orders = self.placing.others(self.sizes[rows])
        wish = replace(self.wish, anywhere=None, limit_s=-np.inf)
        ways = len(self.first) // len(wish.offloads)
        for start in range(0, len(orders), _TOGETHER):
            some = slice(start, start + _TOGETHER)
            at = rows[of_row[some]]
            known = taken(self.first[:ways], at)
            found = self._priced(at, orders[some], wish, known)
            for prices, first, limit_s in zip(found, self.first, limits_s, strict=True):
                better = prices.step_s < first.step_s[at] * (1 - _ROUNDING)
                wanted = better & (prices.step_s <= limit_s[at])
                self._find_peaks(first, at[wanted & _valid(prices)])
                peaks, hosts = first.peak_bytes[at], first.host_bytes[at]
                prices = replace(prices, peak_bytes=peaks, host_bytes=hosts)
                self._keep(prices, at, orders[some], wanted)

    def _find_peaks(self, first: Prices, rows: Rows) -> None:
        """Writes the memory of those that were too slow in their first order."""
        rows = np.unique(rows[np.isnan(first.peak_bytes[rows])])
        if len(rows):
            cuts, how = self.cuts[rows].astype(float), taken(first.cut, rows)
            peaks, hosts = self.pricer.memory_bytes(
                self.cluster, self.sizes[rows], cuts, how, first.offload
            )
            first.peak_bytes[rows] = self._fitting(peaks, hosts)
            first.host_bytes[rows] = hosts


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
    batches = [batch for batch in batches if batch.again]
    priced = [(b, p) for b in batches for p in b.first]
    if not priced:
        return
    limits_s = watch.limits_s(
        np.concatenate([b.sizes for b, _ in priced]),
        np.concatenate([p.step_s for _, p in priced]),
        np.concatenate([np.where(_valid(p), p.peak_bytes, np.inf) for _, p in priced]),
    )
    ends = np.cumsum([len(b.sizes) for b, _ in priced])
    each: Iterator[Vector] = iter(np.split(limits_s, ends[:-1]))
    for batch in batches:
        batch.reorder([next(each) for _ in batch.first])
