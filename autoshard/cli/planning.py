"""Commands that only plan: no accelerator is touched, whatever is installed."""

from __future__ import annotations

from typing import Annotated

import typer

from autoshard.cli import options
from autoshard.cli.output import Json, say, show, show_json

_FRONT = 12
"""Plans that `--pareto` lists."""


def search(
    model: options.Model,
    cluster: options.Cluster,
    batch: options.Batch,
    seq: options.Seq,
    strategy: options.Strategy = "auto",
    optimizer: options.Optimizer = options.DEFAULT_OPTIMIZER,
    learning_rate: options.LearningRate = options.DEFAULT_LEARNING_RATE,
    dtype: options.DtypeOfActivations = options.DEFAULT_DTYPE,
    unrolled: options.Unrolled = False,
    replicate: Annotated[
        list[str] | None,
        typer.Option(
            "--replicate",
            metavar="NAME",
            help="A primitive without a factor rule that every chip may compute whole; "
            "can be repeated.",
        ),
    ] = None,
    pins: options.Pins = None,
    executable: options.Executable = False,
    time_limit_s: Annotated[
        float | None,
        typer.Option(
            "--time-limit-s",
            metavar="S",
            min=0,
            help="Begin with no more candidates after so many seconds; the certificate "
            "says how good the plan is then. Ctrl-C does the same.",
        ),
    ] = None,
    pareto: Annotated[
        str | None,
        typer.Option(
            "--pareto",
            metavar="time,memory",
            help="List the plans than which none is both faster and smaller, at most "
            f"{_FRONT}.",
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option("--top", metavar="K", min=1, help="List the K best plans."),
    ] = None,
    verify: Annotated[
        int | None,
        typer.Option(
            "--verify",
            metavar="K",
            min=1,
            help="Compile the K best plans for their chips, and rank them by what the "
            "compiler says of memory and time.",
        ),
    ] = None,
    output: Annotated[str | None, options.output("Write the best plan.")] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest plan for a model on a cluster."""
    from autoshard import api
    from autoshard.cli.devices import plan_on_cpu
    from autoshard.ir.errors import InputError
    from autoshard.report import table
    from autoshard.search import parse_pins

    if pareto is not None and sorted(pareto.split(",")) != ["memory", "time"]:
        raise InputError(f"--pareto {pareto!r} was passed; it knows time,memory.")
    if pareto is not None and (top or verify):
        raise InputError("--pareto lists plans by itself; drop --top and --verify.")
    fixed = parse_pins(pins or ())
    if output is not None:
        api.check_writable(output)  # before minutes are spent on the search
    plan_on_cpu()
    ref = options.model_ref(
        model,
        batch=batch,
        seq=seq,
        optimizer=optimizer,
        learning_rate=learning_rate,
        dtype=dtype,
        unrolled=unrolled,
    )
    resolved = api.resolve(ref)
    for note in resolved.notes:
        say(note)
    if verify is not None and not executable:
        say("--verify compiles plans: those that cannot be run yet are left out")
    program = api.solver(
        resolved.step,
        resolved.batch,
        cluster=cluster,
        strategy=strategy,
        pins=fixed,
        replicate=replicate or (),
        model_ref=resolved.ref,
        executable=executable or verify is not None,
        time_limit_s=time_limit_s,
        log=say,
    )
    if pareto is not None:
        plans = program.front(_FRONT)
    else:
        plans = program.plans(max(top or 1, verify or 1))
    if verify is not None:
        from autoshard.cli import verified

        ranked = api.rank_verified(resolved.step, plans[:verify], log=say)
        plans = [*(plan for plan, _ in ranked), *plans[verify:]]
        if not as_json:
            show(verified.ranking(ranked))
    listed = top is not None or pareto is not None
    best = plans[0]
    if output is not None:
        api.save_plan(best, output)
        say(f"wrote {output}")
    if as_json:
        documents = [plan.model_dump(mode="json") for plan in plans]
        show_json(documents if listed else documents[0])
        return
    show(best)
    if listed:
        show("")
        show(table.ranking(plans))


def explain(
    plan: options.PlanFile,
    tensor: Annotated[
        str | None,
        typer.Option(
            "--tensor",
            metavar="PATH|FILE:LINE",
            help="Show one tensor in depth, or what a source line makes, and where the "
            "axes came from, op by op.",
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Write all of it as a web page."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show every tensor and every collective of a plan, and where its time goes."""
    from autoshard import report
    from autoshard.plan.files import check_writable, load_plan, write_atomically
    from autoshard.report import depth, table

    if html is not None:
        check_writable(html)
    loaded = load_plan(plan)
    if tensor is not None:
        document, view = report.explain_tensor(loaded, tensor), depth.depth_view
    else:
        document, view = report.explain(loaded), table.whole
    if html is not None:
        from autoshard.report import html as page

        write_atomically(html, page.page(loaded))
        say(f"wrote {html}")
    if as_json:
        show_json(document)
    else:
        show(view(document))


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A plan file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another plan file.")],
    as_json: Json = False,
) -> None:
    """Show what differs between two plans, and what it costs."""
    from autoshard import report
    from autoshard.plan.files import load_plan

    document = report.compare(load_plan(a), load_plan(b))
    if as_json:
        show_json(document)
    else:
        show(report.comparison(document))
