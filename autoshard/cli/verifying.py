"""`autoshard verify`: what a plan says against what the compiler makes of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from autoshard.cli import options
from autoshard.cli.output import Json, say, show, show_json
from autoshard.cli.running import load_named


def verify(
    plan_file: Annotated[
        str, typer.Argument(metavar="PLAN", help="A plan that `search -o` wrote.")
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="tpu|gpu|host",
            help="Whose compiler; that of the plan's chips when not given. host is as "
            "many virtual CPU devices.",
        ),
    ] = None,
    blocks: Annotated[
        str,
        typer.Option(
            "--blocks",
            metavar="auto|full|1|2",
            help="Compile the whole program, or those of one and two blocks and reckon "
            "the rest; auto does so where the blocks are unrolled and many.",
        ),
    ] = "auto",
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Constrain the values that XLA moves against the plan, compile again "
            "and write the plan that it follows better to -o.",
        ),
    ] = False,
    output: Annotated[
        str | None, options.output("Where --repair writes.", metavar="NEW")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a plan for its own chips, none of them needed, and compare.

    Shows the collectives planned and emitted, what XLA added or changed and why, memory
    and time as planned and as the compiler says, and whether it fits. The exit code is
    4 where it does not fit, and 5 where a difference has no known cause.
    """
    from autoshard import api
    from autoshard.cli.devices import plan_on_cpu
    from autoshard.cli.verified import as_dict, report
    from autoshard.ir.errors import InfeasibleError, InputError, PlanMismatchError

    if repair != (output is not None):
        raise InputError(
            "--repair writes to -o NEW, and -o is for --repair: give both."
        )
    if output is not None:
        api.check_writable(output)
    plan = load_named(plan_file, "verify it there, with autoshard.verify_plan")
    assert plan.program.model is not None
    plan_on_cpu()
    step = api.resolve(plan.program.model).step
    mended: dict[str, Any] = {}
    if repair and output is not None:
        done = api.repair_plan(step, plan, target=target, log=say)
        found = done.after
        mended = {"constraints_added": len(done.added), "repaired": done.better}
        if done.better:
            api.save_plan(done.plan, output)
            say(f"wrote {output}: {len(done.added)} constraints added")
        else:
            say(f"could not repair it, {output} is not written: {done.why}")
    else:
        found = api.verify_plan(step, plan, target=target, blocks=blocks, log=say)
    if as_json:
        show_json({**as_dict(found), **mended})
    else:
        show(report(found))
    if found.fits is False:
        raise InfeasibleError(
            "the program does not fit in the memory of its chips, as shown above; "
            "search with more chips, or a strategy that shards or recomputes more."
        )
    if found.unexplained:
        raise PlanMismatchError(
            f"{found.unexplained} differences between planned and emitted collectives "
            "have no known cause; they are listed above. Search the plan again with "
            "this version of JAX; if they stay, report them with the plan."
        )
