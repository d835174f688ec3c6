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
    sets: tuple[Offload, ...],
    stages: np.ndarray,
    step_s: np.ndarray,
    rest_s: np.ndarray,
    floor_bytes: np.ndarray,
    limit_bytes: float | np.ndarray,
) -> np.ndarray:
    """Seconds a step takes at least, as it has to fit; infinite if it cannot.

    Some state may have to be offloaded for that. The update of a stage takes no less
    than it takes that state to come in. The bound on what is beside storage has no part
    of the update in it, and nothing that computation hides: the two add up. The fullest
    stage has no less state than the average one.

    Args:
        pricer: Of the structure.
        meshes: The candidates.
        sets: What may be offloaded.
        stages: Of each candidate.
        step_s: Seconds a step takes at least whatever is offloaded.
        rest_s: Seconds from `floors.rest_s`.
        floor_bytes: Of activations at least, float64[2, candidate]: with what is kept
            for the backward pass on the chip, and without that.
        limit_bytes: Of a chip's memory.
    """
    held = pricer.liveness.state_bytes(meshes)
    nothing = np.zeros(len(meshes))
    whole = sum(held.values(), nothing)
    found = np.full(len(meshes), np.inf)
    for offload in sets:
        moved = sum((held.get(kind, nothing) for kind in offload), nothing)
        # Activations come to it, but may be those of another stage.
        alive = (stages == 1) * floor_bytes[int("activations" in offload)]
        fits = (whole - moved) / stages + alive <= limit_bytes
        bound = step_s
        if offload:
            in_s = moved / stages / meshes.cluster.host_bytes_per_s
            # Of several stages, what the slowest waits for others may hide it.
            bound = np.maximum(step_s, in_s + (stages == 1) * rest_s)
        found = np.where(fits, np.minimum(found, bound), found)
    return found
