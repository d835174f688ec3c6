"""The command that holds predictions against published runs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.text import Text

from autoshard.cli.output import Json, say, show, show_json

if TYPE_CHECKING:
    from autoshard.validation import Part, Validation


def validate(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Directory of CSV files of published runs, as benchmarks/published.",
        ),
    ],
    leave_one_out: Annotated[
        bool,
        typer.Option(
            "--leave-one-out",
            help="Also predict each source by constants fitted without it (minutes).",
        ),
    ] = False,
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot", metavar="FILE", help="Draw predicted against measured (.png)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict published training runs and report the errors."""
    from autoshard import api

    found = api.validate(directory, leave_one_out=leave_one_out, log=say)
    if plot is not None:
        from autoshard.report.plots import save_scatter

        save_scatter(
            plot,
            {
                part.name: [
                    (p.row.measured_s, p.step_s)
                    for p in found.rows
                    if p.row.measured_s and p.row.clean and p.row.source == part.name
                ]
                for part in found.sources
            },
        )
        say(f"wrote {plot}")
    if as_json:
        show_json(found.as_dict())
    else:
        show(_report(found))


def _report(found: Validation) -> RenderableType:
    from autoshard.report.table import heading, new_table

    sources, reasons = _parts(found.sources, "source"), new_table("source", "left out")
    reasons.add_column("rows", justify="right")
    for source, reason, rows in found.reasons():
        reasons.add_row(source, reason, str(rows))
    ranks = new_table("plans for one model and batch on one cluster")
    for name in ("plans", "Kendall", "regret"):
        ranks.add_column(name, justify="right")
    for group in found.groups:
        title = ", ".join(str(part) for part in group.name)
        ranks.add_row(
            title, str(group.plans), f"{group.kendall:.2f}", _percent(group.regret)
        )
    assumed = new_table("source", "taken from elsewhere")
    assumed.add_column("rows", justify="right")
    for source, what, rows in found.assumed():
        assumed.add_row(source, what, str(rows))
    fits = found.fits
    return Lines(
        heading(
            "Errors by source: median of time, memory; 90th percentile; median bias"
        ),
        sources,
        heading("By chip"),
        _parts(found.chips, "chip"),
        heading("All"),
        _parts([found.clean, found.doubtful], "rows"),
        heading("Ranking"),
        ranks,
        Text(
            f"mean Kendall {_number(found.kendall)}, mean regret "
            f"{_percent(found.regret)} over {len(found.groups)} groups"
        ),
        heading("Out of memory"),
        Text(
            f"{fits.failed} rows failed: {_percent(fits.recall)} of them recognised; "
            f"of rows predicted not to fit {_percent(fits.precision)} did not"
        ),
        heading("Not said by the rows"),
        assumed,
        heading("Left out"),
        reasons,
        Text(
            f"{_percent(found.used)} of the rows with a full configuration and a time "
            "are used"
        ),
    )


def _parts(parts: list[Part] | tuple[Part, ...], name: str) -> RenderableType:
    from autoshard.report.table import new_table

    table = new_table()
    table.add_column(name, no_wrap=True)
    # "without": by constants fitted without the row's source.
    for column in (
        *("rows", "out", "time", "p90", "bias", "without", "p90"),
        *("rows", "memory", "p90"),
    ):
        table.add_column(column, justify="right")
    for part in parts:
        other = part.left_out
        table.add_row(
            part.name,
            str(part.time.rows),
            str(part.out),
            _percent(part.time.median),
            _percent(part.time.p90),
            _percent(part.time.bias),
            _percent(other.median) if other else "-",
            _percent(other.p90) if other else "-",
            str(part.memory.rows),
            _percent(part.memory.median),
            _percent(part.memory.p90),
        )
    return table


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
