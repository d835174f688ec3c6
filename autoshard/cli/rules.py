"""The command that lists which primitives have a factor rule."""

from __future__ import annotations

from typing import Annotated

import typer

from autoshard.cli.output import Json, show, show_json
from autoshard.ir.errors import NameUnknownError

Family = Annotated[
    str | None, typer.Option("--family", help="Only the rules of this family.")
]
REGISTERED = "registered"
"""The family of the rules that the user registered."""


def rules(family: Family = None, as_json: Json = False) -> None:
    """List the primitives that are covered, each with an example of its rule."""
    from rich.console import Group
    from rich.text import Text

    from autoshard.report.table import new_table

    rows = _rows()
    counts = {name: 0 for _, name, _ in rows}
    for _, name, _ in rows:
        counts[name] += 1
    if family is not None:
        if family not in counts:
            raise NameUnknownError(
                f"no rule is of the family {family!r}; the families are "
                f"{', '.join(sorted(counts))}."
            )
        rows = [row for row in rows if row[1] == family]
    if as_json:
        listed = [
            {
                "primitive": primitive,
                "family": name,
                "rule": rule,
                "registered": name == REGISTERED,
            }
            for primitive, name, rule in rows
        ]
        show_json({"counts": counts, "rules": listed})
        return
    table = new_table("primitive", "family", "rule of an example")
    for row in rows:
        table.add_row(*map(Text, row))
    summary = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    show(Group(table, Text(f"\n{sum(counts.values())} primitives: {summary}")))


def _rows() -> list[tuple[str, str, str]]:
    """Primitive, family and rule, in alphabetical order."""
    from autoshard.rules import registered
    from autoshard.rules.registry import entries, example_rule
    from autoshard.rules.structure import STRUCTURE, by_parts

    rows = [
        (name, entry.family, example_rule(name).text)
        for name, entry in entries().items()
    ]
    rows += [(name, STRUCTURE, how) for name, how in by_parts().items()]
    rows += [(name, REGISTERED, text) for name, text in registered().items()]
    return sorted(rows)
