"""Layouts by numbers: the whole grid for a model, chips and batch, priced at once.

This is not the search that users call. It is for published rows that plans do not
express yet, and stays with what the row's own software does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import numpy as np

from autoshard.cost.memory import memory, too_large
from autoshard.cost.network import Fabric
from autoshard.cost.run import Layout, Recompute, Run, Runs, Schedule, Vector
from autoshard.cost.step import StepTime, predict
from autoshard.validation.remat import recompute
from autoshard.validation.rows import Row

AT_ONCE = 100_000
"""Layouts priced together; more would take more memory and no less time."""

LEAST_PIECE = 1024
"""Fewest positions that a sequence is cut into for context parallelism."""

MOST_TENSOR = 64

Cell = tuple[float, ...]
"""Numbers of a layout in the order of `NUMBERS`, then indices of its schedule and of
what it recomputes."""

NUMBERS = (
    *("data", "shard", "zero", "tensor", "sequence", "context", "expert", "stage"),
    *("virtual", "microbatch", "microbatches"),
)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
POLICIES = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class Best:
    """A row's layout by numbers, and the best of the grid.

    Attributes:
        row: As published.
        inside: Whether the row's layout is one of the grid.
        published_s: Seconds a step of the published layout.
        fits: Whether it is predicted to fit in memory.
        found: The best layout that fits; None where none does.
        found_s: Its seconds.
        terms_s: By name, seconds that the found layout takes more (or less).
        bytes_: Peak of a chip: published, found.
        layouts: How many there were.
    """

    row: Row
    inside: bool
    published_s: float
    fits: bool
    found: Layout | None
    found_s: float
    terms_s: dict[str, float]
    bytes_: tuple[float, float]
    layouts: int


def compare(rows: Sequence[Row]) -> Iterator[Best]:
    """Holds each row's layout against the grid of its model, chips and batch."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        run = row.run
        layout = run.layout
        same = (run.decoder, run.cluster.fingerprint, run.seq, round(run.tokens))
        how = (run.software.name, run.software, run.dtype, run.slices)
        groups.setdefault((*same, *how, layout.capacity, layout.frozen), []).append(row)
    for own in groups.values():
        yield from _group(own)


def _group(rows: list[Row]) -> Iterator[Best]:
    run = rows[0].run
    kept = policies([row.run for row in rows])
    grid = np.array(list(cells(run, len(kept))), dtype=np.float64)
    best, found_s = None, np.inf
    for start in range(0, len(grid), AT_ONCE):
        part = grid[start : start + AT_ONCE]
        runs = gathered(run, part, kept)
        step_s = np.where(too_large(runs), np.inf, predict(runs).step_s)
        k = int(step_s.argmin())
        if step_s[k] < found_s:
            best, found_s = part[k], float(step_s[k])
    found = layout_of(run, best, kept) if best is not None else None
    for row in rows:
        pair = [row.run] + ([replace(run, layout=found)] if found else [])
        runs = Runs.of(pair)
        step, peak = predict(runs), memory(runs).peak_bytes
        yield Best(
            row=row,
            inside=bool((grid == cell_of(row.run.layout, kept)).all(axis=1).any()),
            published_s=float(step.step_s[0]),
            fits=not bool(too_large(runs)[0]),
            found=found,
            found_s=found_s,
            terms_s=_terms(step) if found else {},
            bytes_=(float(peak[0]), float(peak[-1])),
            layouts=len(grid),
        )


def _terms(step: StepTime) -> dict[str, float]:
    parts = {f.name: getattr(step, f.name) for f in fields(StepTime)}
    return {name: float(part[1] - part[0]) for name, part in parts.items()}


