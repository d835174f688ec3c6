"""Published layouts as points of the space that the search looks through.

A row's model is traced as a program, its layout is the same program with fields fixed,
and the best plan of the whole space is held against the best with these. What a row
does not say (which dims of the vocabulary and of keys are sharded) is left to the
search, so that the published layout is taken at its best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from _expert_programs import DTYPES, program

from autoshard import api
from autoshard.cost.run import Layout, Recompute
from autoshard.ir.errors import AutoshardError, InfeasibleError
from autoshard.plan.schema import Plan
from autoshard.plan.strategy import STATES
from autoshard.search.explore import Explored
from autoshard.search.solver import Solver
from autoshard.validation.rows import Row

TERMS = {
    "matmul_s": "products",
    "memory_bound_s": "other kernels",
    "collective_s": "collectives",
    "bubble_s": "bubble",
    "transfer_s": "transfers between stages",
    "host_s": "transfers to the host",
}
"""Fields of an estimate that add up to its seconds, and what they are called."""

SCHEDULES = {"1f1b": "1f1b", "interleaved": "1f1b", "zb-h1": "zb-h1", "zb-2p": "zb-h2"}
"""Plans' pipelines by the schedules of published runs whose stages have one part."""

KEPT = 5
"""As many candidates as `Solver.plans` asks for, which then finds them priced."""


class NotExpressedError(Exception):
    """A plan of this search cannot be what a row says; the message says why."""


@dataclass(frozen=True, slots=True)
class Priced:
    """A plan and what it is predicted to take.

    Attributes:
        degrees: Devices by what they are used for.
        choices: What else tells it from other plans.
        step_s: Seconds a step; of a plan with its microbatches traced.
        searched_s: The same as the search prices it.
        terms_s: What they are made of.
        peak_bytes: Of a chip.
    """

    degrees: dict[str, int]
    choices: dict[str, Any]
    step_s: float
    searched_s: float
    terms_s: dict[str, float]
    peak_bytes: float


@dataclass(frozen=True, slots=True)
class Compared:
    """A row's layout and what is found for its model, chips and batch.

    Attributes:
        row: As published.
        published: Its layout, priced; None where nothing of it divides.
        fits: Whether that is predicted to fit in memory.
        found: The best of the space that fits; None where nothing does.
        numbers_s: The published layout by numbers, as the same software runs it.
        why: What the search says where one of the two is missing.
    """

    row: Row
    published: Priced | None
    fits: bool
    found: Priced | None
    numbers_s: float
    why: str = ""


def batch_of(row: Row) -> int:
    """Sequences of a row's step.

    Raises:
        NotExpressedError: They are not a whole number.
    """
    layout = row.run.layout
    whole = layout.data * layout.microbatch * layout.microbatches
    if abs(whole - round(whole)) > 1e-6 * whole:
        raise NotExpressedError("its batch is no whole number of sequences")
    return round(whole)


def key_of(row: Row) -> tuple[Any, ...]:
    """Arguments of `program` for a row.

    Raises:
        NotExpressedError: No program of the zoo is like it.
    """
    run = row.run
    if run.decoder.experts:
        raise NotExpressedError("experts")
    if run.dtype not in DTYPES:
        raise NotExpressedError("products in eight bits")
    if run.layout.frozen:
        raise NotExpressedError("frozen weights (LoRA)")
    if run.slices > 1:
        raise NotExpressedError("several TPU slices")
    fused = run.software.attention != "unfused"
    masters = run.software.param_bytes == 2 and run.dtype != "f32"
    return run.decoder, run.seq, batch_of(row), run.dtype, fused, masters


