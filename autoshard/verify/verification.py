"""A plan against what the compiler of its own chips makes of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from autoshard.plan.schema import Collective, Plan
from autoshard.verify.aot import Compiled, CompiledMemory, OutOfMemory, compile_for
from autoshard.verify.clocks import CompilerTime, gpu_time, tpu_time
from autoshard.verify.comparison import (
    AS_PLANNED,
    CUT,
    OTHER_AXES,
    OTHER_BYTES,
    OTHER_KIND,
    UNEXPLAINED,
    Comparison,
)
from autoshard.verify.hlo import Emitted, collectives
from autoshard.verify.match import compare
from autoshard.verify.module import Module
from autoshard.verify.targets import Target

_AFFINE = ("planned_runs", "emitted_runs", "planned_bytes", "emitted_bytes")

Side = tuple[str, tuple[str, ...], str]
"""Kind, axes and source line."""


@dataclass(frozen=True, slots=True)
class Row:
    """Collectives that are planned alike and emitted alike.

    Attributes:
        verdict: A form of `comparison.FORMS` or a cause of `comparison.CAUSES`.
        agrees: Whether it is a form.
        planned: What was planned, if anything.
        emitted: What was emitted, if anything.
        planned_runs: Runs of all planned ones in a step.
        emitted_runs: Runs of all emitted ones in a step.
        planned_bytes: Bytes of all planned runs.
        emitted_bytes: Bytes of all emitted runs.
    """

    verdict: str
    agrees: bool
    planned: tuple[Side, ...]
    emitted: tuple[Side, ...]
    planned_runs: int
    emitted_runs: int
    planned_bytes: int
    emitted_bytes: int


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of compiling a plan.

    Attributes:
        target: The compiler and the devices, such as `tpu v5e:16x16`.
        planned_memory_bytes: Bytes per device at the peak, as planned.
        capacity_bytes: Memory of one device; None where the target says none.
        compiled: What the compiler allocates; None where it refused.
        refused: Why it refused, for want of memory.
        planned_compute_s: Time of all that is not a collective, as planned.
        counted_compute_s: The same kernels at the rates by which the compiler counts
            in its estimates; None where these are not known.
        planned_collective_s: Time of collectives, as planned.
        time: The compiler's own estimate, where it makes one.
        comparison: Collectives against those of the program that runs; None where the
            compiler refused.
        partitioned: The same against the program right after partitioning, where the
            compiler shows it.
        rematerialized: XLA's warnings that it gathered a whole array for want of
            another way from one sharding to the next.
        rows: The comparison, alike ones together.
        blocks: Numbers of blocks that were compiled, where the figures are reckoned
            from these; empty where the plan's own program was compiled.
        compile_s: Seconds the compiler took.
    """

    target: str
    planned_memory_bytes: int
    capacity_bytes: int | None
    compiled: CompiledMemory | None
    refused: OutOfMemory | None
    planned_compute_s: float
    counted_compute_s: float | None
    planned_collective_s: float
    time: CompilerTime | None
    comparison: Comparison | None
    partitioned: Comparison | None
    rematerialized: tuple[str, ...]
    rows: tuple[Row, ...]
    blocks: tuple[int, ...]
    compile_s: float

    @property
    def fits(self) -> bool | None:
        """Whether it fits in memory; None where the target has no limit."""
        if self.refused is not None:
            return False
        if self.capacity_bytes is None or self.compiled is None:
            return None
        return self.compiled.peak_bytes <= self.capacity_bytes

    @property
    def step_s(self) -> float:
        """Seconds a step: the compiler's, and planned ones where it has none."""
        time = self.time
        compute_s = time.compute_s if time else self.planned_compute_s
        moved_s = time.collective_s if time else None
        return compute_s + (self.planned_collective_s if moved_s is None else moved_s)

    @property
    def memory_error(self) -> float | None:
        """By which part of the compiled memory the planned is more."""
        if self.compiled is None:
            return None
        return self.planned_memory_bytes / max(1, self.compiled.peak_bytes) - 1

    @property
    def exact_fraction(self) -> float | None:
        """Bytes emitted just as planned, of the larger side."""
        if self.comparison is None:
            return None
        most = max(self.comparison.planned_bytes, self.comparison.emitted_bytes)
        exact = self.comparison.by_form().get(AS_PLANNED, 0)
        return exact / most if most else 1.0

    @property
    def unexplained(self) -> int:
        """Differences whose cause is not known."""
        return len(self.comparison.unexplained) if self.comparison else 0


