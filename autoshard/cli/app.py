"""The application: its commands, its version, and what it does with an error."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from autoshard.cli import (
    asking,
    calibrating,
    lists,
    planning,
    rules,
    running,
    validating,
    verifying,
)
from autoshard.cli.output import fail
from autoshard.ir.errors import AutoshardError
from autoshard.ir.version import VERSION


class _Group(TyperGroup):
    """Turns an error of the user's into one message and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AutoshardError as error:
            fail(error)


app = typer.Typer(
    name="autoshard",
    cls=_Group,
    help="Plans how a JAX program is spread over a cluster, and runs the plan.",
    epilog="Exit codes: 0 done; 2 usage; 3 unknown name or unusable input; 4 no plan "
    "fits; 5 the plan belongs to another program or machine; 6 output cannot be "
    "written; 7 checkpoint; 8 an operation without a rule; 128+N stopped by signal N.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    # A defect should show its whole traceback, not a framed excerpt with all locals.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"autoshard {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def _examples(*lines: str) -> str:
    # An empty line is the only line break that typer keeps.
    return "\n\n".join(["Examples:", *(f"$ autoshard {line}" for line in lines)])


app.command(
    epilog=_examples(
        "search llama3-8b --cluster h100:64 --batch 128 --seq 8192 -o plan.json",
        "search gpt2-1.5b --cluster v5p:4x4x4 --batch 512 --seq 1024 --strategy fsdp",
        "search ./config.json --cluster h100:8 --batch 8 --seq 4096 --top 5",
        "search llama3-8b --cluster h100:64 --batch 128 --seq 8192 --set tensor=8",
        "search gpt2-1.5b --cluster h100:8 --batch 64 --seq 1024 --pareto time,memory",
        "search my_package.models:build --cluster cpu:8 --batch 16 --seq 128 --json",
    )
)(planning.search)
app.command(
    epilog=_examples(
        "explain plan.json",
        "explain plan.json --tensor params/tok_embed",
        "explain plan.json --tensor model.py:12",
        "explain plan.json --html report.html",
    )
)(planning.explain)
app.command(
    epilog=_examples(
        "why-not plan.json --set tensor=8",
        "why-not plan.json --set remat=none --set microbatches=4 -o other.json",
    )
)(asking.why_not)
app.command(
    epilog=_examples(
        "size llama3-8b --cluster h100 --batch 512 --seq 8192 "
        "--target-tokens-per-s 500000",
        "size llama3-8b --cluster v5e --batch 256 --seq 4096 --budget-gib 12",
    )
)(asking.size)
app.command(epilog=_examples("compare a.json b.json", "compare a.json b.json --json"))(
    planning.compare
)
app.command(
    epilog=_examples(
        "run llama3-tiny --steps 50",
        "run llama3-tiny --cluster cpu:4 --strategy megatron-sp --data book.txt",
        "run plan.json --steps 1000 --checkpoint run1 --metrics run1.jsonl",
        "run plan.json --steps 1000 --checkpoint run1 --metrics run1.jsonl --resume",
    )
)(running.run)
app.command(
    epilog=_examples(
        "calibrate -o my-cluster.toml",
        "calibrate --devices 8 --quick -o my-cluster.toml",
        "search llama3-tiny --cluster ./my-cluster.toml:8 --batch 16 --seq 128",
    )
)(calibrating.calibrate)
app.command(
    epilog=_examples(
        "validate benchmarks/published",
        "validate benchmarks/published --leave-one-out --plot errors.png",
        "validate my-runs --json",
    )
)(validating.validate)
app.command(
    epilog=_examples(
        "verify plan.json",
        "verify plan.json --target host --json",
        "verify plan.json --blocks 2",
        "verify plan.json --repair -o repaired.json",
    )
)(verifying.verify)
app.command(epilog=_examples("models", "models --json"))(lists.models)
app.command(epilog=_examples("clusters", "clusters --json"))(lists.clusters)
app.command(epilog=_examples("strategies", "strategies --json"))(lists.strategies)
app.command(epilog=_examples("rules", "rules --family window", "rules --json"))(
    rules.rules
)
