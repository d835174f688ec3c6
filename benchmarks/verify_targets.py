"""Plans against what the TPU and GPU compilers make of them, with neither at hand.

Every tiny model of the zoo is planned under every strategy file, layers in a loop, with
and without accumulation and remat, and unrolled; the plan is compiled ahead of time for
its own topology and held against the scheduled program: collectives (kind, mesh axes,
bytes, count), memory and time. Recorded are the share of bytes that agrees in any form
and the share that is emitted just as planned, of the larger side; the differences
without a known cause; planned memory over compiled; seconds of the compiler, and
processor seconds of the whole case, as a machine may be shared. `--large` compiles an
8B decoder of two blocks for `v5e:16x16` or `h100:64` instead. Bars: no difference is
unexplained; the two-block 8B takes 60 seconds or less from start to end, with nothing
else running (the TPU compiler works on two cores at once).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import _record

CLUSTERS = {"tpu": ("v5e:2x4", "v5p:2x2x2"), "gpu": ("h100:8", "h100:2x8")}
LARGE = {"tpu": "v5e:16x16", "gpu": "h100:64"}
MODELS = ("llama3-tiny", "gpt2-tiny", "gpt3-tiny")
VARIANTS = ("scanned", "accumulated", "unrolled")
BATCH, SEQ = 16, 64
LARGE_BATCH, LARGE_SEQ = 256, 4096
LARGE_BAR_S = 60.0


def options() -> argparse.Namespace:
    """The command line."""
    parser = _record.parser(__doc__, "cases whose name contains it")
    add = parser.add_argument
    add("kind", choices=tuple(CLUSTERS), help="whose compiler")
    add("--variants", default=",".join(VARIANTS), metavar="A,B", help="of the program")
    add("--large", action="store_true", help="an 8B decoder of two blocks instead")
    return parser.parse_args()


def mesh_of(strategy: str, num_chips: int) -> dict[str, int]:
    """A mesh with as many axes in use as a strategy has, up to three."""
    from autoshard.plan.files import load_strategy

    axes = list(load_strategy(strategy).mesh)
    sizes = {1: (num_chips,), 2: (2, num_chips // 2)}
    last = sizes.get(len(axes), (2, 2, num_chips // 4))
    return dict(zip(axes, (1,) * (len(axes) - len(last)) + last, strict=True))


def cases(arguments: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """Cluster, model, variant and strategy of every case."""
    from autoshard.plan.files import strategy_names

    found = [
        (spec, model, variant, strategy)
        for spec in CLUSTERS[arguments.kind]
        for model in MODELS
        for variant in arguments.variants.split(",")
        for strategy in strategy_names()
    ]
    return [case for case in found if arguments.only in " ".join(case)]


def run(spec: str, model: str, variant: str, strategy: str) -> dict[str, Any]:
    """One case: how it failed, or its figures."""
    from autoshard import api
    from autoshard.ir.errors import AutoshardError
    from autoshard.plan.schema import ModelRef

    chips = api.cluster(spec)
    policy = api.load_strategy(strategy)
    schedule = (2, "full") if variant == "accumulated" else (1, "none")
    fixed = dict(zip(("microbatches", "remat"), schedule, strict=True))
    policy = policy.model_copy(
        update={
            "mesh": mesh_of(strategy, chips.num_chips),
            "schedule": policy.schedule.model_copy(update=fixed),
        }
    )
    ref = ModelRef(
        model=model,
        batch=BATCH,
        seq=SEQ,
        optimizer="adamw",
        learning_rate=1e-3,
        dtype="bf16",
        scan_layers=variant != "unrolled",
    )
    case = {
        "cluster": spec,
        "model": model,
        "variant": variant,
        "strategy": strategy,
        "mesh": policy.mesh,
    }
    start_s = time.process_time()
    try:
        resolved = api.resolve(ref)
        plan = api.search(
            resolved.step,
            resolved.batch,
            cluster=chips,
            strategy=policy,
            model_ref=ref,
            executable=True,
        )
        found = api.verify_plan(resolved.step, plan)
    except AutoshardError as error:
        return {**case, "failed": str(error)}
    return {**case, "processor_s": time.process_time() - start_s, **figures(found)}


def figures(found: Any) -> dict[str, Any]:
    """A verification as it is recorded."""
    memory, clock, one = found.compiled, found.time, found.comparison
    return {
        "fits": found.fits,
        "fraction": one.fraction if one else None,
        "exact_fraction": found.exact_fraction,
        "partitioned_fraction": found.partitioned.fraction
        if found.partitioned
        else None,
        "unexplained": found.unexplained,
        "planned_bytes": one.planned_bytes if one else None,
        "emitted_bytes": one.emitted_bytes if one else None,
        "forms_bytes": one.by_form() if one else {},
        "causes_bytes": one.by_cause() if one else {},
        "without_cause": [str(d) for d in one.unexplained] if one else [],
        "planned_memory_bytes": found.planned_memory_bytes,
        "compiled_memory_bytes": memory.peak_bytes if memory else None,
        "planned_compute_s": found.planned_compute_s,
        "counted_compute_s": found.counted_compute_s,
        "compiler_compute_s": clock.compute_s if clock else None,
        "planned_collective_s": found.planned_collective_s,
        "compiler_collective_s": clock.collective_s if clock else None,
        "compile_s": found.compile_s,
    }


def large(kind: str) -> dict[str, Any]:
    """An 8B decoder cut to two blocks, on a whole cluster."""
    from autoshard import api
    from autoshard.plan.schema import ModelRef

    ref = ModelRef(
        model="llama3-8b",
        batch=LARGE_BATCH,
        seq=LARGE_SEQ,
        optimizer="adamw",
        learning_rate=3e-4,
        dtype="bf16",
    )
    resolved = api.resolve(ref, layers=2)
    plan = api.search(
        resolved.step, resolved.batch, cluster=LARGE[kind], strategy="fsdp-tp"
    )
    start_s, start_wall_s = time.process_time(), time.perf_counter()
    found = api.verify_plan(resolved.step, plan)
    return {
        "cluster": LARGE[kind],
        "model": "llama3-8b",
        "variant": "two blocks in a loop",
        "strategy": "fsdp-tp",
        "mesh": plan.strategy.mesh,
        "processor_s": time.process_time() - start_s,
        "wall_s": time.perf_counter() - start_wall_s,
        **figures(found),
    }


def row(case: dict[str, Any]) -> tuple[Any, ...]:
    """A line of the table."""
    name = [case[key] for key in ("cluster", "model", "variant", "strategy")]
    if "failed" in case:
        return (*name, "failed", "", "", "", "")
    compiled = case["compiled_memory_bytes"]
    memory = f"{case['planned_memory_bytes'] / compiled:.2f}" if compiled else "-"
    shares = [case["fraction"], case["exact_fraction"]]
    texts = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
    return (*name, *texts, case["unexplained"], memory, f"{case['compile_s']:.1f}")


def totals(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all cases together."""
    ran = [case for case in found if "failed" not in case]
    ratios = [
        case["planned_memory_bytes"] / case["compiled_memory_bytes"] - 1
        for case in ran
        if case["compiled_memory_bytes"]
    ]
    most = sum(max(c["planned_bytes"] or 0, c["emitted_bytes"] or 0) for c in ran)

    def share(key: str) -> float:
        parts = (
            (c[key] or 0) * max(c["planned_bytes"] or 0, c["emitted_bytes"] or 0)
            for c in ran
        )
        return sum(parts) / most if most else 1.0

    return {
        "cases": len(found),
        "failed": len(found) - len(ran),
        "unexplained": sum(case["unexplained"] for case in ran),
        "fraction": share("fraction"),
        "exact_fraction": share("exact_fraction"),
        "memory_error_median": statistics.median(map(abs, ratios)) if ratios else None,
        "compile_s_median": statistics.median(c["compile_s"] for c in ran)
        if ran
        else None,
    }


