"""How much of a transfer shows beside the computation that hides it."""

from __future__ import annotations

from typing import Any

import numpy as np

Vector = np.ndarray[Any, np.dtype[np.float64]]
Figures = Vector | float


def prefetched(transfer_s: Figures, work_s: Figures, interference: Figures) -> Vector:
    """Exposed seconds of transfers that run ahead of the computation that needs them.

    What is longer than the computation shows in full; of the rest a share, since the
    transfer takes memory bandwidth and cores from it.

    Args:
        transfer_s: Of the transfers.
        work_s: Of the computation beside them.
        interference: Share of the hidden part by which the computation is slowed down.

    >>> float(prefetched(3.0, 2.0, 0.5))
    2.0
    """
    late = np.maximum(np.asarray(transfer_s) - work_s, 0.0)
    return late + interference * np.minimum(transfer_s, work_s)


def trailing(transfer_s: Figures, cover_s: Figures, least: Figures) -> Vector:
    """Exposed seconds of sums that follow the computation that makes their operands.

    Args:
        transfer_s: Of the sums.
        cover_s: Computation that is left when the first of them can start.
        least: Share that shows however much there is: the last sums, and what they
            slow down.

    >>> float(trailing(3.0, 2.0, 0.5))
    1.5
    """
    return np.maximum(np.asarray(transfer_s) - cover_s, np.asarray(least) * transfer_s)
