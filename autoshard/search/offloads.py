"""What the search may keep in the host's memory, and what that takes at least."""

from __future__ import annotations

import itertools

import numpy as np

from autoshard.cost import Pricer
from autoshard.cost.collectives import Meshes
from autoshard.cost.offload import Offload, Offloading
from autoshard.ir.errors import InputError
from autoshard.plan.cluster import Cluster
from autoshard.plan.strategy import OFFLOADABLE, Strategy

_WHY = {
    "optimizer": "the program has no optimizer state",
    "params": "the program has no parameters",
    "activations": "no loop over blocks keeps any for a backward pass",
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


def least_s(
    pricer: Pricer,
    meshes: Meshes,
    floor_s: np.ndarray,
    sets: tuple[Offload, ...],
    stages: np.ndarray,
    limit_bytes: float,
) -> np.ndarray:
    """Seconds a step takes at least, as its state has to fit; infinite if it cannot.

    Some state may have to be offloaded for that. The update of a stage takes no less
    than it takes that state to come in, and the bound on the rest of the step has no
    part of the update in it. The fullest stage has no less than the average one.

    Args:
        pricer: Of the structure.
        meshes: The candidates.
        floor_s: Seconds that their forward and backward passes take at least.
        sets: What may be offloaded.
        stages: Of each candidate.
        limit_bytes: Of a chip's memory.
    """
    held = pricer.liveness.state_bytes(meshes)
    whole = sum(held.values(), np.zeros(len(meshes)))
    found = np.full(len(meshes), np.inf)
    for offload in sets:
        moved = sum((held.get(k, 0.0) for k in offload), np.zeros(len(meshes)))
        fits = (whole - moved) / stages <= limit_bytes
        if offload:
            in_s = moved / stages / meshes.cluster.host_bytes_per_s
            # Of several stages, what the slowest waits for others may hide it.
            bound = np.where(stages == 1, floor_s + in_s, np.maximum(floor_s, in_s))
        else:
            bound = floor_s
        found = np.where(fits, np.minimum(found, bound), found)
    return found
