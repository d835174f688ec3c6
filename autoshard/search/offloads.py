"""What the search may keep in the host's memory."""

from __future__ import annotations

import itertools

from autoshard.cost.offload import Offload, Offloading
from autoshard.ir.errors import InputError
from autoshard.plan.cluster import Cluster
from autoshard.plan.strategy import OFFLOADABLE, Strategy

_WHY = {
    "optimizer": "the program has no optimizer state",
    "params": "the program has no parameters",
    "activations": "no blocks keep any for a backward pass",
}


def offloads(
    strategy: Strategy, cluster: Cluster, program: Offloading
) -> tuple[Offload, ...]:
    """The sets of what may be offloaded, the smaller ones first.

    Args:
        strategy: Which fixes a set, or leaves it open.
        cluster: Where. A hole is filled with nothing where a figure of the chip's host
            is missing.
        program: What there is to offload.

    Raises:
        InputError: The strategy fixes what the program does not have, or the chip lacks
            a figure for.
    """
    fixed = strategy.schedule.offload
    if fixed == "auto":
        there = [kind for kind in OFFLOADABLE if kind in program.kinds]
        most = 0 if cluster.host_lacks else len(there)
        return tuple(
            some
            for size in range(most + 1)
            for some in itertools.combinations(there, size)
        )
    said = f"offload = {list(fixed)}{strategy.where('offload')}"
    for kind in fixed:
        if kind not in program.kinds:
            raise InputError(
                f"{said} keeps {kind} in the host's memory, and {_WHY[kind]}; leave it "
                "out, or take offload = 'auto'."
            )
    if fixed and cluster.host_lacks:
        raise InputError(
            f"{said} needs the figure {cluster.host_lacks} of {cluster.type_name}, "
            "which nobody has published; take offload = [], or give the figure in the "
            "[host] table of a cluster file of your own."
        )
    return (fixed,)
