"""What candidates are priced for, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoshard.cost.collectives import Rows, Vector
from autoshard.cost.offload import Offload
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.placement import Placements
from autoshard.cost.stages import Cut, Kernels, Parts, StagedTime, Table


@dataclass(frozen=True, slots=True)
class Prices:
    """Costs per candidate, each a float64 vector.

    Attributes:
        matmul_s: Seconds in matrix products.
        other_s: Seconds in everything else a chip computes.
        collective_s: Seconds in collectives, as far as computation does not hide them.
        peak_bytes: Bytes per device at the peak.
        hidden_s: Seconds in collectives beside computation.
        host_bytes: Bytes per device in the host's memory, of the stage with most.
        context_heads: Devices of `context` that share the heads of attention,
            int64[candidate].
        bubble_s: Seconds in which the slowest stage of a pipeline waits for others.
        sent_s: Seconds in transfers between stages, as far as they show.
        cut: How they are cut into stages; None where they are not.
        slowest_share: What the slowest stage has, by place: [place, candidate].
        host_s: Seconds in transfers to and from the host, as far as they show.
        offload: What is in the host's memory.
        kernels: What a chip computes, all blocks on it; of several pipelines and sets
            of what is offloaded, which have it in common, the first has it.
        least_s: Seconds that a step takes at least, whatever the order of the axes;
            None where it is not open.
    """

    matmul_s: Vector
    other_s: Vector
    collective_s: Vector
    peak_bytes: Vector
    hidden_s: Vector
    host_bytes: Vector
    context_heads: Rows
    bubble_s: Vector | float = 0.0
    sent_s: Vector | float = 0.0
    cut: Cut | None = None
    slowest_share: Table | None = None
    host_s: Vector | float = 0.0
    offload: Offload = ()
    kernels: Kernels | None = None
    least_s: Vector | None = None

    @property
    def step_s(self) -> Vector:
        """Seconds per step."""
        work = self.matmul_s + self.other_s + self.collective_s
        return work + self.bubble_s + self.sent_s + self.host_s


@dataclass(frozen=True, slots=True)
class Wish:
    """What candidates are priced for.

    Attributes:
        pipelines: How stages may take turns; without any there is one stage.
        offloads: What may be kept in the host's memory.
        limit_s: Seconds above which memory is not wanted; it is NaN there.
        anywhere: Where axes may lie in other orders: then `least_s` is a bound over all
            of them.
    """

    pipelines: Sequence[Pipeline] = ()
    offloads: Sequence[Offload] = ((),)
    limit_s: float = float("inf")
    anywhere: Placements | None = None


@dataclass(frozen=True, slots=True)
class Alike:
    """Candidates that differ by the order of their axes alone.

    Attributes:
        first: The first of all that are alike, int64[base].
        of: Which of these each candidate is like, int64[candidate].
    """

    first: Rows
    of: Rows

    @staticmethod
    def of_same(same: Rows) -> Alike:
        """Those with the same number are alike."""
        _, first, of = np.unique(same, return_index=True, return_inverse=True)
        return Alike(first, of)

    @staticmethod
    def none(count: int) -> Alike:
        """So many of which none are."""
        return Alike(np.arange(count), np.arange(count))

    def any(self, wanted: np.ndarray) -> np.ndarray:
        """Of which some candidate is wanted, bool[base]."""
        found = np.zeros(len(self.first), dtype=bool)
        found[self.of[wanted]] = True
        return found


def of_one_stage(parts: Parts) -> Prices:
    """Prices of candidates that are not cut, but for their memory."""
    shown = parts.shown.sum(axis=0)
    unknown = np.full(len(shown), np.nan)
    return Prices(
        matmul_s=parts.matmul.sum(axis=0),
        other_s=parts.other.sum(axis=0),
        collective_s=shown,
        peak_bytes=unknown,
        hidden_s=parts.collective.sum(axis=0) - shown,
        host_bytes=unknown,
        context_heads=parts.context_heads,
        host_s=np.sum(parts.host + np.zeros_like(parts.matmul), axis=0),
    )


def of_stages(time: StagedTime, parts: Parts) -> Prices:
    """Prices of candidates that are cut into stages, but for their memory."""
    unknown = np.full(len(time.shown), np.nan)
    return Prices(
        matmul_s=time.matmul,
        other_s=time.other,
        collective_s=time.shown,
        peak_bytes=unknown,
        hidden_s=time.hidden,
        host_bytes=unknown,
        context_heads=parts.context_heads,
        bubble_s=time.bubble,
        sent_s=time.sent,
        slowest_share=time.share,
        host_s=time.host,
    )