def pins_of(layout: Layout, axes: Sequence[str]) -> dict[str, Any]:
    """Fields of a strategy that a layout given by numbers fixes.

    Args:
        layout: As published.
        axes: Mesh axes that the search has.

    Raises:
        NotExpressedError: Plans have no such field.
    """
    if layout.stage > 1 and "stage" not in axes:
        raise NotExpressedError("pipeline stages")
    if layout.stage > 1 and layout.schedule not in SCHEDULES:
        raise NotExpressedError(f"the pipeline schedule {layout.schedule}")
    if layout.microbatches != int(layout.microbatches) or layout.microbatch < 1:
        raise NotExpressedError("fewer sequences in a microbatch than replicas")
    whole = (Recompute.full(True), Recompute.full(False))
    if layout.recompute.offloaded:
        raise NotExpressedError("activations are kept in the host's memory")
    if layout.recompute not in (Recompute(), *whole):
        raise NotExpressedError("parts of a block are recomputed")
    found: dict[str, Any] = {
        "context": layout.context,
        "tensor": layout.tensor,
        "microbatches": int(layout.microbatches),
        "remat": "full" if layout.recompute in whole else "none",
    }
    if "stage" in axes:
        found["stage"] = layout.stage
    if layout.stage > 1:
        name = "interleaved" if layout.virtual > 1 else SCHEDULES[layout.schedule]
        found |= {"pipeline": name, "virtual": layout.virtual}
    fsdp, over = _sharded(layout)
    found |= {"data": layout.data // fsdp, "fsdp": fsdp}
    for level, state in zip((3, 2, 1), STATES, strict=True):
        held = over if layout.zero >= level else ()
        found[f"storage.{state}"] = held
    if layout.tensor > 1:
        found |= {"rules.heads": ("tensor",), "rules.mlp": ("tensor",)}
        found["rules.seq.residual"] = ("tensor",) if layout.sequence else ()
    return found


def _sharded(layout: Layout) -> tuple[int, tuple[str, ...]]:
    """Size of `fsdp`, and the axes over which state is stored."""
    every = layout.data * layout.context
    if layout.zero == 0 or layout.shard == 1:
        return 1, ()
    with_context = ("context",) if layout.context > 1 else ()
    if layout.zero < 3 and layout.shard == every:
        return 1, ("data", *with_context)
    if layout.data % layout.shard == 0:
        return layout.shard, ("fsdp",)
    within = layout.shard // layout.context
    if layout.shard % layout.context == 0 and layout.data % max(within, 1) == 0:
        return within, ("fsdp", "context")
    raise NotExpressedError(
        f"state sharded {layout.shard} ways over {layout.data} x {layout.context}"
    )


def compare(
    rows: Sequence[Row], numbers_s: Sequence[float]
) -> Iterator[Compared | tuple[Row, str]]:
    """Holds rows against what the search finds, program by program.

    Args:
        rows: Published runs.
        numbers_s: Of each, its step as predicted by numbers.

    Yields:
        What was found, or a row that no plan expresses and why.
    """
    strategy = api.load_strategy("auto")
    programs: dict[tuple[Any, ...], list[tuple[Row, float, dict[str, Any]]]] = {}
    for row, by_numbers in zip(rows, numbers_s, strict=True):
        try:
            key = key_of(row)
            pins = pins_of(row.run.layout, tuple(strategy.mesh))
        except NotExpressedError as error:
            yield row, str(error)
            continue
        programs.setdefault(key, []).append((row, by_numbers, pins))
    for key, own in programs.items():
        solver: Solver | None = None
        best: dict[str, tuple[Solver, Priced | None, str]] = {}
        known: dict[Any, Compared] = {}
        for row, by_numbers, pins in own:
            chips = row.run.cluster
            if chips.fingerprint not in best:
                if solver is None:
                    step, batch = program(*key)
                    solver = Solver(step, (batch,), chips, strategy)
                solver = solver.on(chips)
                plan, why = _plan(solver)
                found = _priced(plan, solver.explored(KEPT)) if plan else None
                best[chips.fingerprint] = solver, found, why
            same = chips.fingerprint, *pins.values()
            if same not in known:
                there, found, why = best[chips.fingerprint]
                known[same] = _compared(row, there, pins, found, why, by_numbers)
            yield replace(known[same], row=row, numbers_s=by_numbers)


def _compared(
    row: Row,
    solver: Solver,
    pins: dict[str, Any],
    found: Priced | None,
    why: str,
    numbers_s: float,
) -> Compared:
    try:
        pinned = solver.pinned(pins)
        plan = pinned.smaller(float("inf"))
    except AutoshardError as error:
        return Compared(row, None, False, found, numbers_s, str(error))
    explored = pinned.explored()
    published = _priced(plan, explored) if plan else _too_large(explored)
    return Compared(row, published, plan is not None, found, numbers_s, why)


def _plan(solver: Solver) -> tuple[Plan | None, str]:
    """The best plan, or why there is none."""
    try:
        if not solver.explored(KEPT).ranked:
            return None, "nothing fits in memory"  # what would is not asked for here
        return solver.plans()[0], ""
    except InfeasibleError as error:
        return None, str(error)


def _too_large(explored: Explored) -> Priced:
    """The smallest of candidates of which none fits."""
    peak, number, k = min(
        (float(peak), number, k)
        for number, group in enumerate(explored.groups)
        for k, peak in enumerate(group.peak_bytes)
    )
    group = explored.groups[number]
    step_s = float(group.step_s[k])
    return Priced(*_described(group.filled(k)), step_s, step_s, {}, peak)


def _priced(plan: Plan, explored: Explored) -> Priced:
    predicted = plan.predicted
    terms = {words: getattr(predicted, name) for name, words in TERMS.items()}
    if abs(sum(terms.values()) - predicted.step_s) > 1e-6 * predicted.step_s:
        raise AssertionError(
            f"the terms {', '.join(TERMS)} add up to {sum(terms.values()):.6g} s and "
            f"the step takes {predicted.step_s:.6g} s: add what is missing to TERMS"
        )
    searched_s = next(
        step_s
        for step_s, _, number, k in explored.ranked
        if explored.groups[number].filled(k) == plan.strategy
    )
    memory = float(predicted.memory.total)
    described = _described(plan.strategy)
    return Priced(*described, predicted.step_s, searched_s, terms, memory)


def _described(strategy: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """Degrees and other choices of a strategy without holes."""
    sizes = strategy.mesh
    degrees = {
        "data": prod(sizes.get(axis, 1) for axis in ("data", "fsdp")),
        **{axis: sizes.get(axis, 1) for axis in ("tensor", "context", "stage")},
    }
    choices: dict[str, Any] = {
        f"{state} over": prod(sizes[axis] for axis in getattr(strategy.storage, state))
        for state in STATES
    }
    residual = [r.axes for r in strategy.rules if r.logical == "seq.residual"]
    by_sequence = degrees["tensor"] > 1 and residual == [("tensor",)]
    choices["sequence parallel"] = "yes" if by_sequence else "no"
    choices["remat"] = strategy.schedule.remat
    choices["microbatches"] = strategy.schedule.microbatches
    return degrees, choices
