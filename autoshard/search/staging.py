"""Meshes with stages that a program can be cut into."""

from __future__ import annotations

import numpy as np

from autoshard.cost.segments import Segments
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.plan.strategy import Strategy
from autoshard.search import space
from autoshard.search.priced import STAGE


def staged_as_can_be(
    rows: np.ndarray, strategy: Strategy, segments: Segments
) -> np.ndarray:
    """Meshes with no more stages than there are blocks, and schedules for them.

    Raises:
        InfeasibleError: The strategy fixes more stages than that.
    """
    stages = rows[:, STAGE]
    most = segments.blocks
    if not (stages <= most).any():
        why = f", as {segments.why}" if segments.why else " blocks"
        raise InfeasibleError(
            f"stage = {strategy.mesh['stage']}{strategy.where('stage')} asks for more "
            f"stages than the program can be cut into, {most}{why}. Take no more than "
            "that, or leave stage = 'auto'."
        )
    rows = _for_blocks(rows[stages <= most], strategy, segments)
    wished = strategy.schedule.pipeline not in ("auto", "none")
    several = rows[:, STAGE] > 1
    # A schedule that is fixed is not followed where there is one stage.
    return rows[several] if wished and several.any() else rows


def _for_blocks(rows: np.ndarray, strategy: Strategy, segments: Segments) -> np.ndarray:
    """Meshes with as many stages as the blocks that are fixed are for.

    Raises:
        InputError: There are not as many blocks in the program.
        InfeasibleError: No mesh has as many stages.
    """
    blocks = strategy.schedule.blocks
    if not blocks:
        return rows
    said = f"blocks = {list(blocks)}{strategy.where('blocks')}"
    if sum(blocks) != segments.blocks:
        raise InputError(
            f"{said} cuts {sum(blocks)} blocks into stages, and the program has "
            f"{segments.blocks}; give every stage its blocks, in order."
        )
    parts = {how.virtual for how in space.pipelines(strategy)}
    fits = np.isin(rows[:, STAGE], [len(blocks) / part for part in parts])
    if not fits.any():
        raise InfeasibleError(
            f"{said} is for {len(blocks)} parts of stages, and no mesh has as many: "
            f"stage = {strategy.mesh['stage']}, virtual = {strategy.schedule.virtual}."
        )
    return rows[fits]
