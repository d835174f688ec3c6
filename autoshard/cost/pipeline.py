"""What pipeline schedules cost: bubbles, microbatches in flight, and balanced stages.

Closed forms, one set for runs given by numbers and for traced programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Vector = np.ndarray[Any, np.dtype[np.float64]]
Figures = Vector | float
Counts = np.ndarray[Any, np.dtype[np.int64]]
Names = str | np.ndarray[Any, Any]

_ROUNDING = 1e-9
"""Relative slack of a bound that is compared with sums of the same times."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How stages take turns.

    Attributes:
        schedule: "none" where there is one stage; "gpipe" (Huang et al. 2019,
            arXiv:1811.06965), "1f1b", "interleaved" (Narayanan et al. 2021,
            arXiv:2104.04473), "zb-h1" or "zb-h2" (Qi et al. 2024, arXiv:2401.10241).
        virtual: Parts of a stage; more than one for "interleaved" alone.
        vocab: "ends" where the embedding belongs to the first stage and the output
            projection to the last, "spread" where every stage has a share of both
            (vocabulary parallelism, Yeung et al. 2024, arXiv:2411.05288).
        blocks: Blocks of every part of every stage, in the order in which data passes
            them; empty for a balanced cut.

    >>> Pipeline("1f1b").virtual
    1
    """

    schedule: str = "none"
    virtual: int = 1
    vocab: str = "ends"
    blocks: tuple[int, ...] = ()


def bubble_share(
    schedule: Names, stages: Figures, microbatches: Figures, zero_bubble: float
) -> Vector:
    """Part of the wait for all other stages that a schedule does not fill.

    The slowest stage waits (p - 1) / v of a stage for p stages of v parts (Narayanan et
    al. 2021, arXiv:2104.04473): for each of the other stages once. A zero-bubble
    schedule fills it with weight gradients (Qi et al. 2024, arXiv:2401.10241): ZB-H1
    leaves a third, the others little; but two thirds of the first p - 1 units have no
    microbatch yet whose gradients could fill them.

    Args:
        schedule: Its name; of zero-bubble ones the part `zb-`.
        stages: Of the pipeline.
        microbatches: Of a step.
        zero_bubble: What a schedule leaves that has memory for twice the microbatches.

    >>> float(bubble_share("1f1b", 4.0, 8.0, 0.1))
    1.0
    """
    names = np.asarray(schedule)
    if names.ndim:
        figures = stages, microbatches, np.full(1, zero_bubble)
        return _each_schedule(bubble_share, names, *figures)
    schedule = str(names)
    if not schedule.startswith("zb"):
        return np.ones(np.broadcast_shapes(np.shape(stages), np.shape(microbatches)))
    least = {"zb-h1": 1 / 3, "zb-1p": 0.3}.get(schedule, zero_bubble)
    others = np.asarray(stages) - 1
    early = 2 * others - np.asarray(microbatches) / 2 + 1
    return np.maximum(least, early / np.maximum(3 * others, 1.0))


def _each_schedule(
    formula: Callable[..., Vector], names: np.ndarray[Any, Any], *figures: Figures
) -> Vector:
    """A formula of one schedule for runs of several."""
    names, *each = np.broadcast_arrays(names, *figures)
    found = np.empty(names.shape)
    for name in np.unique(names).tolist():
        of = names == name
        found[of] = formula(name, *(figure[of] for figure in each))
    return found


def in_flight(
    schedule: Names,
    stages: Figures,
    at: Figures,
    virtual: Figures,
    microbatches: Figures,
) -> Vector:
    """Microbatches of which a stage holds activations, as many stages' worth.

    Args:
        schedule: Its name.
        stages: Of the pipeline.
        at: Which stage, from 0.
        virtual: Parts of a stage.
        microbatches: Of a step.

    >>> [float(in_flight("1f1b", 4.0, float(at), 1.0, 8.0)) for at in range(4)]
    [4.0, 3.0, 2.0, 1.0]
    """
    names = np.asarray(schedule)
    if names.ndim:
        return _each_schedule(in_flight, names, stages, at, virtual, microbatches)
    schedule, count, parts = str(names), np.asarray(stages), np.asarray(virtual)
    if schedule == "gpipe":
        held = np.asarray(microbatches)
    elif schedule in ("zb-h1", "zb-1p"):
        # Zero-bubble schedules let every stage hold as much as 1F1B's first, or twice
        # (Qi et al. 2024, arXiv:2401.10241, section 4).
        held = count
    elif schedule in ("zb-2p", "zb-h2"):
        held = 2 * count
    else:
        # Warm-up of Megatron's interleaved schedule, in parts of a stage (Korthikanti
        # et al. 2022, arXiv:2205.05198, section 4.2.3, for the first stage).
        warm = 2 * (count - at - 1) + (parts - 1) * count + 1
        held = np.where((parts > 1) & (count > 1), warm / parts, count - at)
    return np.minimum(held, microbatches)


def balanced(
    blocks: int, stages: Counts, block: Vector, first: Vector, last: Vector
) -> tuple[Counts, Counts]:
    """Blocks of the first and of the last stage where the slowest stage is fastest.

    Every stage has at least one block; those between the two differ by one at most. Of
    cuts with the same slowest stage the one is taken that is nearest to equal stages.

    Args:
        blocks: Of the program, one after the other and alike.
        stages: int64[candidate], from 2 to `blocks`.
        block: float64[candidate]; seconds of one block.
        first: Seconds of what else the first stage does.
        last: Seconds of what else the last stage does.

    >>> one = np.ones(1)
    >>> balanced(8, np.array([4]), one, 0 * one, 2 * one)
    (array([2]), array([1]))
    """
    block = np.maximum(block, np.finfo(float).tiny)
    between = stages - 2

    def room(ends: Vector, limit: Vector) -> Counts:
        held = np.floor((limit - ends) / block * (1 + _ROUNDING) + _ROUNDING)
        return np.clip(held, 0, blocks).astype(np.int64)

    def holds(limit: Vector) -> np.ndarray[Any, np.dtype[np.bool_]]:
        ends = room(first, limit), room(last, limit)
        middle = room(np.zeros_like(block), limit)
        enough = ends[0] + ends[1] + between * middle >= blocks
        return enough & (ends[0] > 0) & (ends[1] > 0) & ((middle > 0) | (between == 0))

    # The slowest stage is one of: some blocks alone, with the first's, with the last's
    # other work; the smallest of these bounds that holds all blocks.
    best = np.full(len(block), np.inf)
    for ends in (np.zeros_like(block), first, last):
        low = np.zeros(len(block), dtype=np.int64)
        high = np.full(len(block), blocks, dtype=np.int64)
        while (low < high).any():  # how many blocks, by halving
            middle = (low + high) // 2
            fits = holds(ends + middle * block)
            low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
            low = np.minimum(low, high)
        limit = ends + low * block
        best = np.where(holds(limit), np.minimum(best, limit), best)
    most_first, most_last = room(first, best), room(last, best)
    inside = between * room(np.zeros_like(block), best)
    tail = np.maximum(
        np.minimum(most_last, -(-blocks // stages)), blocks - most_first - inside
    )
    head = np.maximum(np.minimum(most_first, blocks // stages), blocks - tail - inside)
    return np.where(between == 0, blocks - tail, head), tail


def blocks_of_stages(
    blocks: int, stages: int, first: int, last: int, virtual: int = 1
) -> tuple[int, ...]:
    """Blocks of every part of every stage, in the order in which data passes them.

    Args:
        blocks: Of the program.
        stages: Of the pipeline.
        first: Blocks of the first stage, from `balanced`.
        last: Blocks of the last stage.
        virtual: Parts of a stage: data passes all stages so many times.

    >>> blocks_of_stages(9, 4, 2, 3)
    (2, 2, 2, 3)
    >>> blocks_of_stages(8, 2, 4, 4, virtual=2)
    (2, 2, 2, 2)
    """
    rest, between = blocks - first - last, stages - 2
    of_stage = [first]
    # The larger ones come later: a stage holds fewer microbatches the later it is.
    of_stage += [(rest + at) // between for at in range(between)]
    of_stage.append(last)
    return tuple(
        count // virtual + (part < count % virtual)
        for part in range(virtual)
        for count in of_stage
    )
