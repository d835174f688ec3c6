"""What candidates must be better than, and how many were left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Watch:
    """What candidates must be below to be priced, and how many were not.

    Attributes:
        best: How many of the best are wanted, each of another structure or mesh; where
            it is None, those that nothing beats in both time and memory.
        bytes_: Of a chip's memory.
        enough_bytes: Candidates that need no more are not tried with anything
            offloaded, which would only make them slower.
        step_s: Seconds a step; may be lowered between two structures.
        guess_s: Seconds in which there may be enough candidates; slower ones are not
            wanted, see `found_enough`.
        visited: Structures looked at.
        alike: Candidates that are what another one is: where two structures differ, the
            mesh has one device; or the network does not tell two orders apart.
        pruned: Candidates that a bound on their time ruled out, or on their memory in
            so little time. One that is ruled out in all orders of its axes counts once.
        indivisible: Candidates of which a dim does not divide.
        too_large: Candidates of which a bound on their memory does not fit.
    """

    best: int | None = None
    bytes_: float = float("inf")
    enough_bytes: float = 0.0
    step_s: float = float("inf")
    guess_s: float = float("inf")
    visited: int = 0
    alike: int = 0
    pruned: int = 0
    indivisible: int = 0
    too_large: int = 0
    _bests: list[float] = field(default_factory=list)
    _mixes: dict[object, float] = field(default_factory=dict)
    _front: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros((2, 0)))

    def __post_init__(self) -> None:
        self.step_s = min(self.step_s, self.guess_s)

    @property
    def found_enough(self) -> bool:
        """Whether the best were found, and not only none as fast as was guessed."""
        bests = self._all(self._bests)
        full = len(bests) == self.best and bests[-1] <= self.guess_s
        return full or self.guess_s == float("inf")

    def lets(self, floor_s: Vector) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which candidates bounds let through; the others are counted.

        Args:
            floor_s: Seconds a step takes at least; infinite where no chip is large
                enough, NaN where a dim does not divide.
        """
        divides, small = ~np.isnan(floor_s), floor_s < np.inf
        self.indivisible += int((~divides).sum())
        self.too_large += int((divides & ~small).sum())
        fast = small & (floor_s <= self.step_s)
        self.pruned += int((small & ~fast).sum())
        return fast

    def saw(self, sizes: np.ndarray, step_s: Vector, peak_bytes: Vector) -> None:
        """Notes the candidates of a structure.

        Args:
            sizes: Of their meshes, int64[candidate, axis].
            step_s: Seconds a step.
            peak_bytes: Per chip.
        """
        if self.best is None:
            self._front = self._front_with(step_s, peak_bytes)
            return
        self._bests = self._bests_with(sizes, step_s, peak_bytes)
        self.step_s = self._limit_s(self._all(self._bests))

    def saw_mix(self, identity: object, step_s: float) -> None:
        """Notes a mix that fits: several may be one plan, see `Candidates.identity`."""
        self._mixes[identity] = min(step_s, self._mixes.get(identity, step_s))
        self.step_s = self._limit_s(self._all(self._bests))

    def _all(self, bests: list[float]) -> list[float]:
        return sorted([*bests, *self._mixes.values()])[: self.best]

    @property
    def fastest_s(self) -> float:
        """Seconds of the best that fits; infinite if none was seen."""
        bests = self._all(self._bests)
        found = bests if self.best is not None else self._front[0].tolist()
        return min(found, default=float("inf"))

    def limit_s(self, sizes: np.ndarray, step_s: Vector, peak_bytes: Vector) -> float:
        """What candidates must be below, these being known beside those that were seen.

        Args:
            sizes: As in `saw`.
            step_s: As in `saw`.
            peak_bytes: As in `saw`.
        """
        if self.best is None:
            return self.step_s
        found = self._bests_with(sizes, step_s, peak_bytes)
        return self._limit_s(self._all(found))

    def limits_s(self, sizes: np.ndarray, step_s: Vector, peak_bytes: Vector) -> Vector:
        """What other orders of some candidates must stay within, float64[candidate].

        Args:
            sizes: As in `saw`.
            step_s: In the order in which they were priced.
            peak_bytes: In that order; NaN where it is not wanted.
        """
        if self.best is not None:
            return np.full(len(sizes), self.limit_s(sizes, step_s, peak_bytes))
        times, peaks = self._front_with(step_s, peak_bytes)
        # The fastest of those that are no larger.
        held = np.nan_to_num(peak_bytes, nan=np.inf)
        at = len(peaks) - np.searchsorted(peaks[::-1], held, side="right")
        return np.append(times, np.inf)[at]

    def _limit_s(self, bests: list[float]) -> float:
        full = self.best is not None and len(bests) == self.best
        return min(bests[-1] if full else float("inf"), self.guess_s)

    def _bests_with(
        self, sizes: np.ndarray, step_s: Vector, peak_bytes: Vector
    ) -> list[float]:
        fits = peak_bytes <= self.bytes_
        if not fits.any():
            return self._bests
        _, mesh = np.unique(sizes[fits], axis=0, return_inverse=True)
        fastest = np.full(mesh.max() + 1, np.inf)
        np.minimum.at(fastest, mesh, step_s[fits])
        return sorted([*self._bests, *fastest.tolist()])[: self.best]

    def _front_with(self, step_s: Vector, peak_bytes: Vector) -> np.ndarray:
        """Seconds in rising order and bytes in falling order of what nothing beats."""
        fits = peak_bytes <= self.bytes_
        both = np.concatenate([self._front, [step_s[fits], peak_bytes[fits]]], axis=1)
        both = both[:, np.lexsort((both[1], both[0]))]
        least = np.minimum.accumulate(both[1])
        return both[:, np.diff(least, prepend=np.inf) < 0]