def verify_lowered(plan: Plan, lowered: Any, target: Target) -> Verification:
    """Compiles a lowered step for a target and holds it against the plan.

    Args:
        plan: What the step was lowered from.
        lowered: The step after `.lower(...)`, over the target's devices.
        target: From `target_of`.

    Raises:
        InputError: The compiler fails for another reason than memory, or its output
            cannot be read.

    >>> import autoshard as ash, jax.numpy as jnp
    >>> args = jnp.ones((8, 4)), jnp.ones((16, 8))
    >>> fn = lambda w, x: (x @ w).sum()
    >>> plan = ash.search(fn, *args, cluster="cpu:1", strategy="dp")
    >>> step = ash.parallelize(fn, plan, *args)
    >>> target = Target("host", "host:1", None, 1)
    >>> verify_lowered(plan, step.jitted.lower(*args), target).unexplained
    0
    """
    compiled = compile_for(lowered, target)
    sizes = {axis.axis: axis.size for axis in plan.axes}
    planned = plan.predicted.collectives
    comparison = partitioned = time = None
    if compiled.refused is None:
        module = Module(compiled.text)
        several = target.num_chips > 1
        found = collectives(module, sizes) if several else ()
        comparison = compare(planned, found)
        time = _time(module, target)
        if compiled.partitioned:
            early = collectives(Module(compiled.partitioned), sizes)
            partitioned = compare(planned, early)
    return _verification(plan, target, compiled, comparison, partitioned, time)


def _time(module: Module, target: Target) -> CompilerTime | None:
    if target.clock_hz is not None:
        return tpu_time(module, target.clock_hz)
    return gpu_time(module) if target.estimates else None


def _verification(
    plan: Plan,
    target: Target,
    compiled: Compiled,
    comparison: Comparison | None,
    partitioned: Comparison | None,
    time: CompilerTime | None,
) -> Verification:
    predicted = plan.predicted
    return Verification(
        target=f"{target.kind} {target.name}",
        planned_memory_bytes=predicted.memory.total,
        capacity_bytes=target.cluster.hbm_bytes if target.cluster else None,
        compiled=compiled.memory,
        refused=compiled.refused,
        planned_compute_s=predicted.matmul_s + predicted.memory_bound_s,
        counted_compute_s=predicted.counted_compute_s,
        planned_collective_s=predicted.collective_s,
        time=time,
        comparison=comparison,
        partitioned=partitioned,
        rematerialized=compiled.rematerialized,
        rows=rows(comparison) if comparison else (),
        blocks=(),
        compile_s=compiled.compile_s,
    )


def rows(comparison: Comparison) -> tuple[Row, ...]:
    """A comparison with alike ones together, differences first, the most bytes first.

    >>> from autoshard.plan.schema import Collective
    >>> plan = Collective(kind="all_reduce", axes=("data",), bytes_=64, count=2,
    ...                   time_s=0.0, source="m.py:3:0 (f)", address="dot#0", value="w")
    >>> got = Emitted("all_reduce", ("data",), 64, 2, "jit(f)/dot", "m.py:3", "ar.1")
    >>> [(r.verdict, r.planned_runs) for r in rows(compare([plan, plan], [got, got]))]
    [('as planned', 4)]
    """
    found: dict[tuple[Any, ...], list[int]] = {}

    def add(
        verdict: str,
        agrees: bool,
        planned: Iterable[Collective],
        emitted: Iterable[Emitted],
    ) -> None:
        p, e = tuple(planned), tuple(emitted)
        key = (verdict, agrees, _sides(p), _sides(e))
        sums = found.setdefault(key, [0, 0, 0, 0])
        sums[0] += sum(c.count for c in p)
        sums[1] += sum(c.count for c in e)
        sums[2] += sum(c.bytes_ * c.count for c in p)
        sums[3] += sum(c.bytes_ * c.count for c in e)

    for agreement in comparison.agreements:
        add(agreement.form, True, [agreement.planned], agreement.emitted)
    for difference in comparison.differences:
        add(difference.cause, False, difference.planned, difference.emitted)
    made = [Row(*key, *sums) for key, sums in found.items()]
    return tuple(sorted(made, key=_rank))


