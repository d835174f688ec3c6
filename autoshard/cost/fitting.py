"""Bounds below which the memory of no candidate is, found without pricing it.

What is alive of activations hangs on rules and remat alone, see
`autoshard.cost.floors`; what is held of state is added to it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from autoshard.cost.collectives import Meshes, Rows, Vector
from autoshard.cost.floors import ROUNDING
from autoshard.cost.pipeline import Pipeline, bubble_share
from autoshard.cost.price import Pricer
from autoshard.cost.segments import BLOCK
from autoshard.cost.stages import PLACES, STAGE, Table, waiting


def alive_bytes(
    pricer: Pricer, meshes: Meshes, cuts: Vector, *, offloaded: bool = False
) -> Table:
    """Bytes of a chip that are alive of activations at least, however state is stored.

    Args:
        pricer: Of one layout with the rules.
        meshes: The candidates.
        cuts: float64[candidate]; microbatches.
        offloaded: Whether what is kept for the backward pass is in the host's memory.

    Returns:
        With all blocks on every chip, of one microbatch: of the program, of its blocks
        alone, and what of these waits for the backward pass, float64[3, candidate].
    """

    def alive(pricer: Pricer, part: Meshes, cuts: Vector, _rows: Rows) -> Table:
        live = pricer.liveness
        found = [
            each
            for each in live.activations(part, cuts)
            if not (offloaded and live.is_stash(each[0]))
        ]
        # Most is alive where something new is, but for what is amid others; and as long
        # as gradients are summed, see `held_bytes`.
        ends = [k for k in range(len(pricer.program.ops)) if k not in pricer.work.amid]
        begins = [bisect_left(ends, buffer.begin) for buffer, _, _ in found]
        points = sorted({ends[k] for k in begins if k < len(ends)})
        program, of_blocks = np.zeros((2, len(points) + 1, len(part)))
        stash = np.zeros(len(part))
        for buffer, size, within in found:
            begin = bisect_left(points, buffer.begin)
            end = bisect_right(points, buffer.end)
            for table in (program, of_blocks) if within else (program,):
                table[begin] += size
                table[end] -= size
            if within and live.is_stash(buffer):
                stash += size
        totals = (np.cumsum(table[:-1], axis=0) for table in (program, of_blocks))
        peaks = [total.max(axis=0, initial=0.0) for total in totals]
        return np.stack([*peaks, stash])

    return pricer.apart(meshes, cuts, alive)


def held_bytes(pricer: Pricer, meshes: Meshes, cuts: Vector) -> dict[str, Table]:
    """Bytes of a chip that hold state all along, all blocks on every chip.

    Those are the arguments, and sums of gradients over microbatches.

    Args:
        pricer: Of the layout.
        meshes: The candidates.
        cuts: float64[candidate]; microbatches.

    Returns:
        By state, of the program, and of its blocks alone, float64[2, candidate].
    """
    of_blocks = np.zeros((PLACES, len(meshes)))
    of_blocks[BLOCK] = 1.0
    live = pricer.liveness
    each = [
        live.state_bytes(meshes, share)
        | {"gradients": live.summed_bytes(meshes, cuts, share)}
        for share in (None, of_blocks)
    ]
    return {kind: np.stack([part[kind] for part in each]) for kind in each[0]}


def moved_bytes(
    pricer: Pricer, meshes: Meshes, cuts: Vector, kinds: Iterable[str]
) -> dict[str, Table]:
    """Bytes of a step between a chip and its host, were some kinds of state offloaded.

    Args:
        pricer: Of the layout.
        meshes: The candidates.
        cuts: float64[candidate]; microbatches.
        kinds: Which.

    Returns:
        By kind, in the forward passes, the backward passes and the update, all blocks
        on every chip, float64[3, candidate].
    """
    found: dict[str, Table] = {}
    for kind in kinds:
        held = pricer.liveness.held(kind, meshes, cuts)
        once = held.bytes_.sum(axis=0)
        none = np.zeros(len(meshes))
        if kind == "activations":
            rows = [once * cuts, once * cuts, none]
        elif kind == "params":
            passes = (held.forward, held.backward)
            rows = [*(cuts * each.sum(axis=0) for each in passes), once]
        else:
            rows = [none, none, once]
        found[kind] = np.stack(rows)
    return found


def most_blocks(
    pricer: Pricer,
    meshes: Meshes,
    cuts: Vector,
    how: Pipeline,
    of_step: Table,
    limit_s: float | Vector,
) -> Vector:
    """How many blocks a stage may have at most in a step that is not too slow.

    Where one of p stages has b of L blocks, which take B of all that is computed, W,
    the slowest takes X >= b B / L, and waits for a share u of the others:

        step >= X + u (W - X)

    Args:
        pricer: Of one layout with the rules.
        meshes: The candidates.
        cuts: float64[candidate]; microbatches.
        how: How stages take turns.
        of_step: W and B, float64[2, candidate].
        limit_s: What a step may take.
    """
    whole, of_blocks = of_step
    blocks = float(pricer.work.segments.blocks)
    zero_bubble = pricer.constants["pipeline.zero_bubble"]
    share = bubble_share(how.schedule, meshes.product(STAGE), cuts, zero_bubble)
    wait = share / cuts / how.virtual
    return _blocks_within(limit_s - wait * whole, (1 - wait) * of_blocks, blocks)


def _blocks_within(limit: float | Vector, whole: Vector, blocks: float) -> Vector:
    """How many of some blocks stay within a limit, where all of them take `whole`."""
    spare, each = np.asarray(limit), whole / blocks
    found = np.clip(spare, 0.0, whole) / np.maximum(each, np.finfo(float).tiny)
    found = np.floor(found * (1 + ROUNDING) + ROUNDING)
    return np.where(each > 0, found, np.where(spare >= 0, blocks, 0.0))


def waits(meshes: Meshes, cuts: Vector, pipelines: Sequence[Pipeline]) -> Table:
    """Other microbatches that wait in stages, float64[pipeline, place, candidate].

    The places are the first stage, those between, of which none has fewer than here,
    and the last.

    Args:
        meshes: The candidates.
        cuts: float64[candidate]; microbatches.
        pipelines: How stages may take turns.
    """
    counts = meshes.product(STAGE)
    found = np.zeros((len(pipelines), 3, len(meshes)))
    for own, how in zip(found, pipelines, strict=True):
        # A cut that is fixed may have more blocks in later stages.
        second = counts - 1 if how.blocks else 1 + 0 * counts
        for k, at in enumerate((0 * counts, second, counts - 1)):
            own[k] = waiting(how, at, counts, cuts)
    return found


def room(
    pricer: Pricer,
    meshes: Meshes,
    waits: Table,
    alive: Table,
    held: Table,
    limit_bytes: float | Vector,
    most: Table | None = None,
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether chips may be large enough, bool[candidate].

    A stage that has b of L blocks holds b / L of what these hold, and of as many other
    microbatches as wait there. So every stage has room for so many blocks; all stages
    together must have room for all of them.

    Args:
        pricer: Of one layout with the rules.
        meshes: The candidates.
        waits: From the function; of no pipeline where `stage` is an axis like any
            other.
        alive: From `alive_bytes`.
        held: From `held_bytes`.
        limit_bytes: Of a chip's memory.
        most: Blocks that a stage may have at most, float64[pipeline, candidate].
    """
    counts, blocks = meshes.product(STAGE), float(pricer.work.segments.blocks)
    whole, of_blocks, stash = alive
    one = held[0] + whole <= limit_bytes
    if not len(waits) or (counts == 1).all():
        return one
    rooms = _blocks_within(limit_bytes, held[1] + of_blocks + waits * stash, blocks)
    if most is not None:
        rooms = np.minimum(rooms, most[:, None])
    all_stages = rooms[:, 0] + (counts - 2) * rooms[:, 1] + rooms[:, 2]
    found = (all_stages >= blocks).any(axis=0)
    # The fullest stage has no less of all state than the average one.
    return np.where(counts > 1, found & (held[0] / counts <= limit_bytes), one)
