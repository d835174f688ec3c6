"""A program cut into pipeline stages, priced from what it takes when it is not cut.

    step = slowest stage + bubble + what of the transfers between stages shows

Every candidate has its own balanced cut. What collectives do not hide behind is spread
over the parts of the program in proportion to their collectives, so that a stage takes
the sum of what it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from autoshard.cost.collectives import Meshes, Vector
from autoshard.cost.constants import Constants
from autoshard.cost.pipeline import (
    Pipeline,
    balanced,
    blocks_of_stages,
    bubble_share,
    in_flight,
)
from autoshard.cost.segments import ALL, BLOCK, BOTH, EMBED, HEAD

STAGE = frozenset(["stage"])
PLACES = 5

Table = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Kernels:
    """Seconds in which a chip computes, all blocks on every chip, by what has them.

    Each is float64[place, candidate], places as in `segments`.

    Attributes:
        matmul: In matrix products.
        other: In everything else.
        forward: Of both, in the forward pass.
        update: Of both, in the optimizer.
        attention: Of the passes of attention, each float64[candidate], where these
            keep keys and values in parts.
    """

    matmul: Table
    other: Table
    forward: Table
    update: Table
    attention: tuple[Vector, ...] = ()


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of a step in which all blocks are on every chip, by what has them.

    Each is float64[place, candidate], places as in `segments`.

    Attributes:
        matmul: As in `Kernels`.
        other: As in `Kernels`.
        update: As in `Kernels`.
        collective: In collectives, hidden or not.
        shown: Of these, what computation does not hide.
        context_heads: Devices of `context` that share heads, int64[candidate].
        host: In transfers to and from the host, as far as they show.
        host_update: Of these, in the optimizer.
    """

    matmul: Table
    other: Table
    update: Table
    collective: Table
    shown: Table
    context_heads: np.ndarray[Any, np.dtype[np.int64]]
    host: Table | float = 0.0
    host_update: Table | float = 0.0

    @property
    def busy(self) -> Table:
        """Seconds in which a chip computes, or waits for collectives or the host."""
        return self.matmul + self.other + self.shown + self.host


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of every candidate, or several that are alike.

    Attributes:
        at: Which it is, from 0; of several the first.
        blocks: How many blocks it has, float64[candidate].
        share: By place, which part of what belongs there it has: [place, candidate].
        exists: Whether a candidate has such a stage.
    """

    at: Vector
    blocks: Vector
    share: Table
    exists: np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True)
class Cut:
    """How candidates are cut into stages.

    Attributes:
        pipeline: How the stages take turns.
        stages: The stages that differ: the first, those between, the last.
        valid: Candidates that can be cut so.
    """

    pipeline: Pipeline
    stages: tuple[Stage, ...]
    valid: np.ndarray[Any, np.dtype[np.bool_]]

    def blocks_of(self, k: int, blocks: int, stages: int) -> tuple[int, ...]:
        """Blocks of every part of every stage of one candidate, in order."""
        if self.pipeline.blocks:
            return self.pipeline.blocks
        first, last = (int(self.stages[at].blocks[k]) for at in (0, -1))
        return blocks_of_stages(blocks, stages, first, last, self.pipeline.virtual)


def cuttable(
    pipeline: Pipeline, blocks: int, counts: Vector, cuts: Vector
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether there are blocks for all parts, and microbatches that they can take.

    Args:
        pipeline: How the stages take turns.
        blocks: Of the program.
        counts: Stages, float64[candidate].
        cuts: Microbatches, float64[candidate].
    """
    found = counts * pipeline.virtual <= blocks
    if pipeline.schedule == "interleaved":
        # Microbatches pass in groups of as many as there are stages (Narayanan et al.
        # 2021, section 2.2).
        found &= cuts % counts == 0
    return found


