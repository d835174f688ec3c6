"""Commands that ask about plans: how many chips, and what if."""

from __future__ import annotations

from typing import Annotated

import typer

from autoshard.cli import options
from autoshard.cli.output import Json, say, show, show_json


def size(
    model: options.ModelAsInSearch,
    cluster: options.ClusterType,
    batch: options.Batch,
    seq: options.Seq,
    target_tokens_per_s: Annotated[
        float | None,
        typer.Option("--target-tokens-per-s", metavar="X", help="Speed to reach."),
    ] = None,
    budget_gib: Annotated[
        float | None,
        typer.Option(
            "--budget-gib",
            metavar="X",
            help="GiB of each chip's memory to stay within.",
        ),
    ] = None,
    strategy: options.Strategy = "auto",
    pins: options.Pins = None,
    executable: options.Executable = False,
    optimizer: options.Optimizer = options.DEFAULT_OPTIMIZER,
    dtype: options.DtypeOfActivations = options.DEFAULT_DTYPE,
    output: Annotated[str | None, options.output("Write the plan.")] = None,
    as_json: Json = False,
) -> None:
    """Find how few chips reach a speed, or have memory enough."""
    from autoshard import api
    from autoshard.cli.devices import plan_on_cpu
    from autoshard.report import table
    from autoshard.search import parse_pins

    fixed = parse_pins(pins or ())
    if output is not None:
        api.check_writable(output)
    plan_on_cpu()
    ref = options.model_ref(
        model, batch=batch, seq=seq, optimizer=optimizer, dtype=dtype
    )
    resolved = api.resolve(ref)
    found = api.size(
        resolved.step,
        resolved.batch,
        cluster=cluster,
        target_tokens_per_s=target_tokens_per_s,
        budget_gib=budget_gib,
        strategy=strategy,
        pins=fixed,
        executable=executable,
        model_ref=resolved.ref,
        log=say,
    )
    if output is not None:
        api.save_plan(found.plan, output)
        say(f"wrote {output}")
    tried = [
        {"cluster": t.cluster, "num_chips": t.num_chips, "reason": t.reason}
        for t in found.tried
    ]
    if as_json:
        show_json({"plan": found.plan.model_dump(mode="json"), "tried": tried})
        return
    show(found.plan)
    show("")
    rows = table.new_table("cluster", "chips", "")
    for t in found.tried:
        rows.add_row(t.cluster, str(t.num_chips), t.reason or "does")
    show(rows)


def why_not(
    plan: options.PlanFile,
    pins: options.SomePins,
    executable: options.Executable = False,
    output: Annotated[str | None, options.output("Write the other plan.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a change to a plan would cost, term by term.

    The fields that are set are fixed and all others are chosen anew. The exit code is 4
    where nothing fits with the change.
    """
    from autoshard import api, report
    from autoshard.cli.devices import plan_on_cpu
    from autoshard.cli.running import load_named
    from autoshard.search import parse_pins

    fixed = parse_pins(pins)
    if output is not None:
        api.check_writable(output)
    loaded = load_named(plan, "ask there, with autoshard.why_not")
    assert loaded.program.model is not None
    plan_on_cpu()
    resolved = api.resolve(loaded.program.model)
    other = api.why_not(
        resolved.step,
        loaded,
        resolved.batch,
        pins=fixed,
        executable=executable,
        log=say,
    )
    if output is not None:
        api.save_plan(other, output)
        say(f"wrote {output}")
    document = report.compare(loaded, other)
    if as_json:
        show_json(document)
    else:
        show(report.comparison(document))
