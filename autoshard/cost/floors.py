"""Bounds below which no price of a candidate is, found without pricing it.

The kernels of the forward and backward passes, the collectives on activations and what
is in memory of activations depend on rules and remat alone: candidates that differ in
how state is stored share a bound. What storage moves of state is found apart.

That is so because ops on the batch are divided as if nothing were stored otherwise than
it is used (`autoshard.propagate.decide`), and become the same kernels, as what is made
of state alone is made before them (`autoshard.cost.early`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from autoshard.cost.collectives import Meshes, Rows, Vector
from autoshard.cost.offload import Offload
from autoshard.cost.overlap import exposed_s, least_s
from autoshard.cost.pipeline import Pipeline, bubble_share
from autoshard.cost.price import Pricer
from autoshard.cost.rates import Rates
from autoshard.cost.segments import ALL, BLOCK, BOTH, EMBED, HEAD
from autoshard.cost.stages import PLACES, STAGE, Table, cuttable, sent_s
from autoshard.plan.sharded import OUTPUT

_TINY = np.finfo(float).tiny

ROUNDING = 1e-9
"""By so much a bound is no bound, relative to what it is of."""


def with_host_s(
    meshes: Meshes, rest: Vector, moved: Mapping[str, Table], offload: Offload
) -> Vector:
    """Seconds of a step at least, all blocks on every chip, with what is offloaded.

    The two passes take no less than what they compute, nor than what comes in in both,
    or goes out in the first and comes in in the other. Then comes the update, which
    takes no less than it takes its state to come in.

    Args:
        meshes: The candidates.
        rest: As in `stored_s`.
        moved: From `moved_bytes`.
        offload: What is in the host's memory.
    """
    each = [moved[kind] for kind in offload]
    forward = np.max([own[0] for own in each], axis=0)
    backward, update = sum(own[1] for own in each), sum(own[2] for own in each)
    rate = meshes.cluster.host_bytes_per_s
    return np.maximum(rest, (forward + backward) / rate) + update / rate


def rest_s(pricer: Pricer, meshes: Meshes, cuts: Vector) -> Table:
    """Seconds of a step at least, however state is stored.

    Args:
        pricer: Of one layout with the rules.
        meshes: The candidates; where their axes may lie anywhere, the bound is one of
            all orders.
        cuts: float64[candidate]; microbatches.

    Returns:
        Of all of a step; of what it computes that storage has no part in, to which what
        is moved comes; and of that by place: float64[2 + PLACES, candidate].
    """

    def floor(pricer: Pricer, part: Meshes, cuts: Vector, _rows: Rows) -> Table:
        rates = Rates.of(part.cluster, pricer.constants)
        rest, between = np.zeros((2, len(part)))
        kernels, places = np.zeros((PLACES, len(part))), pricer.work.segments.of_op
        attention = [np.zeros(len(part)) for _ in pricer.context.passes]
        moved = pricer.moved
        for time in pricer.compute.times(part, cuts, rates, update=False):
            # Weights may be read in another precision, or made of state elsewhere.
            rest += time.least_s
            kernels[places[time.kernel.op]] += time.least_s
            if time.kernel.op in pricer.context.of_op:
                attention[pricer.context.of_op[time.kernel.op]] += time.total_s
        for each in pricer.context.transfers(part, cuts, attention)[0]:
            rest += each.shown_s
            kernels[places[each.op]] += each.shown_s
        for index, move in enumerate(moved.moves):
            # Of state are also what the update moves and where its results go.
            of_state = index in moved.prefetched or index in moved.trailing
            of_state |= move.op == OUTPUT or pricer.work.update[move.op]
            of_state |= move.value in pricer.work.gradients
            if not of_state and pricer.work.batched[move.value]:
                for _, time, _, _ in moved.collective(index, part, cuts):
                    between += time
        none = np.zeros(len(part))
        kind, constants = part.cluster.kind, pricer.constants
        whole = rest + exposed_s(kind, constants, none, none, none, between)
        return np.stack([whole, rest, *kernels])

    return pricer.apart(meshes, cuts, floor)


def moved_s(pricer: Pricer, meshes: Meshes, cuts: Vector) -> Table:
    """Seconds in collectives, as `Moved.time_s`: float64[3, place, candidate].

    Args:
        pricer: Of the layout.
        meshes: As in `rest_s`.
        cuts: As in `rest_s`.
    """

    def moved(pricer: Pricer, part: Meshes, cuts: Vector, _rows: Rows) -> Table:
        return pricer.moved.time_s(part, cuts)

    return pricer.apart(meshes, cuts, moved)


def stored_s(
    pricer: Pricer, meshes: Meshes, moved: Table, rest: Vector
) -> tuple[Vector, Table]:
    """Seconds of a step at least, with all that this layout moves.

    Args:
        pricer: Of the layout.
        meshes: As in `rest_s`.
        moved: From `moved_s`.
        rest: Seconds in which a chip computes, at least.

    Returns:
        Those, and of these by place what shows of collectives whatever is computed,
        float64[place, candidate]. What shows of all collectives is spread over places
        in proportion to what they take; no less does than of those that the next op
        waits for. Zero where the order of axes is open, or some others are not there.
    """
    kind, constants = meshes.cluster.kind, pricer.constants
    ahead, after, between = moved.sum(axis=1)
    none = np.zeros(len(meshes))
    shown = exposed_s(kind, constants, none, none, none, between)
    least = least_s(kind, constants, rest + shown, ahead, after)
    if meshes.anywhere is not None or pricer.lacks_moves_of_state:
        return least, np.zeros((PLACES, len(meshes)))
    by_place = moved.sum(axis=0)
    share = by_place / np.maximum(by_place.sum(axis=0), _TINY)
    return least, share * shown


def summed_s(pricer: Pricer, meshes: Meshes, cuts: Vector) -> Table:
    """Seconds in sums of gradients over microbatches, float64[place, candidate].

    Args:
        pricer: Of the layout.
        meshes: As in `rest_s`.
        cuts: As in `rest_s`.
    """
    rates = Rates.of(meshes.cluster, pricer.constants)
    return pricer.timing.summed_s(meshes, cuts, rates)


def update_s(pricer: Pricer, meshes: Meshes, cuts: Vector) -> Table:
    """Seconds in kernels of the optimizer, float64[place, candidate].

    Args:
        pricer: Of the layout.
        meshes: As in `rest_s`.
        cuts: As in `rest_s`.
    """

    def update(pricer: Pricer, part: Meshes, cuts: Vector, _rows: Rows) -> Table:
        found, places = np.zeros((PLACES, len(part))), pricer.work.segments.of_op
        for time in pricer.compute.times(part, cuts, rates, update=True):
            found[places[time.kernel.op]] += time.total_s
        return found

    rates = Rates.of(meshes.cluster, pricer.constants)
    return pricer.apart(meshes, cuts, update)


def in_stages(
    pricer: Pricer,
    meshes: Meshes,
    cuts: Vector,
    whole: Vector,
    waited: Vector,
    kernels: Table,
    pipelines: Sequence[Pipeline],
    update: Table | None = None,
) -> Vector:
    """A bound on a step whose blocks are spread over stages.

    The slowest stage takes no less than the average one, nor than what is known of its
    own where whole blocks are spread best; it waits for the others as its schedule lets
    it, and has what it makes sent on.

    Args:
        pricer: Of one layout with the rules.
        meshes: As in `rest_s`.
        cuts: As in `rest_s`.
        whole: Seconds at least with all blocks on every chip.
        waited: Of these, what stages wait for of each other: all but the update, and
            what that may hide.
        kernels: Of these, what kernels and collectives take that belong to one place,
            float64[place, candidate].
        pipelines: How stages may take turns; without any, `stage` is an axis like any
            other.
        update: Of `kernels`, what is not waited for, as far as it is among them.
    """
    stages, constants = meshes.product(STAGE), pricer.constants
    several = stages > 1
    if not pipelines or not several.any():
        return whole
    sent = pricer.apart(
        meshes, cuts, lambda by, part, own, _: by.timing.sent_bytes(part, own)
    )
    zero_bubble, blocks = constants["pipeline.zero_bubble"], pricer.work.segments.blocks
    late = np.zeros_like(kernels) if update is None else update
    found = np.full(len(meshes), np.finfo(float).max)
    for how in pipelines:
        at_ends = how.vocab != "spread"
        more, not_waited = (
            (stages - 1) * table[ALL] + float(at_ends) * table[BOTH]
            for table in (kernels, late)
        )
        slowest = (whole + more) / stages
        if not how.blocks:
            least = _slowest_s(kernels, stages, float(blocks), at_ends=at_ends)
            slowest = np.maximum(slowest, least)
        wait = bubble_share(how.schedule, stages, cuts, zero_bubble) / how.virtual
        others = waited + more - not_waited - slowest
        step = slowest + wait * np.maximum(others, 0.0) / cuts
        # What both ends have is not counted: it may be nothing.
        step += sent_s(how, meshes, cuts, sent, np.zeros(1), constants)
        can = cuttable(how, blocks, stages, cuts)
        found = np.where(can, np.minimum(found, step), found)
    return np.where(several, found, whole)


def _slowest_s(
    kernels: Table, stages: Vector, blocks: float, *, at_ends: bool
) -> Vector:
    """Seconds of the slowest stage at least, which has whole blocks.

    With no more than m of L blocks of b seconds in any of the p - 2 stages inside, the
    two others have the rest, and the ends of the program, of E seconds: one of these
    takes (E + (L - (p - 2) m) b) / 2. As m rises, m b does, and that falls; the least
    of the larger one is where they meet, at m = (E + L b) / p b, or at a whole number
    beside.

    Args:
        kernels: float64[place, candidate].
        stages: p.
        blocks: L.
        at_ends: Whether the ends are in the first and in the last stage, not in all.
    """
    block = kernels[BLOCK] / blocks
    ends = kernels[EMBED] + kernels[HEAD] + kernels[BOTH]
    if not at_ends:
        full = np.ceil(blocks / stages * (1 - ROUNDING)) * block
        return full + ends / stages + kernels[ALL]
    ends = ends + kernels[BOTH]
    meet = (ends / np.maximum(block, _TINY) + blocks) / stages
    few, many = np.floor(meet * (1 + ROUNDING)), np.ceil(meet * (1 - ROUNDING))
    outside = (ends + (blocks - (stages - 2) * few) * block) / 2
    least = np.where(stages > 2, np.minimum(many * block, outside), 0.0)
    return np.where(block > 0, least, 0.0) + kernels[ALL]
