"""What differs between two plans, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from autoshard.plan.schema import Plan
from autoshard.report.explain import MEMORY_PARTS, Document, explain
from autoshard.report.story import story_lines
from autoshard.report.table import heading, new_table, split_paths
from autoshard.report.units import bytes_text, percent_text, seconds_text
from autoshard.report.words import (
    mesh_text,
    shape_text,
    some_text,
    source_text,
    spec_text,
)

TENSOR_FIELDS = ("shape", "dtype", "storage", "compute", "bytes_per_device")
"""What is compared of a tensor, besides its logical axes."""


def compare(a: Plan, b: Plan) -> Document:
    """What differs between two plans.

    Args:
        a: The plan to compare with.
        b: The plan that is compared.

    Returns:
        A JSON-able dict: `same` (whether nothing differs), `same_program` and
        `same_cluster` (by fingerprint), `plans` (the two headlines), `policy` (rows
        of `field`, `a`, `b`), `tensors` (rows of `path`, `state`, and `a` and `b` with
        `TENSOR_FIELDS`, None where a plan lacks it), `collectives` (rows of `kind`,
        `axes`,
        `source`, `values`, and `a` and `b` with `runs`, `bytes_` and `time_s`),
        `time` and `memory` (rows of `part`, `a`, `b`, `difference` as b - a, all
        parts) and `verdict` (one sentence).
    """
    left, right = explain(a), explain(b)
    result: Document = {
        "same_program": a.program.fingerprint == b.program.fingerprint,
        "same_cluster": a.cluster.fingerprint == b.cluster.fingerprint,
        "plans": {"a": left["headline"], "b": right["headline"]},
        "policy": _policy(left, right),
        "tensors": _tensors(left, right),
        "collectives": _collectives(left, right),
        "time": _time(left, right),
        "memory": _memory(left, right),
        "verdict": _verdict(a, b),
    }
    rows = [*result["time"], *result["memory"]]
    differs = ("policy", "tensors", "collectives")
    result["same"] = (
        result["same_program"]
        and result["same_cluster"]
        and not any(result[key] for key in differs)
        and not any(row["difference"] for row in rows)
    )
    return result


def _policy(left: Document, right: Document) -> list[Document]:
    rows = []

    def row(field: str, a: Any, b: Any) -> None:
        if a != b:
            rows.append({"field": field, "a": a, "b": b})

    row("cluster", left["cluster"]["name"], right["cluster"]["name"])
    row("mesh", mesh_text(left["mesh"]), mesh_text(right["mesh"]))
    row("strategy", left["strategy"]["name"], right["strategy"]["name"])
    rules = [{r["logical"]: r["axes"] for r in d["rules"]} for d in (left, right)]
    for logical in dict.fromkeys([*rules[0], *rules[1]]):
        row(f"rule {logical}", *(_axes(r.get(logical)) for r in rules))
    for state in left["storage"]:
        pair = (_axes(d["storage"][state]) for d in (left, right))
        row(f"storage {state}", *pair)
    for field in left["schedule"]:
        row(field, left["schedule"][field], right["schedule"][field])
    stories = [dict(story_lines(d)) for d in (left, right)]
    for name in dict.fromkeys([*stories[0], *stories[1]]):
        row(name, *(story.get(name, "-") for story in stories))
    return rows


def _axes(axes: list[str] | None) -> str:
    return "no rule" if axes is None else "+".join(axes) or "-"


def _tensors(left: Document, right: Document) -> list[Document]:
    tables = [{t["path"]: t for t in d["tensors"]} for d in (left, right)]
    rows = []
    for path in dict.fromkeys([*tables[0], *tables[1]]):
        a, b = (table.get(path) for table in tables)
        if a == b:
            continue
        some = a or b
        assert some is not None
        sides = [{f: t[f] for f in TENSOR_FIELDS} if t else None for t in (a, b)]
        rows.append(
            {"path": path, "state": some["state"], "a": sides[0], "b": sides[1]}
        )
    return rows


def _collectives(left: Document, right: Document) -> list[Document]:
    def keyed(document: Document) -> dict[tuple[Any, ...], Document]:
        rows = document["collectives"]
        return {(c["kind"], tuple(c["axes"]), c["source"]): c for c in rows}

    tables = [keyed(left), keyed(right)]
    rows = []
    for key in dict.fromkeys([*tables[0], *tables[1]]):
        pair = []
        for table in tables:
            found = table.get(key, {"runs": 0, "bytes_": 0, "time_s": 0.0})
            pair.append({f: found[f] for f in ("runs", "bytes_", "time_s")})
        if pair[0] != pair[1]:
            values = tables[key in tables[1]][key]["values"]
            kind, axes, source = key
            rows.append(
                {
                    "kind": kind,
                    "axes": list(axes),
                    "source": source,
                    "values": values,
                    "a": pair[0],
                    "b": pair[1],
                }
            )
    return sorted(rows, key=lambda r: -abs(r["b"]["time_s"] - r["a"]["time_s"]))


def _time(left: Document, right: Document) -> list[Document]:
    parts = [
        {t["part"]: t["time_s"] for t in d["predicted"]["time"]} for d in (left, right)
    ]
    rows = [
        _row(part, parts[0].get(part, 0.0), parts[1].get(part, 0.0))
        for part in dict.fromkeys([*parts[0], *parts[1]])
    ]
    steps = (d["predicted"]["step_s"] for d in (left, right))
    return [*rows, _row("step", *steps)]


def _memory(left: Document, right: Document) -> list[Document]:
    parts = [
        {m["part"]: m["bytes_"] for m in d["predicted"]["memory"]["parts"]}
        for d in (left, right)
    ]
    rows = [_row(part, parts[0][part], parts[1][part]) for part in MEMORY_PARTS]
    totals = (d["predicted"]["memory"]["total"] for d in (left, right))
    hosts = [d["predicted"]["memory"]["host"] for d in (left, right)]
    held = [float(host["total"]) if host else 0.0 for host in hosts]
    return [*rows, _row("peak", *totals), *([_row("on the host", *held)] * any(hosts))]


def _row(part: str, a: float, b: float) -> Document:
    return {"part": part, "a": a, "b": b, "difference": b - a}


def _verdict(a: Plan, b: Plan) -> str:
    """One sentence: which is faster by how much, and which holds more memory."""
    step = (a.predicted.step_s, b.predicted.step_s)
    memory = (a.predicted.memory.total, b.predicted.memory.total)
    if step[0] == step[1]:
        speed = f"both are predicted to take {seconds_text(step[0])} a step"
    else:
        word = "more" if step[1] > step[0] else "less"
        share = percent_text(abs(step[1] / step[0] - 1))
        speed = (
            f"b is predicted to take {share} {word} time a step than a "
            f"({seconds_text(step[1])} against {seconds_text(step[0])})"
        )
    if memory[0] == memory[1]:
        return f"{speed}; both hold {bytes_text(memory[0])} on each device."
    word = "more" if memory[1] > memory[0] else "less"
    return (
        f"{speed}; on each device b holds {bytes_text(abs(memory[1] - memory[0]))} "
        f"{word} ({bytes_text(memory[1])} against {bytes_text(memory[0])})."
    )


def comparison(document: Document) -> RenderableType:
    """Two plans side by side, for a rich console; `document` is of `compare`."""
    d = document
    parts: list[RenderableType] = [
        Text(f"a  {d['plans']['a']}"),
        Text(f"b  {d['plans']['b']}"),
    ]
    if d["same"]:
        return Group(*parts, Text("\nThe two plans say the same."))
    for key, what in (("same_program", "programs"), ("same_cluster", "clusters")):
        if not d[key]:
            note = f"They were made for different {what}."
            parts.append(Text(note, style="yellow"))
    if d["policy"]:
        table = new_table("", "a", "b")
        for row in d["policy"]:
            table.add_row(*(Text(str(row[key])) for key in ("field", "a", "b")))
        parts += [heading("Policy"), table]
    if d["tensors"]:
        title = f"Tensors that differ ({len(d['tensors'])})"
        parts += [heading(title), _tensors_table(d["tensors"])]
    if d["collectives"]:
        parts += [heading("Collectives that differ"), _collectives_table(d)]
    parts += [
        heading("Time of a step"),
        _amounts(d["time"], seconds_text),
        heading("Memory of a device"),
        _amounts(d["memory"], bytes_text),
        Text("\n" + d["verdict"][0].upper() + d["verdict"][1:], style="bold"),
    ]
    return Group(*parts)


def _tensors_table(rows: list[Document]) -> RenderableType:
    """A row a tensor; folders that change alike, such as both moments, are one."""
    folders: dict[str, list[tuple[str, ...]]] = {}
    for row, (prefix, name) in zip(rows, split_paths(rows), strict=True):
        cells = (_tensor_text(row, "a"), _tensor_text(row, "b"))
        folders.setdefault(prefix, []).append((name, *cells))
    alike: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for prefix, lines in folders.items():
        alike.setdefault(tuple(lines), []).append(prefix)
    table = new_table("tensor", "a", "b")
    for lines, prefixes in alike.items():
        if any(prefixes):
            table.add_row(Text("\n".join(prefixes), "bold"))
        for name, *cells in lines:
            table.add_row(Text("  " * any(prefixes) + name), *map(Text, cells))
    return table


def _tensor_text(row: Document, side: str) -> str:
    """What one plan says of a tensor, as far as the other one says otherwise."""
    this, other = row[side], row["b" if side == "a" else "a"]
    if this is None:
        return "absent"
    texts = {
        "shape": shape_text(this["shape"]),
        "dtype": this["dtype"],
        "storage": spec_text(this["storage"]),
        "compute": f"computed as {spec_text(this['compute'])}",
        "bytes_per_device": bytes_text(this["bytes_per_device"]),
    }
    changed = [f for f in TENSOR_FIELDS if other is None or this[f] != other[f]]
    if this["compute"] == this["storage"] and "storage" in changed:
        changed = [f for f in changed if f != "compute"]
    return ", ".join(texts[f] for f in changed) or "other logical axes"


def _collectives_table(document: Document) -> RenderableType:
    table = new_table("collective, what, and the line that needs it")
    for name in ("a", "b"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in document["collectives"]:
        cells = []
        for side in (row["a"], row["b"]):
            amounts = [
                f"{side['runs']} x",
                bytes_text(side["bytes_"]),
                seconds_text(side["time_s"]),
            ]
            cells.append("\n".join(amounts) if side["runs"] else "-")
        table.add_row(
            Text.assemble(
                f"{row['kind']} over {'+'.join(row['axes'])}\n",
                f"  {some_text(row['values'], 2)}\n",
                (f"  {source_text(row['source'])}", "dim"),
            ),
            *cells,
        )
    return table


def _amounts(rows: list[Document], unit: Callable[[float], str]) -> RenderableType:
    table = new_table("")
    for name in ("a", "b", "b - a", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        change = row["difference"]
        sign = "+" if change > 0 else ""
        share = f"{sign}{percent_text(change / row['a'])}" if row["a"] else ""
        same = not change
        table.add_row(
            row["part"],
            unit(row["a"]),
            unit(row["b"]),
            "-" if same else f"{sign}{unit(change)}",
            "" if same else share,
        )
    return table
