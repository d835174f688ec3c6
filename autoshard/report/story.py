"""How a plan came about: annotations, blocks, conflicts, delayed sums, opt-ins.

Written as text cells, which the terminal and the HTML report both show.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from autoshard.report.explain import Document
from autoshard.report.units import bytes_text
from autoshard.report.words import some_text, source_text, spec_text


@dataclass(frozen=True, slots=True)
class Section:
    """One table of a report.

    Attributes:
        title: Above it.
        columns: Their heads.
        rows: Text per cell; a line break in a cell is one.
        lines: Sentences below the table.
    """

    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    lines: tuple[str, ...] = ()


def story_lines(document: Document) -> list[tuple[str, str]]:
    """What there is of it, as pairs of a name and a line; what is empty is left out.

    Args:
        document: Of `explain`.
    """
    d, lines = document, []
    counts = d["annotations"]["counts"]
    if counts:
        lines.append(("annotations", _found(counts)))
    if d["blocks"]:
        largest = sorted(d["blocks"], key=lambda b: -b["copies"] * b["ops"])
        texts = [_block(block, short=True) for block in largest]
        lines.append(("blocks", some_text(texts, 2)))
    for field, name, one, many in (
        ("conflicts", "conflicts", "wish not met", "wishes not met"),
        ("delayed", "delayed", "reduction", "reductions"),
        ("replicated", "replicated", "op without a rule", "ops without a rule"),
    ):
        if n := len(d[field]):
            lines.append((name, f"{n} {one if n == 1 else many}"))
    if pinned := d["constraints"]["pinned"]:
        values = "value" if pinned == 1 else "values"
        text = f"{pinned} {values} pinned of {d['constraints']['ops']} ops"
        lines.append(("constraints", text))
    return lines


def sections(document: Document) -> list[Section]:
    """All of it in full; what is empty is left out.

    Args:
        document: Of `explain`.

    >>> nothing = {"counts": [], "hints": [], "unused": []}
    >>> block = {"kind": "unrolled", "copies": 32, "ops": 57, "source": "a/model.py:3"}
    >>> shown = sections({"annotations": nothing, "blocks": [block], "conflicts": [],
    ...                   "delayed": [], "replicated": []})
    >>> [(section.title, section.lines) for section in shown]
    [('Blocks', ('32 copies of 57 ops, unrolled, a/model.py:3',))]
    """
    d = document
    found = [
        _annotations(d["annotations"]),
        Section("Blocks", lines=tuple(map(_block, d["blocks"]))),
        _conflicts(d["conflicts"]),
        _delayed(d["delayed"]),
        _replicated(d["replicated"]),
    ]
    return [section for section in found if section.rows or section.lines]


def _found(counts: list[Document]) -> str:
    found, reached = (sum(c[key] for c in counts) for key in ("found", "reached"))
    return f"{found} found, {reached} reached the program"


def _annotations(annotations: Document) -> Section:
    counts = annotations["counts"]
    rows = [(c["kind"], str(c["found"]), str(c["reached"])) for c in counts]
    unused = [
        f"unused: {one}: nothing reads its result" for one in annotations["unused"]
    ]
    return Section(
        f"Annotations: {_found(counts)}",
        ("kind", "found", "reached"),
        tuple(rows),
        (*unused, *(f"hint: {one}" for one in annotations["hints"])),
    )


def _block(block: Document, *, short: bool = False) -> str:
    text = f"{block['copies']} copies of {block['ops']} ops"
    if short:
        return text
    source = source_text(block["source"])
    return ", ".join(filter(None, (text, block["kind"], source)))


def _conflicts(conflicts: list[Document]) -> Section:
    rows = [
        (
            c["where"],
            f"{c['kept']}\n{c['kept_origin']}",
            f"{c['lost']}\n{c['lost_origin']}",
            bytes_text(c["moved_bytes"]) if c["moved_bytes"] else "-",
        )
        for c in conflicts
    ]
    return Section(
        f"Conflicts ({len(rows)})", ("where", "kept", "lost", "moved"), tuple(rows)
    )


def _delayed(delayed: list[Document]) -> Section:
    rows = []
    for sum_ in delayed:
        roots = [root["address"] for root in sum_["roots"]]
        specs = list(dict.fromkeys(spec_text(spec) for spec in sum_["specs"]))
        rows.append(
            (
                "+".join(sum_["axes"]),
                "\n".join(roots),
                ", ".join(specs),
                (sum_["carriers"] or roots)[-1],
            )
        )
    return Section(
        f"Delayed reductions ({len(rows)})",
        ("over", "products that make partial sums", "specs", "reduced after"),
        tuple(rows),
    )


def _replicated(replicated: list[Document]) -> Section:
    uses = Counter((r["primitive"], r["source"] or r["address"]) for r in replicated)
    return Section(
        f"Computed whole on every device, as asked ({len(replicated)})",
        ("primitive", "ops", "at"),
        tuple(
            (primitive, str(count), source_text(place))
            for (primitive, place), count in uses.items()
        ),
    )
