"""Where the command line writes: results to stdout, all else to stderr."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, RenderableType

from autoshard.ir.errors import AutoshardError
from autoshard.report.table import to_text

Json = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")
]


def show(result: RenderableType) -> None:
    """Prints a result for people: in colour on a terminal, else as plain text."""
    if sys.stdout.isatty():
        Console(markup=False, highlight=False, emoji=False).print(result)
    else:
        typer.echo(to_text(result))


def show_json(result: Any) -> None:
    """Prints a result for programs."""
    typer.echo(json.dumps(result, indent=1, sort_keys=True, allow_nan=False))


def say(message: str) -> None:
    """Prints a line of progress on stderr."""
    typer.echo(message, err=True)


def fail(error: AutoshardError) -> NoReturn:
    """Prints an error of the user's and ends the command with its exit code."""
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(error.exit_code)
