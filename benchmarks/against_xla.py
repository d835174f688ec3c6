"""Planned collectives against those that XLA emits.

Every program of the suite (tiny models of the zoo, layers in a loop and unrolled, and
small sizes of other people's models where they are installed) is planned under every
strategy file on meshes 2x4, 4x2 and 8, lowered, and compiled for 8 virtual CPU devices.
The plan's collectives (kind, mesh axes, bytes, count) are held against those of the
module right after SPMD partitioning, and against those of the optimized module. Bytes
match where kind, axes and bytes of a planned collective are those of an emitted one, or
where the same movement is written in another way, named under `forms_bytes`. A fraction
is the bytes that match, of the larger side. Every other byte is under a named cause.
Bars: 99 % of all bytes match, before and after optimization; no difference is
unexplained; XLA warns nowhere that it gathered a whole array for want of another way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _record

BAR = 0.99
STAGES = ("partitioned", "optimized")
UNEXPLAINED = "unexplained"
CI = (
    ("gpt2-tiny-scanned", "fsdp", (2, 4)),
    ("gpt2-tiny-unrolled", "megatron-tp", (4, 2)),
    ("llama3-tiny-scanned", "megatron-sp", (2, 4)),
    ("llama3-tiny-scanned", "fsdp-tp", (2, 4)),
    ("llama3-tiny-unrolled", "zero2", (8,)),
)
"""Program, strategy and mesh of the cases that `--ci` runs."""


def options() -> argparse.Namespace:
    """The command line."""
    parser = _record.parser(__doc__, "cases whose name contains it")
    add = parser.add_argument
    add("--models", default="", metavar="A,B", help="programs by name, or zoo, clients")
    add("--ci", action="store_true", help="a few cases of the zoo")
    add("--child", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args()


def use_cpu() -> None:
    """Eight virtual devices."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


def run(case: Any) -> dict[str, Any]:
    """One case; how it failed, or its figures."""
    import _suite
    import jax

    from autoshard.ir.errors import InfeasibleError, InputError

    start_s = time.perf_counter()
    found: dict[str, Any] = {
        "program": case.program.name,
        "strategy": case.strategy,
        "mesh": dict(case.mesh),
        "schedule": case.schedule,
    }
    try:
        plan, verdict = _suite.plan_and_verify(case)
    except Exception as error:
        # A small model need not divide over every mesh, nor do its own annotations.
        indivisible = isinstance(error, InfeasibleError) or (
            isinstance(error, InputError) and "is not divisible by" in str(error)
        )
        kind = "left_out" if indivisible else "failed"
        found[kind] = f"{type(error).__name__}: {error}"
    else:
        found["partitioned"] = _suite.figures(verdict.partitioned)
        found["optimized"] = _suite.figures(verdict.optimized)
        said = [note for note in plan.notes if "rematerial" in note]
        found["rematerialized"] = list(verdict.rematerialized)
        found["rematerialized_as_planned"] = bool(said)
        found["constraints"] = len(plan.constraints)
    found["duration_s"] = round(time.perf_counter() - start_s, 1)
    jax.clear_caches()  # nothing that was compiled is used twice
    return found


def select(arguments: argparse.Namespace) -> list[Any]:
    """The cases that the command line asks for."""
    import _suite

    programs = {**_suite.zoo(), **_suite.third_party()}
    wanted = set(filter(None, arguments.models.split(",")))
    if "zoo" in wanted:
        wanted |= set(_suite.zoo())
    if "clients" in wanted:
        wanted |= set(_suite.third_party())
    unknown = wanted - set(programs) - {"zoo", "clients"}
    if unknown:
        raise SystemExit(f"unknown programs {sorted(unknown)}; known: {[*programs]}")
    found = [
        case
        for name, program in programs.items()
        if not wanted or name in wanted
        for case in _suite.cases(program)
        if arguments.only in case.name
    ]
    if arguments.ci:
        found = [
            case
            for case in found
            if case.schedule == "plain"
            and (case.program.name, case.strategy, active(case)) in CI
        ]
    return found


def active(case: Any) -> tuple[int, ...]:
    """Sizes of the mesh axes that have more than one device."""
    return tuple(size for _, size in case.mesh if size > 1)


