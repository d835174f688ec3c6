"""How good predictions are: errors, ranking, regret, recall of what does not fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

GROUP_SIZE = 5
"""Fewest plans in a group whose ranking is looked at."""

GROUP_SPREAD = 0.10
"""Least difference of a group's slowest from its fastest; below it is noise."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Absolute relative errors of some predictions.

    Attributes:
        rows: How many.
        median: Of `abs(predicted / measured - 1)`.
        p90: Its 90th percentile.
        bias: Median of `predicted / measured - 1`.
    """

    rows: int
    median: float
    p90: float
    bias: float

    @classmethod
    def of(cls, predicted: Sequence[float], measured: Sequence[float]) -> Errors:
        """Errors of pairs; NaN where there are none.

        >>> Errors.of([1.1, 2.0, 3.0], [1.0, 2.0, 4.0]).median.__round__(3)
        0.1
        """
        if not len(predicted):
            return cls(0, float("nan"), float("nan"), float("nan"))
        error = np.asarray(predicted) / np.asarray(measured) - 1
        size = np.abs(error)
        return cls(
            len(error),
            float(np.median(size)),
            float(np.percentile(size, 90)),
            float(np.median(error)),
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Plans for one model and batch on one cluster, as measured and as predicted.

    Attributes:
        name: What they share.
        plans: How many.
        kendall: Rank correlation (tau-b) of predicted and measured times.
        regret: Time of the plan predicted fastest over that of the fastest, less 1.
    """

    name: tuple[Hashable, ...]
    plans: int
    kendall: float
    regret: float


def groups(
    names: Sequence[tuple[Hashable, ...]],
    predicted: Sequence[float],
    measured: Sequence[float],
) -> list[Group]:
    """Ranks plans within groups of `GROUP_SIZE` or more that differ enough.

    Args:
        names: Group of each row.
        predicted: Seconds per row.
        measured: Seconds per row.

    Returns:
        Groups, sorted by name.

    >>> rows = [("a",)] * 5
    >>> groups(rows, [1, 2, 3, 4, 5], [2, 1, 3, 4, 5])[0].regret
    1.0
    """
    from scipy.stats import kendalltau  # slow to import

    members: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        members[name].append(index)
    found = []
    for name, indices in members.items():
        times = np.asarray([measured[i] for i in indices], dtype=np.float64)
        guess = np.asarray([predicted[i] for i in indices], dtype=np.float64)
        if len(indices) < GROUP_SIZE or times.max() / times.min() < 1 + GROUP_SPREAD:
            continue
        tau = float(np.asarray(kendalltau(times, guess))[0])
        if np.isnan(tau):  # all predicted alike: nothing is ranked
            tau = 0.0
        regret = float(times[np.argmin(guess)] / times.min() - 1)
        found.append(Group(name, len(indices), tau, regret))
    return sorted(found, key=lambda g: str(g.name))


@dataclass(frozen=True, slots=True)
class Fits:
    """How well it is told what does not fit in memory.

    Attributes:
        failed: Rows that ran out of memory.
        ran: Rows that did not, of sources that mark those that do.
        recall: Share of `failed` that are predicted not to fit.
        precision: Share of rows predicted not to fit that did not.
    """

    failed: int
    ran: int
    recall: float
    precision: float

    @classmethod
    def of(cls, too_large: Sequence[bool], failed: Sequence[bool]) -> Fits:
        """Counts predictions against outcomes; NaN where there is nothing to count.

        >>> Fits.of([True, True, False], [True, False, False])
        Fits(failed=1, ran=2, recall=1.0, precision=0.5)
        """
        said = np.asarray(too_large, dtype=bool)
        truth = np.asarray(failed, dtype=bool)
        hit = int((said & truth).sum())
        nan = float("nan")
        return cls(
            int(truth.sum()),
            int((~truth).sum()),
            hit / int(truth.sum()) if truth.any() else nan,
            hit / int(said.sum()) if said.any() else nan,
        )
