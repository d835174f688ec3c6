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
    if kind == "tpu":
        between = between * constants["tensor.compiler"]
    return _with_state_s(kind, constants, between, work + between, ahead, after)


def _with_state_s(
    kind: str,
    constants: Constants,
    shown: Vector,
    rest: Vector,
    ahead: Vector,
    after: Vector,
) -> Vector:
    """What shows of gathers and sums of state, beside the rest, added to `shown`."""
    if kind == "cpu":  # its collectives block
        return ahead + after + shown
    if kind == "tpu":
        share = constants["gather.interference_tpu"]
        return shown + prefetched(ahead + after, rest, share)
    # Two thirds of the work are the backward pass.
    cover = constants["data.hidden"] * rest * 2 / 3
    return (
        shown
        + prefetched(ahead, rest, constants["gather.interference"])
        + trailing(after, cover, constants["data.exposed"])
    )


def least_s(
    kind: str, constants: Constants, rest: Vector, ahead: Vector, after: Vector
) -> Vector:
    """Seconds of a step at least, of which a part is known.

    More of what else runs hides more of the gathers and sums. What shows of these is
    linear in it, but for where it covers the gathers and where the sums: the least is
    at one of the two, or where there is nothing more.

    Args:
        kind: As in `exposed_s`.
        constants: As in `exposed_s`.
        rest: Seconds at least of all but `ahead` and `after`.
        ahead: As in `exposed_s`, at least.
        after: As in `exposed_s`, at least.

    >>> one = np.ones(1)
    >>> least_s("cpu", Constants.shipped(), one, one, one).tolist()
    [3.0]
    """
    covered = (1 - constants["data.exposed"]) * after / constants["data.hidden"] * 1.5
    ends = (rest, *(np.maximum(rest, at) for at in (ahead, covered)))
    return np.minimum.reduce(
        [_with_state_s(kind, constants, end, end, ahead, after) for end in ends]
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
    if kind == "tpu":
        between = between * constants["tensor.compiler"]
    return least_s(kind, constants, work + between, ahead, after) - work