def cut(
    pipeline: Pipeline, blocks: int, parts: Parts, counts: Vector, cuts: Vector
) -> Cut:
    """Cuts candidates into stages: as fixed, or as balanced as whole blocks allow.

    Args:
        pipeline: How the stages take turns.
        blocks: Of the program.
        parts: What it takes uncut.
        counts: Stages, two or more, float64[candidate].
        cuts: Microbatches, float64[candidate].
    """
    busy = parts.busy
    spread = pipeline.vocab == "spread"
    nothing = np.zeros(len(counts))
    stages = counts.astype(np.int64)
    valid = cuttable(pipeline, blocks, counts, cuts)

    def stage(at: Vector, held: Any, ends: tuple[int, ...], exists: Any) -> Stage:
        share = np.zeros((PLACES, len(counts)))
        share[BLOCK] = held / blocks
        share[ALL] = 1.0
        for place in (EMBED, HEAD, BOTH):
            share[place] = 1 / counts if spread else float(place in ends)
        return Stage(at, held.astype(float), share, np.broadcast_to(exists, at.shape))

    if pipeline.blocks:
        count = len(pipeline.blocks) // pipeline.virtual
        held = [sum(pipeline.blocks[at::count]) for at in range(count)]
        valid &= (stages * pipeline.virtual == len(pipeline.blocks)) & (
            sum(pipeline.blocks) == blocks
        )
        ends = {0: (EMBED, BOTH), count - 1: (HEAD, BOTH)}
        return Cut(
            pipeline,
            tuple(
                stage(nothing + at, nothing + own, ends.get(at, ()), True)
                for at, own in enumerate(held)
            ),
            valid,
        )
    first = nothing if spread else busy[EMBED] + busy[BOTH]
    last = nothing if spread else busy[HEAD] + busy[BOTH]
    safe = np.where(valid, stages, min(2, blocks))
    head, tail = balanced(blocks, safe, busy[BLOCK] / blocks, first, last)
    between, rest = safe - 2, blocks - head - tail
    fewest = np.where(between > 0, rest // np.maximum(between, 1), head)
    valid &= np.minimum(fewest, np.minimum(head, tail)) >= pipeline.virtual
    inside = -(-rest // np.maximum(between, 1))
    return Cut(
        pipeline,
        (
            stage(nothing, head, (EMBED, BOTH), True),
            stage(nothing + 1, inside, (), between > 0),
            stage(counts - 1, tail, (HEAD, BOTH), True),
        ),
        valid,
    )


@dataclass(frozen=True, slots=True)
class StagedTime:
    """Seconds of a step of candidates that are cut into stages.

    Attributes:
        matmul: In products, of the slowest stage.
        other: In what else it computes.
        shown: In its collectives, as far as they show.
        hidden: In its collectives beside computation.
        bubble: Waiting for the pipeline to fill and drain.
        sent: In transfers between stages, as far as they show.
        host: In its transfers to and from the host, as far as they show.
        share: By place, what the slowest stage has: [place, candidate].
    """

    matmul: Vector
    other: Vector
    shown: Vector
    hidden: Vector
    bubble: Vector
    sent: Vector
    host: Vector
    share: Table


def staged(
    how: Cut,
    parts: Parts,
    meshes: Meshes,
    cuts: Vector,
    sent: Vector,
    constants: Constants,
) -> StagedTime:
    """Prices candidates that are cut into stages.

    Args:
        how: The cut.
        parts: What the program takes uncut.
        meshes: The candidates.
        cuts: Microbatches.
        sent: From `sent_s`.
        constants: Of the cost model.
    """
    counts, pipeline = meshes.product(STAGE), how.pipeline

    def total(table: Table) -> list[Vector]:
        return [
            np.where(stage.exists, (stage.share * table).sum(axis=0), 0.0)
            for stage in how.stages
        ]

    times = np.array(total(parts.busy))
    slowest = times.argmax(axis=0)

    def of_slowest(table: Table) -> Vector:
        return np.take_along_axis(np.array(total(table)), slowest[None], axis=0)[0]

    # The update comes after the pipeline has drained.
    each = parts.busy - parts.update - parts.host_update
    share = np.where(pipeline.vocab == "spread", 1.0, 2.0)
    whole = each.sum(axis=0) + (share - 1) * each[BOTH] + (counts - 1) * each[ALL]
    longest = np.array(total(each)).max(axis=0)
    zero_bubble = constants["pipeline.zero_bubble"]
    unfilled = bubble_share(pipeline.schedule, counts, cuts, zero_bubble)
    waited = np.maximum(whole - longest, 0.0) / cuts
    bubble = unfilled * waited / pipeline.virtual
    return StagedTime(
        matmul=of_slowest(parts.matmul),
        other=of_slowest(parts.other),
        shown=of_slowest(parts.shown),
        hidden=of_slowest(parts.collective - parts.shown),
        bubble=bubble,
        sent=sent,
        host=of_slowest(parts.host + np.zeros_like(parts.matmul)),
        share=np.take_along_axis(
            np.array([stage.share for stage in how.stages]), slowest[None, None], axis=0
        )[0],
    )


def sent_s(
    pipeline: Pipeline,
    meshes: Meshes,
    cuts: Vector,
    sent_bytes: Vector,
    shared_bytes: Vector,
    constants: Constants,
) -> Vector:
    """Seconds in transfers between stages, as far as they show.

    Args:
        pipeline: How the stages take turns.
        meshes: The candidates.
        cuts: Microbatches.
        sent_bytes: What one microbatch hands from block to block, on one device.
        shared_bytes: Gradients of what both ends have (tied embeddings), on one device.
        constants: Of the cost model.
    """
    # A microbatch goes to the next part, and its gradient comes back.
    hop = meshes.time_s("permute", STAGE, sent_bytes)
    shown = constants["network.point_to_point"]
    sent = 2 * cuts * hop * shown * pipeline.virtual
    if pipeline.vocab == "spread":
        # All stages get the last block's result, and the sum of what they make of it.
        return sent + 2 * cuts * meshes.time_s("all_reduce", STAGE, sent_bytes)
    return sent + 2 * meshes.time_s("permute", STAGE, shared_bytes)


def least_s(
    how: Cut,
    kernels: Kernels,
    shown: Vector,
    counts: Vector,
    cuts: Vector,
    constants: Constants,
) -> Vector:
    """Seconds of a step at least, but for transfers, whoever has the collectives.

    All stages together are busy for B, so that the slowest is for B / p or more, and
    for what it computes: for X. With L for the longest without its update, a share u of
    what all others take, W - L, is waited for: the step takes max(X, L) + u (W - L),
    where u <= 1. That is least where L = X.

    Args:
        how: The cut.
        kernels: What a chip computes uncut.
        shown: What shows of collectives at least; who has them is not known.
        counts: Stages.
        cuts: Microbatches.
        constants: Of the cost model.
    """
    pipeline = how.pipeline
    ends = 0.0 if pipeline.vocab == "spread" else 1.0

    def of_all(table: Table) -> Vector:
        return table.sum(axis=0) + ends * table[BOTH] + (counts - 1) * table[ALL]

    computed = kernels.matmul + kernels.other
    busy = of_all(computed) + shown
    slowest = busy / counts
    for stage in how.stages:
        own = (stage.share * computed).sum(axis=0)
        slowest = np.where(stage.exists, np.maximum(slowest, own), slowest)
    zero_bubble = constants["pipeline.zero_bubble"]
    share = bubble_share(pipeline.schedule, counts, cuts, zero_bubble)
    wait = share / cuts / pipeline.virtual
    rest = busy - of_all(kernels.update)
    return slowest + wait * np.maximum(rest - slowest, 0.0)


def waiting(pipeline: Pipeline, at: Vector, counts: Vector, cuts: Vector) -> Vector:
    """Microbatches beyond the current one whose activations a stage holds.

    Args:
        pipeline: How the stages take turns.
        at: Which stage, from 0.
        counts: Stages.
        cuts: Microbatches.
    """
    held = in_flight(pipeline.schedule, counts, at, pipeline.virtual, cuts)
    # The vocabulary's forward and backward passes are a stage of their own in between
    # (Yeung et al. 2024, section 5).
    more = 1.0 if pipeline.vocab == "spread" else 0.0
    return np.minimum(np.maximum(held, 1.0) + more, np.maximum(cuts, 1.0)) - 1.0
