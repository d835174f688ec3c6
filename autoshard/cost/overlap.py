"""How much of a transfer shows beside the computation that hides it."""

from __future__ import annotations

from typing import Any

import numpy as np

from autoshard.cost.constants import Constants

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


def exposed_s(
    kind: str,
    constants: Constants,
    work: Vector,
    ahead: Vector,
    after: Vector,
    between: Vector,
) -> Vector:
    """Seconds of a traced program's collectives that computation does not hide.

    Args:
        kind: Of the chips: "cpu", "gpu" or "tpu".
        constants: Of the cost model.
        work: Seconds of computation.
        ahead: Of gathers of parameters, which XLA starts ahead of their use.
        after: Of sums of gradients, which end beside the rest of the backward pass.
        between: Of collectives on activations, which the next op waits for; the TPU
            compiler runs pieces of them beside the product.

    >>> one = np.ones(1)
    >>> exposed_s("cpu", Constants.shipped(), one, one, one, one).tolist()
    [3.0]
    """
    if kind == "cpu":  # its collectives block
        return ahead + after + between
    if kind == "tpu":
        between = between * constants["tensor.compiler"]
        rest = work + between
        share = constants["gather.interference_tpu"]
        return between + prefetched(ahead + after, rest, share)
    rest = work + between
    # Two thirds of the work are the backward pass.
    cover = constants["data.hidden"] * rest * 2 / 3
    return (
        between
        + prefetched(ahead, rest, constants["gather.interference"])
        + trailing(after, cover, constants["data.exposed"])
    )


def least_exposed_s(
    kind: str,
    constants: Constants,
    work: Vector,
    ahead: Vector,
    after: Vector,
    between: Vector,
) -> Vector:
    """The least of `exposed_s` where collectives take this long, or longer.

    More of what is ahead or after never shows less. More in between may: gathers and
    sums run beside it too. What shows is convex in it, and straight but where it has
    hidden all gathers, or of the sums as much as can be: the least is there, or at the
    start.

    Args:
        kind: As in `exposed_s`.
        constants: As in `exposed_s`.
        work: As in `exposed_s`.
        ahead: As in `exposed_s`, at least.
        after: As in `exposed_s`, at least.
        between: As in `exposed_s`, at least.

    >>> one = np.ones(1)
    >>> least_exposed_s("cpu", Constants.shipped(), one, one, one, one).tolist()
    [3.0]
    """

    def shown(between: Vector) -> Vector:
        return exposed_s(kind, constants, work, ahead, after, between)

    found = shown(between)
    if kind != "gpu":  # the others hide less by it than it takes
        return found
    hidden = constants["data.hidden"] * 2 / 3
    summed = after * (1 - constants["data.exposed"])
    for rest in (ahead, summed / max(hidden, np.finfo(float).tiny)):
        found = np.minimum(found, shown(np.maximum(between, rest - work)))
    return found
