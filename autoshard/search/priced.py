"""Candidates of one structure, priced together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from autoshard.cost import Pricer, Prices, Wish
from autoshard.cost.offload import Offload, host_room_bytes
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.stages import Cut
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import Cluster
from autoshard.plan.strategy import Strategy

STAGE = AXES.index("stage")


@dataclass(frozen=True)
class Candidates:
    """All candidates of one structure, priced.

    Attributes:
        strategy: The structure.
        propagated: What gives it propagated for all axes, and its pricer.
        sizes: Mesh sizes, int64[candidate, axis].
        cuts: Microbatches, int64[candidate].
        step_s: Seconds a step, float64[candidate].
        peak_bytes: Per chip, float64[candidate]; infinite where what is offloaded does
            not fit in the host's memory.
        offloads: What is in the host's memory, of those that were tried.
        offload: Which of them a candidate has, int64[candidate].
        host_bytes: Bytes per chip there, float64[candidate].
        staged: Cuts into stages, each of so many candidates, which come last: those
            before them have one stage. `(cut, candidates of it)`.
    """

    strategy: Strategy
    propagated: Callable[[], Pricer]
    sizes: np.ndarray
    cuts: np.ndarray
    step_s: np.ndarray
    peak_bytes: np.ndarray
    offloads: tuple[Offload, ...]
    offload: np.ndarray
    host_bytes: np.ndarray
    staged: tuple[tuple[Cut, np.ndarray], ...] = ()

    @property
    def pricer(self) -> Pricer:
        """What prices it where all its axes have several devices."""
        return self.propagated()

    def staging(self, k: int) -> tuple[Pipeline, tuple[int, ...]] | None:
        """How a candidate is cut: its pipeline and blocks; None with one stage."""
        at = k - (len(self.sizes) - sum(len(rows) for _, rows in self.staged))
        if at < 0:
            return None
        for cut, rows in self.staged:
            if at < len(rows):
                blocks = self.pricer.work.segments.blocks
                stages = self.mesh(k)["stage"]
                return cut.pipeline, cut.blocks_of(int(rows[at]), blocks, stages)
            at -= len(rows)
        raise AssertionError(k)

    @cached_property
    def pipelines(self) -> list[Pipeline | None]:
        """How stages take turns, per candidate; None with one stage."""
        staged = [cut.pipeline for cut, rows in self.staged for _ in rows]
        return [*[None] * (len(self.sizes) - len(staged)), *staged]

    @cached_property
    def remat(self) -> str:
        """What the backward pass recomputes."""
        return self.strategy.schedule.remat

    def mesh(self, k: int) -> dict[str, int]:
        """Size of every axis in a candidate."""
        return dict(zip(AXES, self.sizes[k].tolist(), strict=True))

    def filled(self, k: int) -> Strategy:
        """The strategy of a candidate, which has no holes."""
        sizes, staging = self.mesh(k), self.staging(k)
        schedule: dict[str, Any] = {"microbatches": int(self.cuts[k])}
        how, blocks = staging or (Pipeline(), ())
        schedule |= {"pipeline": how.schedule, "virtual": how.virtual}
        schedule |= {"vocab": how.vocab, "blocks": blocks}
        schedule |= {"offload": self.offloads[self.offload[k]]}
        return self.strategy.model_copy(
            update={
                "mesh": {axis: sizes[axis] for axis in self.strategy.mesh},
                "schedule": self.strategy.schedule.model_copy(update=schedule),
            }
        )

    def meets(self, key: str, value: Any) -> np.ndarray:
        """Which candidates have a field as it is fixed, bool[candidate].

        Args:
            key: As in `pinning.fixed_fields`.
            value: Of the field. Axes of one device make no difference.
        """
        section, _, name = key.partition(".")
        if key in AXES:
            return self.sizes[:, AXES.index(key)] == value
        if key == "microbatches":
            return self.cuts == value
        if key == "remat":
            return np.full(len(self.sizes), self.remat == value)
        if key == "offload":
            return np.array([some == value for some in self.offloads])[self.offload]
        if key in ("pipeline", "virtual", "vocab"):
            field = "schedule" if key == "pipeline" else key
            return np.array(
                [
                    value == getattr(how or Pipeline(), field)
                    # With one stage, parts and the vocabulary make no difference.
                    or (how is None and key != "pipeline")
                    for how in self.pipelines
                ],
                dtype=bool,
            )
        if section == "storage":
            axes = getattr(self.strategy.storage, name)
        else:
            [axes] = [r.axes for r in self.strategy.rules if r.logical == name]
        apart = frozenset() if axes == value else set(axes) ^ set(value) or set(axes)
        columns = [AXES.index(a) for a in sorted(apart)]
        return (self.sizes[:, columns] == 1).all(axis=1)

    def identity(self, k: int) -> Any:
        """What makes a candidate a truly different plan.

        Axes of one device do nothing, and another number of microbatches, or something
        else in the host's memory, is not by itself another plan.
        """
        sizes = self.mesh(k)

        def active(axes: Any) -> tuple[str, ...]:
            return tuple(a for a in axes if sizes[a] > 1)

        storage = self.strategy.storage
        return (
            tuple(self.sizes[k].tolist()),
            self.remat,
            tuple((r.logical, active(r.axes)) for r in self.strategy.rules),
            active(storage.params),
            active(storage.gradients),
            active(storage.optimizer),
        )


@dataclass
class Left:
    """Candidates that were left out while pricing.

    Attributes:
        uncut: They cannot be cut into their stages.
        slower: They are slower than a limit.
    """

    uncut: int = 0
    slower: int = 0


def price(
    propagated: Callable[[], Pricer],
    structure: Strategy,
    cluster: Cluster,
    parts: Sequence[tuple[Pricer, np.ndarray, np.ndarray]],
    wish: Wish,
) -> tuple[Candidates, Left]:
    """Prices candidates: those of one stage, then those of several.

    Args:
        propagated: What gives the structure propagated, and its pricer.
        structure: A strategy in which only sizes and microbatches are holes.
        cluster: Where.
        parts: What prices some candidates, their mesh sizes, int64[candidate, axis],
            and their microbatches, int64[candidate].
        wish: For what; without any pipelines, `stage` is an axis like any other.

    Returns:
        The candidates, and how many others were left out.
    """
    left, limit_s = Left(), wish.limit_s
    nothing, none = np.zeros(0), np.zeros(0, int)
    found = [(np.zeros((0, len(AXES)), int), none, nothing, nothing, none, nothing)]
    room = host_room_bytes(cluster) if any(wish.offloads) else 0.0

    def take(rows: np.ndarray, counts: np.ndarray, prices: Prices) -> np.ndarray:
        valid = prices.cut.valid if prices.cut else np.ones(len(rows), dtype=bool)
        first = prices.offload == wish.offloads[0]
        left.uncut += int((~valid).sum()) * first
        valid = valid if prices.wanted is None else valid & prices.wanted
        at = np.flatnonzero(valid & (prices.step_s <= limit_s))
        left.slower += int(valid.sum()) - len(at)
        host = prices.host_bytes[at]
        peaks = np.where(host <= room, prices.peak_bytes[at], np.inf)
        which = np.full(len(at), wish.offloads.index(prices.offload))
        found.append((rows[at], counts[at], prices.step_s[at], peaks, which, host))
        return at

    staged = []
    for several in (False, True):
        for by, sizes, cuts in parts:
            # Without pipelines all candidates are of one stage.
            mine = ((sizes[:, STAGE] > 1) & bool(wish.pipelines)) == several
            if not mine.any():
                continue
            rows, counts = sizes[mine], cuts[mine]
            own = wish if several else replace(wish, pipelines=())
            for prices in by.price_all(cluster, rows, counts.astype(float), own):
                at = take(rows, counts, prices)
                if prices.cut is not None:
                    staged.append((prices.cut, at))
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    kept, pieces, times, peaks, which, hosts = columns
    candidates = Candidates(
        strategy=structure,
        propagated=propagated,
        sizes=kept,
        cuts=pieces,
        step_s=times,
        peak_bytes=peaks,
        offloads=tuple(wish.offloads),
        offload=which,
        host_bytes=hosts,
        staged=tuple(staged),
    )
    return candidates, left
