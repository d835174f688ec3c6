"""What candidates cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from autoshard.cost.collectives import Rows, Vector
from autoshard.cost.stages import Cut, Kernels, Table


@dataclass(frozen=True, slots=True)
class Prices:
    """Costs per candidate, each a float64 vector.

    Attributes:
        matmul_s: Seconds in matrix products.
        other_s: Seconds in everything else a chip computes.
        collective_s: Seconds in collectives, as far as computation does not hide them.
        peak_bytes: Bytes per device at the peak.
        hidden_s: Seconds in collectives beside computation.
        bubble_s: Seconds in which the slowest stage of a pipeline waits for others.
        sent_s: Seconds in transfers between stages, as far as they show.
        cut: How they are cut into stages; None where they are not.
        slowest_share: What the slowest stage has, by place: [place, candidate].
        context_heads: Devices of `context` that share the heads of attention,
            int64[candidate].
        kernels: What a chip computes, all blocks on it; of several pipelines, which
            have it in common, the first has it.
        least_s: Seconds that a step takes at least, whatever the order of the axes;
            None where it is not open.
    """

    matmul_s: Vector
    other_s: Vector
    collective_s: Vector
    peak_bytes: Vector
    hidden_s: Vector
    context_heads: np.ndarray[Any, np.dtype[np.int64]]
    bubble_s: Vector | float = 0.0
    sent_s: Vector | float = 0.0
    cut: Cut | None = None
    slowest_share: Table | None = None
    kernels: Kernels | None = None
    least_s: Vector | None = None

    @property
    def step_s(self) -> Vector:
        """Seconds per step."""
        work = self.matmul_s + self.other_s + self.collective_s
        return work + self.bubble_s + self.sent_s


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
