"""Candidates of one structure, priced together."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autoshard.cost import Pricer
from autoshard.cost.context import ALL_GATHER, USP
from autoshard.cost.offload import Offload
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.stages import Cut
from autoshard.ir.mesh import AXES
from autoshard.ir.remat import policies_of
from autoshard.plan.cluster import Cluster
from autoshard.plan.strategy import Strategy
from autoshard.search.alike import Names, decided
from autoshard.search.batch import Batch, reorder
from autoshard.search.placing import Placing
from autoshard.search.watch import Watch

STAGE = AXES.index("stage")


@dataclass(frozen=True)
class Candidates:
    """All candidates of one structure, priced.

    Attributes:
        strategy: The structure.
        names: Of the classes of dims of its program.
        propagated: What gives it propagated for all axes, and its pricer.
        sizes: Mesh sizes, int64[candidate, axis].
        cuts: Microbatches, int64[candidate].
        orders: Which axis comes at each place, the outermost first, int64[candidate,
            place].
        step_s: Seconds a step, float64[candidate].
        peak_bytes: Per chip, float64[candidate]; infinite where what is offloaded does
            not fit in the host's memory.
        context_heads: Devices of `context` that share heads, int64[candidate].
        offloads: What may be in the host's memory.
        offload: Which of them a candidate has, int64[candidate].
        host_bytes: Bytes per chip there, float64[candidate].
        staged: Cuts into stages, each of so many candidates, which come last: those
            before them have one stage. `(cut, candidates of it)`.
    """

    strategy: Strategy
    names: Names
    propagated: Callable[[], Pricer]
    sizes: np.ndarray
    cuts: np.ndarray
    orders: np.ndarray
    step_s: np.ndarray
    peak_bytes: np.ndarray
    context_heads: np.ndarray
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

    @cached_property
    def context_kind(self) -> str:
        """What attention does where `context` has several devices."""
        return self.strategy.schedule.context_kind

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
        kind = self.context_kind if sizes["context"] > 1 else ALL_GATHER
        heads = int(self.context_heads[k]) if kind == USP else 0
        schedule |= {"context_kind": kind, "context_heads": heads}
        schedule |= {"offload": self.offloads[self.offload[k]]}
        order = [AXES[place] for place in self.orders[k].tolist()]
        return self.strategy.model_copy(
            update={
                "mesh": {axis: sizes[axis] for axis in self.strategy.mesh},
                "order": tuple(axis for axis in order if axis in self.strategy.mesh),
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
        if key == "context_kind":
            one = self.sizes[:, AXES.index("context")] == 1
            return np.where(one, value == ALL_GATHER, self.context_kind == value)
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
            if self._wants({name: value}) == self._wants({}):
                return np.full(len(self.sizes), True)
        named = sorted({*axes, *value})
        several = self.sizes[:, [AXES.index(a) for a in named]] > 1
        patterns, of = np.unique(several, axis=0, return_inverse=True)
        met = []
        for pattern in patterns.tolist():
            idle = {a for a, own in zip(named, pattern, strict=True) if not own}
            left = ([a for a in some if a not in idle] for some in (axes, value))
            met.append(operator.eq(*left))
        return np.array(met, dtype=bool)[of.reshape(-1)]

    def _wants(self, axes: Mapping[str, Any]) -> object:
        """What the rules want of the program, with other axes for some of them."""
        rules = [(r.logical, axes.get(r.logical, r.axes)) for r in self.strategy.rules]
        return decided(rules, self.names)

    def identity(self, k: int) -> Any:
        """What makes a candidate a truly different plan.

        Axes of one device do nothing, and another number of microbatches, another
        order of axes, something else in the host's memory, or other numbers of blocks
        in a mix of policies, is not by itself another plan.
        """
        sizes = self.mesh(k)

        def active(axes: Any) -> tuple[str, ...]:
            return tuple(a for a in axes if sizes[a] > 1)

        storage = self.strategy.storage
        return (
            tuple(self.sizes[k].tolist()),
            policies_of(self.remat),
            self.context_kind if sizes["context"] > 1 else ALL_GATHER,
            tuple((r.logical, active(r.axes)) for r in self.strategy.rules),
            active(storage.params),
            active(storage.gradients),
            active(storage.optimizer),
        )


def price(
    propagated: Callable[[], Pricer],
    structure: Strategy,
    names: Names,
    cluster: Cluster,
    parts: Sequence[tuple[Pricer, np.ndarray, np.ndarray]],
    pipelines: Sequence[Pipeline],
    offloads: tuple[Offload, ...],
    placing: Placing,
    watch: Watch,
) -> Candidates:
    """Prices candidates: those of one stage, then those of several.

    Each is priced in the first order of its axes with the first of what may be
    offloaded. Those that need too much memory are priced with the others of that; and
    all in those other orders in which they may be better than what is known by then.

    Args:
        propagated: What gives the structure propagated, and its pricer.
        structure: A strategy in which only sizes, microbatches and the order of axes
            are holes.
        names: Of the classes of dims of its program.
        cluster: Where.
        parts: What prices some candidates, their mesh sizes, int64[candidate, axis],
            and their microbatches, int64[candidate].
        pipelines: How the stages of those that have several may take turns; without
            any, `stage` is an axis like any other.
        offloads: What may be in the host's memory.
        placing: How axes may be laid out.
        watch: Slower ones than it says are not wanted; they are counted there.

    Returns:
        The candidates.
    """
    plain: list[Batch] = []
    staged: list[Batch] = []
    first, others = offloads[:1], offloads[1:]
    for pricer, sizes, cuts in parts:
        several = (sizes[:, STAGE] > 1) & bool(pipelines)
        for rows, batches, turns in (
            (~several, plain, ()),
            (several, staged, pipelines),
        ):
            if rows.any():
                own = sizes[rows], cuts[rows], turns, first, placing, watch
                batches.append(Batch(pricer, cluster, *own))
                if not others:
                    continue
                fitting = [kept for batch in (*plain, *staged) for kept in batch.kept]
                limit_s = watch.limit_s(
                    np.concatenate([k.sizes for k in fitting]),
                    np.concatenate([k.step_s for k in fitting]),
                    np.concatenate([k.peak_bytes for k in fitting]),
                )
                batches += batches[-1].offloaded(others, limit_s)
    every = [*plain, *staged]
    if placing.anywhere is None:
        watch.alike += sum(placing.alike(batch.sizes) for batch in every)
    else:
        reorder(every, watch)
    kept = [kept for batch in every for kept in batch.kept]
    none, axes = np.zeros(0), np.zeros((0, len(AXES)), dtype=np.int64)
    return Candidates(
        strategy=structure,
        names=names,
        propagated=propagated,
        sizes=np.concatenate([axes, *(k.sizes for k in kept)]),
        cuts=np.concatenate([none.astype(np.int64), *(k.cuts for k in kept)]),
        orders=np.concatenate([axes, *(k.orders for k in kept)]),
        step_s=np.concatenate([none, *(k.step_s for k in kept)]),
        peak_bytes=np.concatenate([none, *(k.peak_bytes for k in kept)]),
        context_heads=np.concatenate(
            [none.astype(np.int64), *(k.context_heads for k in kept)]
        ),
        offloads=offloads,
        offload=np.concatenate(
            [
                none.astype(np.int64),
                *(np.full(len(k.sizes), offloads.index(k.offload)) for k in kept),
            ]
        ),
        host_bytes=np.concatenate([none, *(k.host_bytes for k in kept)]),
        staged=tuple(k.staged for k in kept if k.staged),
    )