def main() -> int:
    """Runs the cases; 1 when a bar is missed."""
    arguments, start = options(), _record.begin()
    import jax

    jax.config.update("jax_platforms", "cpu")
    found = []
    if arguments.large:
        found.append(large(arguments.kind))
    for case in [] if arguments.large else cases(arguments):
        found.append(run(*case))
        print(*row(found[-1]), sep="  ", file=sys.stderr, flush=True)
    headers = ("cluster", "model", "variant", "strategy", "% alike", "% exact")
    headers = (*headers, "unexplained", "memory", "compile s")
    _record.table(headers, [row(case) for case in found])
    whole = totals(found)
    print(*(f"{key}: {value}" for key, value in whole.items()), sep="\n")
    passed = not whole["failed"] and not whole["unexplained"]
    name = f"verify_targets_{arguments.kind}"
    words = ["python benchmarks/verify_targets.py", arguments.kind]
    if arguments.large:
        name += "_large"
        words.append("--large")
        passed = passed and found[0]["wall_s"] <= LARGE_BAR_S
    if arguments.variants != ",".join(VARIANTS):
        words.append(f"--variants {arguments.variants}")
    if arguments.only:
        words.append(f"--only '{arguments.only}'")
    _record.write(
        arguments.into,
        name,
        what=(__doc__ or "").strip(),
        command=" ".join(words),
        figures={**whole, "by_case": found},
        passed=passed,
        start=start,
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
