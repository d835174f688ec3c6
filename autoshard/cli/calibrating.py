"""The command that measures the devices at hand."""

from __future__ import annotations

from typing import Annotated

import typer

from autoshard.cli import options
from autoshard.cli.output import Json, say, show_json


def calibrate(
    output: Annotated[
        str | None, options.output("Write a cluster file (.toml).")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="Of the chip type; the file's if not given."
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices",
            metavar="N",
            min=1,
            help="Measure N virtual CPU devices; this host's devices if not given.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="TYPE",
            help="Chip type to take what one host cannot show from, such as its "
            "network; found by the kind of the devices if not given.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and smaller measurements.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="The file may exist already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure this host's devices and write a cluster file for 'search --cluster'."""
    from autoshard import api
    from autoshard.cli.devices import devices_for
    from autoshard.plan.chip import to_toml

    chosen = None
    if devices is not None:
        chosen = devices_for(f"cpu:{devices}", "cpu", devices)
    found = api.calibrate(
        output,
        name=name,
        base=base,
        quick=quick,
        overwrite=overwrite,
        devices=chosen,
        log=say,
    )
    if output is not None:
        path = output if "/" in output else f"./{output}"
        say(f"wrote {output}; plan for it with --cluster {path}:{found.num_chips}")
    if as_json:
        show_json(found.chip.model_dump(mode="json", exclude_none=True))
    elif output is None:
        typer.echo(to_toml(found.chip), nl=False)
