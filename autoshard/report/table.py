"""A plan in a terminal: rich tables, drawn from the documents of `explain`.

Every string that comes from a plan goes into a `Text`, so that square brackets in a
path or a note are shown and not read as markup.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoshard.plan.schema import Plan
from autoshard.report.explain import Document, explain
from autoshard.report.story import Section, sections, story_lines
from autoshard.report.units import (
    bytes_text,
    count_text,
    params_text,
    percent_text,
    seconds_text,
)
from autoshard.report.words import (
    mesh_text,
    rules_text,
    shape_text,
    some_text,
    source_text,
    spec_text,
)

TEXT_WIDTH = 100
"""Columns of the text form, and of a terminal of unknown width."""

_BAR = 14


def rich_view(plan: Plan) -> RenderableType:
    """The summary of a plan, for a rich console."""
    return summary(explain(plan))


def text_view(plan: Plan) -> str:
    """The summary of a plan as plain text, `TEXT_WIDTH` columns wide."""
    return to_text(summary(explain(plan)))


def to_text(renderable: RenderableType, width: int = TEXT_WIDTH) -> str:
    """Anything rich can print as text without colours or trailing blanks."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def whole(document: Document) -> RenderableType:
    """All of `explain`: the summary, all tables, and the notes."""
    parts = [summary(document), tensors(document), collectives(document)]
    parts += [section(each) for each in sections(document)]
    if document["notes"]:
        parts += [heading("Notes"), bullets(document["notes"])]
    return Group(*parts)


def summary(document: Document) -> RenderableType:
    """What the plan is for, its policy, and what is predicted of it."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    for name, text in policy_lines(document):
        grid.add_row(name, Text(text))
    for name, text in [*predicted_lines(document), *story_lines(document)]:
        grid.add_row(name, Text(text))
    bars = Table.grid(padding=(0, 4))
    bars.add_row(time_bars(document), memory_bars(document))
    return Group(Text(document["headline"], style="bold"), grid, bars)


def policy_lines(document: Document) -> list[tuple[str, str]]:
    """The policy as pairs of a name and a line."""
    program, model = document["program"], document["program"]["model"]
    what = f"{params_text(program['params'])} parameters, {program['ops']} ops"
    if model:
        layers = "" if model["scan_layers"] else ", unrolled"
        what = (
            f"batch {model['batch']} x seq {model['seq']}, {model['optimizer']} at "
            f"{model['learning_rate']:g}, {model['dtype']}{layers}; {what}"
        )
    strategy, schedule = document["strategy"], document["schedule"]
    storage = [
        f"{state} over {'+'.join(axes)}"
        for state, axes in document["storage"].items()
        if axes
    ]
    count = schedule["microbatches"]
    return [
        ("program", what),
        ("cluster", f"{document['cluster']['name']}, {_chips(document)}"),
        ("mesh", mesh_text(document["mesh"])),
        ("strategy", f"{strategy['name']}: {strategy['about']}".rstrip(": ")),
        ("rules", rules_text(document["rules"])),
        ("storage", ", ".join(storage) or "every state lies as it is computed with"),
        (
            "schedule",
            f"{count} microbatch{'es' if count > 1 else ''}, remat "
            f"{schedule['remat']}, {pipeline_text(schedule)}{context_text(schedule)}"
            f"{offload_text(schedule)}",
        ),
        *(
            ("not executable", f"{what} cannot be run yet; search with --executable")
            for what in document["not_executable"]
        ),
    ]


def pipeline_text(schedule: Document) -> str:
    """The pipeline of a schedule in words."""
    name = schedule["pipeline"]
    if name == "none":
        return "no pipeline"
    parts = f", {schedule['virtual']} parts a stage" if schedule["virtual"] > 1 else ""
    vocab = ", vocabulary spread" if schedule["vocab"] == "spread" else ""
    blocks = "+".join(map(str, schedule["blocks"]))
    return f"pipeline {name}{parts}{vocab}, blocks {blocks}"


def context_text(schedule: Document) -> str:
    """How attention runs over a sequence in parts, in words; empty for gathers."""
    kind, heads = schedule["context_kind"], schedule["context_heads"]
    shared = f" of {heads} devices that share heads" if heads else ""
    return f", attention by {kind}{shared}" if kind != "all_gather" else ""


def offload_text(schedule: Document) -> str:
    """What a schedule keeps in the host's memory, in words; empty for nothing."""
    kinds = schedule["offload"]
    return f", {'+'.join(kinds)} offloaded" if kinds else ""


