"""Bounds below which no price of a candidate is, found without pricing it.

The kernels of the forward and backward passes, the collectives on activations and what
is in memory of activations depend on rules and remat alone: candidates that differ in
how state is stored share a bound. What storage moves of state is found apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoshard.cost.collectives import Meshes, Rows, Vector
from autoshard.cost.overlap import exposed_s, least_s
from autoshard.cost.pipeline import Pipeline, bubble_share
from autoshard.cost.price import Pricer
from autoshard.cost.rates import Rates
from autoshard.cost.stages import STAGE, sent_s, waiting
from autoshard.plan.sharded import OUTPUT


def floor_bytes(
    pricer: Pricer,
    meshes: Meshes,
    cuts: Vector,
    pipelines: Sequence[Pipeline] = (),
    *,
    offloaded: bool = False,
) -> Vector:
    """Bytes of a chip that a step needs at least, however state is stored.

    A stage that has a part b of the blocks holds no less than b c, where c is what all
    blocks hold of one microbatch, and of as many others as wait there. As the parts
    come to the whole, the fullest stage holds no less than 1 / sum(1 / c).

    Args:
        pricer: Of one layout with the rules.
        meshes: The candidates; where their axes may lie anywhere, the bound is one of
            all orders.
        cuts: float64[candidate]; microbatches.
        pipelines: How stages may take turns, where there are several.
        offloaded: Whether what is kept for the backward pass is in the host's memory.
    """

    def floor(pricer: Pricer, part: Meshes, cuts: Vector, _rows: Rows) -> Vector:
        # Of the program, of its blocks alone, and what of these waits.
        alive, of_blocks = np.zeros((2, len(pricer.program.ops) + 2, len(part)))
        stash = np.zeros(len(part))
        live = pricer.liveness
        for buffer, size, within in live.activations(part, cuts):
            if offloaded and live.is_stash(buffer):
                continue
            for table in (alive, of_blocks) if within else (alive,):
                table[buffer.begin] += size
                table[buffer.end + 1] -= size
            if within and live.is_stash(buffer):
                stash += size
        amid = sorted(pricer.work.amid)

        def peak(table: Vector) -> Vector:
            total = np.cumsum(table, axis=0)
            total[amid] = 0.0
            return total.max(axis=0)

        counts = part.product(STAGE)
        if not pipelines or (counts == 1).all():
            return peak(alive)
        # Small enough to be nothing, and large enough to have an inverse that adds up.
        each = np.maximum(peak(of_blocks), 1e-9)
        found = np.full(len(part), np.inf)
        for how in pipelines:
            first, second, last = (
                1 / (each + waiting(how, at, counts, cuts) * stash)
                for at in (0 * counts, 1 + 0 * counts, counts - 1)
            )
            # A cut that is fixed may have more blocks in later stages.
            between = last if how.blocks else second
            found = np.minimum(found, 1 / (first + (counts - 2) * between + last))
        return np.where(counts > 1, found, peak(alive))

    return pricer.apart(meshes, cuts, floor)


def rest_s(pricer: Pricer, meshes: Meshes, cuts: Vector) -> tuple[Vector, Vector]:
    """Seconds of a step at least, however state is stored.

    Args:
        pricer: Of one layout with the rules.
        meshes: The candidates; where their axes may lie anywhere, the bound is one of
            all orders.
        cuts: float64[candidate]; microbatches.

    Returns:
        A bound on all of a step; and one on what storage has no part in, to which what
        it moves comes.
    """

    def floor(
        pricer: Pricer, part: Meshes, cuts: Vector, _rows: Rows
    ) -> tuple[Vector, Vector]:
        rates = Rates.of(part.cluster, pricer.constants)
        whole, rest, between, of_batch = np.zeros((4, len(part)))
        attention = [np.zeros(len(part)) for _ in pricer.context.passes]
        for time in pricer.compute.times(part, cuts, rates, update=False):
            whole += time.total_s
            rest += time.least_s
            if time.kernel.op in pricer.context.of_op:
                attention[pricer.context.of_op[time.kernel.op]] += time.total_s
        for each in pricer.context.transfers(part, cuts, attention)[0]:
            whole += each.shown_s
            rest += each.shown_s
        for index, move in enumerate(pricer.moves):
            # Of state are also what the update moves and where its results go.
            of_state = index in pricer.prefetched or index in pricer.trailing
            of_state |= move.op == OUTPUT or pricer.work.update[move.op]
            if not of_state and move.value not in pricer.work.gradients:
                for _, time, _, _ in pricer.collective(index, part, cuts):
                    between += time
                    if pricer.work.batched[move.value]:
                        of_batch += time
        none = np.zeros(len(part))
        kind, constants = part.cluster.kind, pricer.constants
        whole += exposed_s(kind, constants, none, none, none, between)
        rest += exposed_s(kind, constants, none, none, none, of_batch)
        return whole, rest

    return pricer.apart(meshes, cuts, floor)


def stored_s(pricer: Pricer, meshes: Meshes, cuts: Vector, rest: Vector) -> Vector:
    """Seconds of a step at least, with what this layout's storage moves.

    Args:
        pricer: Of the layout.
        meshes: As in `rest_s`.
        cuts: As in `rest_s`.
        rest: The second of `rest_s`.
    """

    def moved(
        pricer: Pricer, part: Meshes, cuts: Vector, _rows: Rows
    ) -> tuple[Vector, Vector]:
        ahead, after = np.zeros(len(part)), np.zeros(len(part))
        for own, indices in ((ahead, pricer.prefetched), (after, pricer.trailing)):
            for index in sorted(indices):
                for _, time, _, _ in pricer.collective(index, part, cuts):
                    own += time
        return ahead, after

    ahead, after = pricer.apart(meshes, cuts, moved)
    return least_s(meshes.cluster.kind, pricer.constants, rest, ahead, after)


def in_stages(
    pricer: Pricer,
    meshes: Meshes,
    cuts: Vector,
    whole: Vector,
    pipelines: Sequence[Pipeline],
) -> Vector:
    """A bound on a step whose blocks are spread over stages.

    The slowest stage takes no less than the average one, waits for the others as its
    schedule lets it, and has what it makes sent on.

    Args:
        pricer: Of one layout with the rules.
        meshes: As in `rest_s`.
        cuts: As in `rest_s`.
        whole: Seconds at least with all blocks on every chip.
        pipelines: How stages may take turns; without any, `stage` is an axis like any
            other.
    """
    stages, constants = meshes.product(STAGE), pricer.constants
    several = stages > 1
    if not pipelines or not several.any():
        return whole
    sent = pricer.apart(meshes, cuts, lambda by, part, own, _: by.sent_bytes(part, own))
    zero_bubble = constants["pipeline.zero_bubble"]
    found = np.full(len(meshes), np.inf)
    for how in pipelines:
        wait = bubble_share(how.schedule, stages, cuts, zero_bubble) / how.virtual
        busy = whole / stages * (1 + wait * (stages - 1) / cuts)
        # What both ends have is not counted: it may be nothing.
        hops = sent_s(how, meshes, cuts, sent, np.zeros(1), constants)
        found = np.minimum(found, busy + hops)
    return np.where(several, found, whole)
