"""How a verified plan is shown: as tables, and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from autoshard.report.table import bullets, heading, new_table
from autoshard.report.units import bytes_text, percent_text, seconds_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from autoshard.plan.schema import Plan
    from autoshard.verify import Comparison, Row, Verification

ROWS = 40
"""Rows of the table of collectives; --json has all."""


def as_dict(found: Verification) -> dict[str, Any]:
    """A verification for programs."""
    memory, time, refused = found.compiled, found.time, found.refused
    return {
        "target": found.target,
        "blocks_compiled": list(found.blocks),
        "compile_s": found.compile_s,
        "fits": found.fits,
        "refused": None
        if refused is None
        else {
            "message": refused.message,
            "needed_bytes": refused.needed_bytes,
            "available_bytes": refused.available_bytes,
        },
        "memory": {
            "planned_bytes": found.planned_memory_bytes,
            "capacity_bytes": found.capacity_bytes,
            "relative_error": found.memory_error,
            "compiled": None
            if memory is None
            else {
                "argument_bytes": memory.argument_bytes,
                "output_bytes": memory.output_bytes,
                "alias_bytes": memory.alias_bytes,
                "temp_bytes": memory.temp_bytes,
                "peak_bytes": memory.peak_bytes,
                "reported_bytes": memory.reported_bytes,
            },
        },
        "time": {
            "planned_compute_s": found.planned_compute_s,
            "counted_compute_s": found.counted_compute_s,
            "planned_collective_s": found.planned_collective_s,
            "compiler_compute_s": time.compute_s if time else None,
            "compiler_collective_s": time.collective_s if time else None,
            "ops_without_estimate": time.unknown if time else None,
        },
        "collectives": None
        if found.comparison is None
        else {
            **_comparison(found.comparison),
            # The rows are of the whole program all the same.
            "of_blocks": found.blocks[-1] if found.blocks else None,
            "exact_fraction": found.exact_fraction,
            "rows": [_row(row) for row in found.rows],
        },
        "partitioned": None
        if found.partitioned is None
        else _comparison(found.partitioned),
        "rematerialized": list(found.rematerialized),
    }


def _comparison(one: Comparison) -> dict[str, Any]:
    return {
        "planned_bytes": one.planned_bytes,
        "emitted_bytes": one.emitted_bytes,
        "matched_bytes": one.matched_bytes,
        "fraction": one.fraction,
        "unexplained": len(one.unexplained),
        "forms_bytes": one.by_form(),
        "causes_bytes": one.by_cause(),
        "differences": [str(difference) for difference in one.differences],
    }


def _row(row: Row) -> dict[str, Any]:
    def sides(items: Any) -> list[dict[str, Any]]:
        return [{"kind": k, "axes": list(a), "source": s} for k, a, s in items]

    return {
        "verdict": row.verdict,
        "agrees": row.agrees,
        "planned": sides(row.planned),
        "emitted": sides(row.emitted),
        "planned_runs": row.planned_runs,
        "emitted_runs": row.emitted_runs,
        "planned_bytes": row.planned_bytes,
        "emitted_bytes": row.emitted_bytes,
    }


def report(found: Verification) -> RenderableType:
    """A verification for people."""
    parts: list[RenderableType] = [_summary(found)]
    if found.comparison is not None:
        parts += [heading("Collectives of a step, planned and emitted"), _rows(found)]
        if len(found.rows) > ROWS:
            parts.append(
                Text(f"... and {len(found.rows) - ROWS} more; --json has all.")
            )
        parts += [heading("Of all bytes"), _shares(found)]
        unexplained = found.comparison.unexplained
        if unexplained:
            parts += [heading("Without a known cause"), bullets(map(str, unexplained))]
    if found.rematerialized:
        parts.append(heading("Gathered whole on every device, as XLA warns"))
        parts.append(bullets(found.rematerialized))
    return Group(*parts)


def _summary(found: Verification) -> Table:
    table = new_table(found.target)
    for name in ("planned", "compiler", "planned / compiler"):
        table.add_column(name, justify="right")

    def add(name: str, *cells: str) -> None:
        table.add_row(Text(name), *(Text(cell) for cell in cells))

    memory, time, refused = found.compiled, found.time, found.refused
    if memory is not None:
        add(
            "memory at the peak",
            *_pair(found.planned_memory_bytes, memory.peak_bytes, bytes_text),
        )
        add("- arguments", "", bytes_text(memory.argument_bytes), "")
        add("- outputs", "", bytes_text(memory.output_bytes), "")
        add("- of these in the place of arguments", "", _less(memory.alias_bytes), "")
        add("- temporaries", "", bytes_text(memory.temp_bytes), "")
    if refused is not None:
        needed = refused.needed_bytes
        add(
            "memory at the peak",
            bytes_text(found.planned_memory_bytes),
            f"{bytes_text(needed)} or more" if needed else "refused",
            "",
        )
    if found.capacity_bytes is not None:
        add("memory of a chip", bytes_text(found.capacity_bytes), "", "")
    verdict = {True: "fits", False: "does not fit", None: "no limit"}[found.fits]
    planned = (
        found.capacity_bytes is None
        or found.planned_memory_bytes <= found.capacity_bytes
    )
    add("verdict", "fits" if planned else "does not fit", verdict, "")
    compute = time.compute_s if time else None
    if found.counted_compute_s is None:
        add("time of compute", *_pair(found.planned_compute_s, compute, seconds_text))
    else:
        add("time of compute", seconds_text(found.planned_compute_s), "", "")
        counted = _pair(found.counted_compute_s, compute, seconds_text)
        add("- at the rates that the compiler counts with", *counted)
    moved = time.collective_s if time else None
    add("time of collectives", *_pair(found.planned_collective_s, moved, seconds_text))
    if time is not None and time.unknown:
        add("- ops that the compiler gives no time", "", str(time.unknown), "")
    add("compiled in", "", seconds_text(found.compile_s), "")
    if found.blocks:
        names = " and ".join(map(str, found.blocks))
        how = "reckoned from" if len(found.blocks) > 1 else "of a program of only"
        add(f"{how} {names} block{'s' if names != '1' else ''}", "", "", "")
    if refused is not None:
        table.caption = refused.message
    return table


def _less(bytes_: int) -> str:
    return f"-{bytes_text(bytes_)}" if bytes_ else bytes_text(0)


def _pair(planned: float, compiled: float | None, text: Any) -> tuple[str, str, str]:
    if compiled is None:
        return text(planned), "not estimated", ""
    ratio = f"{100 * (planned / compiled - 1):+.1f} %" if compiled else "-"
    return text(planned), text(compiled), ratio


def _rows(found: Verification) -> Table:
    table = new_table("planned", "emitted")
    table.add_column("runs", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in found.rows[:ROWS]:
        table.add_row(
            Text(_sides(row.planned)),
            Text("same" if row.planned == row.emitted else _sides(row.emitted)),
            _both(row.planned_runs, row.emitted_runs, str),
            _both(row.planned_bytes, row.emitted_bytes, bytes_text),
            Text(row.verdict),
        )
    return table


def _sides(items: Any) -> str:
    return "\n".join(f"{k} {'+'.join(a)} {s or 'no line'}" for k, a, s in items) or "-"


def _both(planned: int, emitted: int, text: Any) -> str:
    if planned == emitted:
        return text(planned)
    return f"{text(planned)} / {text(emitted)}"


def _shares(found: Verification) -> Table:
    both = [c for c in (found.partitioned, found.comparison) if c is not None]
    name = "bytes a step"
    if found.blocks:
        name += f" of {found.blocks[-1]} block{'s' if found.blocks[-1] > 1 else ''}"
    table = new_table(name)
    if found.partitioned is not None:
        table.add_column("after partitioning", justify="right")
    table.add_column("in the end", justify="right")

    def add(name: str, cells: list[str]) -> None:
        table.add_row(Text(name), *cells)

    add("planned", [bytes_text(one.planned_bytes) for one in both])
    add("emitted", [bytes_text(one.emitted_bytes) for one in both])
    add("of them alike", [percent_text(one.fraction) for one in both])
    for sums in ([one.by_form() for one in both], [one.by_cause() for one in both]):
        for name in dict.fromkeys(name for each in sums for name in each):
            add(f"- {name}", [bytes_text(each.get(name, 0)) for each in sums])
    return table


def ranking(ranked: Sequence[tuple[Plan, Verification]]) -> RenderableType:
    """Plans of a search, the best by what the compiler says first."""
    table = new_table("", "mesh", "fits")
    for name in ("memory", "compiled", "step", "compute", "compiled", "unexplained"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, (plan, found) in enumerate(ranked, 1):
        memory, time = found.compiled, found.time
        table.add_row(
            str(rank),
            " ".join(f"{a.axis}={a.size}" for a in plan.axes if a.size > 1) or "-",
            {True: "yes", False: "no", None: "no limit"}[found.fits],
            bytes_text(found.planned_memory_bytes),
            bytes_text(memory.peak_bytes) if memory else "refused",
            seconds_text(plan.predicted.step_s),
            seconds_text(found.planned_compute_s),
            seconds_text(time.compute_s) if time else "-",
            str(found.unexplained),
        )
    return table