def policies(runs: Sequence[Run]) -> list[Recompute]:
    """What the runs' software may recompute: as documented, and as in these rows."""
    software = runs[0].software
    found = [recompute(words, software) for words in POLICIES]
    found += [run.layout.recompute for run in runs]
    return list(dict.fromkeys(each for each in found if each is not None))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def cells(run: Run, policies: int) -> Iterator[Cell]:
    """Every layout of the grid.

    Args:
        run: Model, cluster, sequence, software; of its layout only chips and batch.
        policies: How many ways to recompute there are.
    """
    decoder, chips = run.decoder, run.layout.chips
    batch = round(run.tokens / run.seq)
    ways = [d for d in _divisors(chips) if d <= MOST_TENSOR and not decoder.heads % d]
    for tensor in ways:
        for context in _divisors(chips // tensor):
            if run.seq % context or (context > 1 and run.seq < LEAST_PIECE * context):
                continue
            for stage in _divisors(chips // tensor // context):
                data = chips // tensor // context // stage
                if stage > decoder.layers + 2 or batch % data or data % run.slices:
                    continue
                yield from _rest(run, policies, tensor, context, stage, data, batch)


def _rest(
    run: Run, policies: int, tensor: int, context: int, stage: int, data: int,
    batch: int,
) -> Iterator[Cell]:  # fmt: skip
    every = data * context
    experts = [
        d for d in _divisors(max(run.decoder.experts, 1)) if not every * tensor % d
    ]
    for cell in itertools.product(
        _sharded(every // run.slices, stage),
        (0.0, 1.0) if tensor > 1 else (0.0,),
        experts,
        _pipelines(run, stage),
        _divisors(batch // data),
        range(policies),
    ):
        (zero, shard), sequence, expert, (virtual, schedule), cuts, policy = cell
        if schedule == SCHEDULES.index("interleaved") and cuts % stage:
            continue  # parts of a stage take turns with so many microbatches
        size = batch / (data * cuts)
        yield (
            *(data, shard, zero, tensor, sequence, context, expert, stage, virtual),
            *(size, cuts, schedule, policy),
        )


def _sharded(every: int, stage: int) -> list[tuple[int, int]]:
    """`(zero, shard)` for so many replicas in a slice."""
    if every == 1:
        return [(0, 1)]
    found = [(0, 1), (1, every), (2, every), (3, every)]
    if stage == 1:  # groups of replicas that each hold all parameters
        found += [(3, d) for d in _divisors(every) if 1 < d < every]
    return found


def _pipelines(run: Run, stage: int) -> list[tuple[int, int]]:
    """`(parts of a stage, index of the schedule)`."""
    plain, interleaved = SCHEDULES.index("1f1b"), SCHEDULES.index("interleaved")
    found = [(1, plain)]
    if stage == 1:
        return found
    layers = run.decoder.layers
    # Where layers do not divide, the embedding and the head are given a layer's place.
    rows = {-(-count // stage) for count in (layers, layers + 2)}
    parts = {part for count in rows for part in _divisors(count) if part > 1}
    found += [(part, interleaved) for part in sorted(parts)]
    if run.software.name == "zero-bubble":
        found += [(1, k) for k, s in enumerate(SCHEDULES) if s.startswith("zb")]
    return found


def cell_of(layout: Layout, kept: Sequence[Recompute]) -> Cell:
    """A layout as a cell of the grid, state sharded one way being none at all."""
    numbers = {name: float(getattr(layout, name)) for name in NUMBERS}
    if layout.shard == 1:
        numbers["zero"] = 0.0
    if layout.tensor == 1:
        numbers["sequence"] = 0.0
    return (
        *numbers.values(),
        float(SCHEDULES.index(layout.schedule)),
        float(kept.index(layout.recompute)),
    )


def layout_of(run: Run, cell: Vector, kept: Sequence[Recompute]) -> Layout:
    """The layout of a cell; what no number says is the run's."""
    *numbers, schedule, policy = cell.tolist()
    named: dict[str, Any] = dict(zip(NUMBERS, numbers, strict=True))
    whole = {name: int(value) for name, value in named.items() if name != "microbatch"}
    named |= whole | {"sequence": bool(whole["sequence"])}
    return replace(
        run.layout,
        **named,
        schedule=SCHEDULES[int(schedule)],
        recompute=kept[int(policy)],
    )


def gathered(run: Run, grid: Vector, kept: Sequence[Recompute]) -> Runs:
    """The runs of cells, as `Runs.of` gathers them but without an object for each.

    Args:
        run: Whose model, cluster and software they share.
        grid: float64[run, number], as `Cell`.
        kept: What the last number counts.
    """
    count = len(grid)
    scheduled = [
        replace(run, layout=replace(run.layout, schedule=name)) for name in SCHEDULES
    ]
    one = Runs.of([run])

    def all_of(values: Any) -> Any:
        return np.full(count, values[0])

    size = {name: all_of(values) for name, values in one.size.items()}
    size |= {name: grid[:, k] for k, name in enumerate(NUMBERS)}
    policy = grid[:, -1].astype(int)
    for f in fields(Recompute):
        size[f"again_{f.name}"] = np.array([getattr(r, f.name) for r in kept])[policy]
    names = [f.name for f in fields(Fabric) if f.name != "kind"]
    fabric = Fabric(
        one.fabric.kind, **{n: all_of(getattr(one.fabric, n)) for n in names}
    )
    arrays = ("peak", "peak_16", "hbm", "power", "torus", "dims", "node", "generation")
    return Runs(
        runs=tuple(scheduled[int(k)] for k in grid[:, -2]),
        size=size,
        fabric=fabric,
        **{name: all_of(getattr(one, name)) for name in arrays},
    )
