"""`autoshard verify`: what a plan says against what the compiler makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoshard.cli.output import Json, say, show, show_json
from autoshard.cli.running import load_named

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autoshard.verify import Comparison, Verdict

STAGES = ("partitioned", "optimized")


def verify(
    plan_file: Annotated[
        str, typer.Argument(metavar="PLAN", help="A plan that `search -o` wrote.")
    ],
    as_json: Json = False,
) -> None:
    """Compile a plan's step and compare the collectives planned with those emitted.

    It is compiled by XLA for as many virtual CPU devices as the plan has chips; nothing
    is run. What XLA adds, leaves out or changes is named with its cause. The exit code
    is 5 where a difference has no known cause.
    """
    from autoshard import api
    from autoshard.cli.devices import devices_for
    from autoshard.ir.errors import PlanMismatchError

    plan = load_named(plan_file, "verify it there, with autoshard.verify_plan")
    assert plan.program.model is not None
    count = plan.cluster.num_chips
    devices = devices_for(f"cpu:{count}", "cpu", count)
    resolved = api.resolve(plan.program.model)
    say(f"compiling for {count} virtual CPU devices")
    verdict = api.verify_plan(resolved.step, plan, devices=devices)
    if as_json:
        show_json(_as_dict(verdict))
    else:
        show(_table(verdict))
    unexplained = len(verdict.optimized.unexplained + verdict.partitioned.unexplained)
    if unexplained:
        raise PlanMismatchError(
            f"{unexplained} differences between planned and emitted collectives have "
            "no known cause; they are listed above. Search the plan again with this "
            "version of JAX; if they stay, report them with the plan."
        )


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    found: dict[str, Any] = {
        stage: {
            "planned_bytes": one.planned_bytes,
            "emitted_bytes": one.emitted_bytes,
            "matched_bytes": one.matched_bytes,
            "fraction": one.fraction,
            "forms_bytes": one.by_form(),
            "causes_bytes": one.by_cause(),
            "differences": [str(difference) for difference in one.differences],
        }
        for stage, one in _comparisons(verdict)
    }
    found["rematerialized"] = list(verdict.rematerialized)
    return found


def _comparisons(verdict: Verdict) -> list[tuple[str, Comparison]]:
    return [(stage, getattr(verdict, stage)) for stage in STAGES]


def _table(verdict: Verdict) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from autoshard.report.table import bullets, heading, new_table
    from autoshard.report.units import bytes_text, percent_text

    both = [one for _, one in _comparisons(verdict)]
    table = new_table("bytes of all collectives of a step")
    for name in ("after partitioning", "after optimization"):
        table.add_column(name, justify="right")

    def add(name: str, cells: list[str]) -> None:
        table.add_row(Text(name), *cells)

    add("planned", [bytes_text(one.planned_bytes) for one in both])
    add("emitted", [bytes_text(one.emitted_bytes) for one in both])
    add("of them alike", [percent_text(one.fraction) for one in both])
    for sums in ([one.by_form() for one in both], [one.by_cause() for one in both]):
        for name in dict.fromkeys(name for each in sums for name in each):
            add(f"- {name}", [bytes_text(each.get(name, 0)) for each in sums])
    parts: list[RenderableType] = [table]
    for name, one in zip(("partitioning", "optimization"), both, strict=True):
        if one.differences:
            parts.append(heading(f"Differences after {name}"))
            parts.append(bullets(map(str, one.differences)))
    if verdict.rematerialized:
        parts.append(heading("Gathered whole on every device, as XLA warns"))
        parts.append(bullets(verdict.rematerialized))
    return Group(*parts)
