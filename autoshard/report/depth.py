"""One tensor, or one source line, in a terminal; drawn from `explain_tensor`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoshard.report.explain import Document
from autoshard.report.table import heading, new_table
from autoshard.report.units import bytes_text, seconds_text
from autoshard.report.words import shape_text, source_text, spec_text

_Seen = set[tuple[object, ...]]


def depth_view(document: Document) -> RenderableType:
    """What `explain_tensor` found, for a rich console."""
    return line_view(document) if "values" in document else tensor_view(document)


def tensor_view(document: Document) -> RenderableType:
    """One tensor in depth; `document` is of `explain_tensor`."""
    d = document
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    lines = [
        ("tensor", f"{d['path']} ({d['state']})"),
        ("shape", f"{shape_text(d['shape'])} {d['dtype']}, {bytes_text(d['bytes_'])}"),
        (
            "in memory",
            f"{spec_text(d['storage'])}: {shape_text(d['local_shape'])} on a device, "
            f"{bytes_text(d['bytes_per_device'])}",
        ),
        (
            "in compute",
            f"{spec_text(d['compute'])}: {shape_text(d['local_compute_shape'])} on a "
            f"device, {bytes_text(d['bytes_per_device_compute'])}",
        ),
    ]
    if d["parameter"]:
        lines.append(("state of", d["parameter"]))
    for name, text in lines:
        grid.add_row(name, Text(text))
    dims = new_table("dim", "logical", "storage", "compute", "why")
    for row in d["dims"]:
        dims.add_row(
            f"{row['dim']}: {row['size']}",
            Text(row["logical"] or "-"),
            Text("+".join(row["storage"]) or "-"),
            Text("+".join(row["compute"]) or "-"),
            Text("\n".join(row["why"]) or "whole: no axis is put here"),
        )
    parts: list[RenderableType] = [grid, heading("Dims"), dims]
    if d["unused"]:
        unused = new_table("axis", "offered by", "not used, because")
        for row in d["unused"]:
            unused.add_row(row["axis"], Text(row["offered_by"]), Text(row["reason"]))
        parts += [heading("Axes offered and not used"), unused]
    if d["ways"]:
        parts.append(heading("Where its axes came from"))
        seen: _Seen = set()
        parts += [_walk(way, seen) for way in d["ways"]]
    parts += [heading("Collectives that move it"), _moves(d["collectives"])]
    return Group(*parts)


def line_view(document: Document) -> RenderableType:
    """What a source line makes and moves; `document` is of `explain_tensor`."""
    values = document["values"]
    parts: list[RenderableType] = []
    if not values:
        parts.append(Text(f"Nothing that {document['line']} makes is sharded."))
    seen: _Seen = set()
    for value in values:
        title = f"{value['what']} {shape_text(value['shape'])}"
        parts += [
            heading(f"{title} as {spec_text(value['spec'])}"),
            Text(source_text(value["source"]), "dim"),
            *(_walk(way, seen) for way in value["ways"]),
        ]
    parts += [heading("Collectives at this line"), _moves(document["collectives"])]
    return Group(*parts)


def _walk(way: Document, seen: _Seen) -> RenderableType:
    """The way back of one dim, a line a step; what was shown before is not repeated."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="dim")
    axes = "+".join(way["axes"])
    table.add_row(f"dim {way['dim']}", Text(f"over {axes}", "bold"), "")
    for number, step in enumerate(way["steps"]):
        place = (axes, step["what"], step["source"], step["address"], step["dim"])
        dims = [
            f"*{'+'.join(dim) or '-'}*" if d == step["dim"] else "+".join(dim) or "-"
            for d, dim in enumerate(step["spec"])
        ]
        name = f"{step['what']} {shape_text(step['shape'])} [{', '.join(dims)}]"
        table.add_row(
            "  from" if number else "", Text(name), source_text(step["source"])
        )
        if place in seen and number:
            table.add_row("", "... and on as above", "")
            break
        seen.add(place)
    table.add_row("  by", Text(way["origin"] or "not recorded", "bold"), "")
    return table


def _moves(collectives: list[Document]) -> RenderableType:
    if not collectives:
        return Text("none")
    moves = new_table("collective", "axes", "runs", "bytes, one run", "time", "at")
    for c in collectives:
        moves.add_row(
            c["kind"],
            "+".join(c["axes"]),
            str(c["count"]),
            bytes_text(c["bytes_"]),
            seconds_text(c["time_s"]),
            Text(f"{source_text(c['source'])}\n{c['address']}"),
        )
    return moves