def _rank(row: Row) -> tuple[bool, int]:
    return row.agrees, -max(row.planned_bytes, row.emitted_bytes)


def _sides(items: Iterable[Collective | Emitted]) -> tuple[Side, ...]:
    return tuple(dict.fromkeys(side(item) for item in items))


def side(item: Collective | Emitted) -> Side:
    """What a row says of a collective."""
    if isinstance(item, Collective) and ":" not in item.source:
        return item.kind, tuple(item.axes), item.source  # words, such as "output"
    # Of the plan's `file:line:column (function)` the first two; paths as imported.
    file, _, rest = item.source.split(" ")[0].partition(":")
    for root in sorted(map(os.path.abspath, sys.path), key=len, reverse=True):
        file = file.removeprefix(os.path.join(root, ""))
    line = f"{file}:{rest.split(':')[0]}" if file else ""
    return item.kind, tuple(item.axes), line


@dataclass(frozen=True, slots=True)
class Unplanned:
    """What a compiler moves that no plan says.

    Attributes:
        bytes_: Bytes of all runs.
        lines: The lines it is moved for, `file:line`.
    """

    bytes_: int
    lines: frozenset[str]


_NOT_SO = frozenset((OTHER_AXES, OTHER_BYTES, OTHER_KIND, CUT, UNEXPLAINED))


def unplanned(found: Verification) -> Unplanned:
    """What XLA added, and what it moves for an op in place of what is planned.

    Taken right after partitioning where that is shown: later passes only rewrite.
    """
    comparison = found.partitioned or found.comparison
    bytes_, lines = 0, set()
    for difference in comparison.differences if comparison else ():
        alone = bool(difference.emitted) and not difference.planned
        if not alone and difference.cause not in _NOT_SO:
            continue
        bytes_ += max(difference.planned_bytes, difference.emitted_bytes)
        sides = (*difference.planned, *difference.emitted)
        lines |= {side(item)[2] for item in sides}
    return Unplanned(bytes_, frozenset(line for line in lines if ":" in line))


def beyond(
    plan: Plan, one: Verification, two: Verification, blocks: tuple[int, int, int]
) -> Verification:
    """Figures of a deep program, from those of two shallow ones.

    Time, memory and collectives are affine in the number of blocks.

    Args:
        plan: Of the deep program; its own figures are not reckoned.
        one: The program of `blocks[0]` blocks.
        two: The program of `blocks[1]`.
        blocks: These two numbers, and that of the deep program.

    Returns:
        The verification of the deep program; its comparison is that of `two`.
    """
    few, more, all_ = blocks
    step = more - few
    turns = (all_ - more) // step
    memory = two.compiled
    if one.compiled is not None and two.compiled is not None:
        memory = two.compiled.beyond(one.compiled, turns)
    time = two.time
    if one.time is not None and two.time is not None:
        time = _time_beyond(one.time, two.time, turns)
    before = {_key(row): row for row in one.rows}
    reckoned = []
    for row in two.rows:
        had = before.get(_key(row))
        changed = {
            name: max(0, now + turns * (now - (getattr(had, name) if had else 0)))
            for name in _AFFINE
            for now in [getattr(row, name)]
        }
        reckoned.append(replace(row, **changed))
    predicted = plan.predicted
    return replace(
        two,
        planned_memory_bytes=predicted.memory.total,
        planned_compute_s=predicted.matmul_s + predicted.memory_bound_s,
        counted_compute_s=predicted.counted_compute_s,
        planned_collective_s=predicted.collective_s,
        compiled=memory,
        refused=two.refused,
        time=time,
        rows=tuple(sorted(reckoned, key=_rank)),
        blocks=(few, more),
        compile_s=one.compile_s + two.compile_s,
    )


def _key(row: Row) -> tuple[Any, ...]:
    return row.verdict, row.agrees, row.planned, row.emitted


def _time_beyond(one: CompilerTime, two: CompilerTime, turns: int) -> CompilerTime:
    collective_s = two.collective_s
    if one.collective_s is not None and two.collective_s is not None:
        collective_s = two.collective_s + turns * (two.collective_s - one.collective_s)
    return CompilerTime(
        compute_s=two.compute_s + turns * (two.compute_s - one.compute_s),
        collective_s=collective_s,
        unknown=two.unknown,
    )