def predicted_lines(document: Document) -> list[tuple[str, str]]:
    """The predictions and their certificate as pairs of a name and a line."""
    p, c = document["predicted"], document["certificate"]
    speed = f", {count_text(p['tokens_per_s'])} tokens/s" if p["tokens_per_s"] else ""
    left = f"{c['left']} structures left, time ran out" if c["left"] else ""
    extent = "all of the space" if c["complete"] else left or "not all of the space"
    return [
        (
            "predicted",
            f"{seconds_text(p['step_s'])} a step{speed}, MFU {percent_text(p['mfu'])} "
            f"(the model needs {count_text(p['model_flops'], 'FLOP')} a step)",
        ),
        (
            "certificate",
            f"lower bound {seconds_text(c['lower_bound_s'])}, gap "
            f"{percent_text(c['gap'])}; {c['enumerated']} candidates priced "
            f"({extent}), {c['pruned']} ruled out by a bound, {c['infeasible']} too "
            f"large, {c['indivisible']} indivisible",
        ),
    ]


def time_bars(document: Document) -> RenderableType:
    """Where the step's time goes."""
    p = document["predicted"]
    table = _bars()
    for row in p["time"]:
        _bar_row(table, row["part"], seconds_text(row["time_s"]), row["fraction"])
    _bar_row(table, "step", seconds_text(p["step_s"]), None)
    if p["hidden_s"]:
        hidden = seconds_text(p["hidden_s"])
        _bar_row(table, "hidden beside it", hidden, None)
    return Group(heading("Time of a step"), table)


def memory_bars(document: Document) -> RenderableType:
    """What the peak memory of one device holds, as shares of its capacity."""
    memory = document["predicted"]["memory"]
    parts = _memory_bars("Memory of a device", "peak", memory)
    if memory["host"]:
        parts += _memory_bars("Host memory", "in all", memory["host"])
    return Group(*parts)


def _memory_bars(what: str, sum_: str, memory: Document) -> list[RenderableType]:
    table = _bars()
    for row in memory["parts"]:
        _bar_row(table, row["part"], bytes_text(row["bytes_"]), row["fraction"])
    _bar_row(table, sum_, bytes_text(memory["total"]), memory["fraction"])
    title = f"{what}, of {bytes_text(memory['capacity'])} usable"
    return [heading(title), table]


def _bars() -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, width=_BAR, style="cyan")
    return table


def _bar_row(table: Table, part: str, amount: str, fraction: float | None) -> None:
    if fraction is None:
        table.add_row(part, amount, "", "")
        return
    filled = round(_BAR * min(max(fraction, 0.0), 1.0))
    table.add_row(part, amount, percent_text(fraction), "█" * filled)


