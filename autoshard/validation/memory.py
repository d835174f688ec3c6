"""Peak memory as publications print it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoshard.cost.constants import Constants
from autoshard.cost.memory import memory
from autoshard.cost.run import Runs, Vector
from autoshard.validation.rows import Row


def printed_bytes(rows: Sequence[Row], constants: Constants | None = None) -> Vector:
    """Predicts the peak memory of rows as their software counts and logs it.

    Args:
        rows: Published runs.
        constants: Of the cost model, by default as fitted to published runs.

    Returns:
        float64[row], bytes: of tensors, of what the allocator reserves or of all that
        is taken from the device, on the stage that the software logs.

    >>> printed_bytes([]).shape
    (0,)
    """
    if not rows:
        return np.zeros(0)
    runs = Runs.of([row.run for row in rows])
    largest = memory(runs, constants)
    first = memory(runs, constants, stage="first")
    found = np.zeros(len(rows))
    for held, logged in ((largest, "largest"), (first, "first")):
        mine = runs.where("logged", logged)
        counted = np.select(
            [runs.where("counts", "allocated"), runs.where("counts", "reserved")],
            [held.allocated_bytes, held.reserved_bytes],
            held.peak_bytes,
        )
        found = np.where(mine, counted, found)
    return found