def row(found: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    mesh = " ".join(f"{a}={n}" for a, n in found["mesh"].items() if n > 1)
    head = (found["program"], found["strategy"], mesh, found["schedule"])
    if "partitioned" not in found:
        return (*head, "-", "-", "-", found.get("failed", "left out")[:60])
    stages = [found[stage] for stage in STAGES]
    causes = sorted({cause for s in stages for cause in s["causes_bytes"]})
    if found["rematerialized"]:
        causes.insert(0, "REMATERIALIZED")
    return (
        *head,
        f"{stages[0]['planned_bytes']}",
        *(f"{100 * s['fraction']:.2f}" for s in stages),
        "; ".join(causes),
    )


def totals(cases: list[dict[str, Any]], stage: str) -> dict[str, Any]:
    """Sums over the cases that ran."""
    ran = [found[stage] for found in cases if stage in found]
    most = sum(max(s["planned_bytes"], s["emitted_bytes"]) for s in ran)
    whole: dict[str, Any] = {
        key: sum(s[key] for s in ran)
        for key in ("planned_bytes", "emitted_bytes", "matched_bytes", "steps_bytes")
    }
    whole["fraction"] = whole["matched_bytes"] / most if most else 1.0
    whole["worst_fraction"] = min((s["fraction"] for s in ran), default=1.0)
    for key in ("forms_bytes", "causes_bytes"):
        names = sorted({name for s in ran for name in s[key]})
        whole[key] = {name: sum(s[key].get(name, 0) for s in ran) for name in names}
    return whole


def in_child(program: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs one program's cases in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "cases.json"
        words = ["--models", program, "--only", arguments.only, "--child", str(into)]
        done = subprocess.run([sys.executable, __file__, *words], check=False)
        if into.exists():
            return json.loads(into.read_text())
    return [
        {
            "program": program,
            "strategy": "-",
            "mesh": {},
            "schedule": "-",
            "failed": f"the process ended with {done.returncode}",
        }
    ]


def main() -> int:
    """Runs the suite; 1 when a bar is missed."""
    arguments, start = options(), _record.begin()
    use_cpu()
    cases = select(arguments)
    programs = list(dict.fromkeys(case.program.name for case in cases))
    if arguments.child or len(programs) == 1 or arguments.ci:
        found = []
        for case in cases:
            found.append(run(case))
            print(*row(found[-1]), sep="  ", file=sys.stderr, flush=True)
    else:
        # Importing a client may change Flax for those after it.
        found = [f for name in programs for f in in_child(name, arguments)]
    if arguments.child:
        arguments.child.write_text(json.dumps(found))
        return 0
    return report(arguments, found, start)


def report(
    arguments: argparse.Namespace, found: list[dict[str, Any]], start: Any
) -> int:
    """Prints the table and writes the record."""
    headers = ("program", "strategy", "mesh", "schedule", "planned bytes", "% after")
    headers = (*headers, "% at end", "differences")
    _record.table(headers, [row(case) for case in found])
    by_stage = {stage: totals(found, stage) for stage in STAGES}
    failed = [case for case in found if "failed" in case]
    warned = [
        case
        for case in found
        if case.get("rematerialized") and not case["rematerialized_as_planned"]
    ]
    unexplained = sum(s["causes_bytes"].get(UNEXPLAINED, 0) for s in by_stage.values())
    fractions = [by_stage[stage]["fraction"] for stage in STAGES]
    passed = not (failed or warned or unexplained) and min(fractions) >= BAR
    for stage in STAGES:
        print(f"{stage}: {100 * by_stage[stage]['fraction']:.3f} % of bytes match")
        for cause, bytes_ in by_stage[stage]["causes_bytes"].items():
            print(f"  {bytes_:>12}  {cause}")
    print(
        f"{len(found)} cases, {len(failed)} failed, {len(warned)} with unplanned "
        f"rematerialization, {unexplained} bytes unexplained"
    )
    what = (__doc__ or "").strip()
    figures = {
        "bar": BAR,
        "cases": len(found),
        "failed": len(failed),
        "left_out": sum("left_out" in case for case in found),
        "rematerialized": len(warned),
        **by_stage,
        "by_case": found,
    }
    words = [f"--{k} {v}" for k, v in (("models", arguments.models),) if v]
    words += [f"--only '{arguments.only}'"] * bool(arguments.only)
    words += ["--ci"] * arguments.ci
    _record.write(
        arguments.into,
        "against_xla",
        what=what,
        command=" ".join(["python benchmarks/against_xla.py", *words]),
        figures=figures,
        passed=passed,
        start=start,
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