def tensors(document: Document) -> RenderableType:
    """Every state and data tensor: shape, specs, and bytes on one device.

    Tensors of one folder, and the moments that an optimizer keeps of the parameters,
    stand below their common prefix.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("tensor", overflow="fold", no_wrap=True)
    for name in ("shape", "storage", "compute"):
        table.add_column(name, overflow="fold")
    table.add_column("per device", justify="right", no_wrap=True)
    rows = document["tensors"]
    above = ""
    for row, (prefix, name) in zip(rows, split_paths(rows), strict=True):
        if prefix != above:
            table.add_row(Text(prefix, "bold"))
        above = prefix
        same = row["compute"] == row["storage"]
        table.add_row(
            Text("  " * bool(prefix) + name),
            Text(f"{_short(row['dtype'])} {shape_text(row['shape'])}"),
            Text(spec_text(row["storage"])),
            Text("as stored" if same else spec_text(row["compute"]), "dim" * same),
            bytes_text(row["bytes_per_device"]),
        )
    return Group(heading(f"Tensors ({len(rows)})"), table)


def split_paths(rows: list[Document]) -> list[tuple[str, str]]:
    """The path of each tensor as a prefix, and a name that is short and says enough.

    The name of a parameter is its path below `params/`; a moment that an optimizer
    keeps of it has the same name, below another prefix.
    """
    names = [row["path"] for row in rows if row["state"] == "params"]
    names = [name.removeprefix("params/") for name in names]
    found = []
    for row in rows:
        ends = [name for name in names if f"/{row['path']}".endswith(f"/{name}")]
        name = max(ends, key=len, default=row["path"].rpartition("/")[2])
        found.append((row["path"].removesuffix(name), name))
    return found


def _short(dtype: str) -> str:
    """`f32` for `float32`, as JAX abbreviates."""
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i")):
        if dtype.startswith(long):
            return dtype.replace(long, short, 1)
    return dtype


def collectives(document: Document) -> RenderableType:
    """Every collective, grouped by kind, axes and source line."""
    rows = document["collectives"]
    if not rows:
        return Group(heading("Collectives"), Text("none"))
    table = new_table("collective", "axes")
    for name in ("runs", "bytes", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what, and the line that needs it", overflow="fold")
    for row in rows:
        table.add_row(
            Text(row["kind"]),
            Text("+".join(row["axes"])),
            str(row["runs"]),
            bytes_text(row["bytes_"]),
            seconds_text(row["time_s"]),
            Text.assemble(
                some_text(row["values"]), "\n", (source_text(row["source"]), "dim")
            ),
        )
    return Group(heading("Collectives of a step, the slowest first"), table)


def section(each: Section) -> RenderableType:
    """One table of how the plan came about, with its lines below."""
    parts: list[RenderableType] = [heading(each.title)]
    if each.rows:
        table = new_table(*each.columns)
        for row in each.rows:
            table.add_row(*map(Text, row))
        parts.append(table)
    if each.lines:
        parts.append(bullets(each.lines))
    return Group(*parts)


def bullets(lines: Iterable[str]) -> RenderableType:
    """One line each, long ones folded."""
    table = Table.grid(padding=(0, 1))
    for line in lines:
        table.add_row("-", Text(line))
    return table


def ranking(plans: list[Plan]) -> RenderableType:
    """Several plans of one search, in the order given."""
    table = new_table("", "mesh", "storage", "schedule")
    for name in ("step", "collectives", "memory", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, plan in enumerate(plans, 1):
        p, filled = plan.predicted, plan.strategy
        states = {
            f"{state[0]}:{'+'.join(axes)}"
            for state, axes in filled.storage.model_dump().items()
            if axes
        }
        table.add_row(
            str(rank),
            mesh_text([a.model_dump() for a in plan.axes]),
            Text(" ".join(sorted(states, reverse=True)) or "-"),
            f"{plan.microbatches} mb, remat {plan.remat}"
            + (f", {how}" if (how := filled.schedule.pipeline) != "none" else "")
            + context_text(filled.schedule.model_dump())
            + offload_text(filled.schedule.model_dump()),
            seconds_text(p.step_s),
            seconds_text(p.collective_s),
            bytes_text(p.memory.total),
            percent_text(p.mfu),
        )
    legend = Text(
        "storage: p params, g gradients, o optimizer; mb: microbatches", "dim"
    )
    return Group(table, Text(""), legend)


def new_table(*columns: str) -> Table:
    """An empty table with a line below its head; long cells fold."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def heading(text: str) -> Text:
    """A title with an empty line above it."""
    return Text(f"\n{text}", style="bold")


def _chips(document: Document) -> str:
    count = document["cluster"]["num_chips"]
    return f"{count} chip{'s' if count > 1 else ''}"
