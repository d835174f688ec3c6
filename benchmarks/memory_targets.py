"""Planned memory of models at their real widths, against what compilers allocate.

Zoo models of few layers, and Llama 3 8B whole, are planned under every strategy for 8,
64 and 256 TPUs or GPUs and compiled for them. The planned peak is held against the
compiler's `memory_analysis`: on GPUs arguments, results and temporaries, on TPUs the
peak that it reports (see `verify.aot`). The subset covers each strategy on the 8 and
the 64 chips, each schedule on the 64, and on the 256 those strategies that divide the
state. With `--minutes` no case is begun after so many minutes; cases left out are
listed. Bars: error of 5 % at the median, 10 % at the 90th percentile, no case failed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import _record

CLUSTERS = {
    "tpu": ("v5e:2x4", "v5p:4x4x4", "v5p:4x8x8"),
    "gpu": ("h100:8", "h100:64", "h100:256"),
}
SCHEDULES = {
    "scanned": (1, "none"),
    "unrolled": (1, "none"),
    "remat": (1, "full"),
    "accumulated": (2, "full"),
}
SEQ = {"gpt2-124m": 1024, "gpt3-175b": 2048, "llama3-8b": 2048}
TENSOR = {"tpu": 4, "gpu": 8}
ROWS = 2
"""Sequences a chip, but one for the large models unless they are accumulated."""
BAR_MEDIAN, BAR_P90 = 0.05, 0.10

Case = tuple[str, str, int, str, str]


def cases(kind: str) -> list[Case]:
    """Cluster, model, layers, strategy and variant; those most telling first."""
    from autoshard.plan.files import strategy_names

    small, middle, large = CLUSTERS[kind]
    names = strategy_names()
    found = [(middle, "llama3-8b", 2, name, "scanned") for name in names]
    found += [(small, "gpt2-124m", 2, name, "scanned") for name in names]
    for variant, some in (
        ("remat", ("fsdp", "megatron-sp", "zero1")),
        ("accumulated", ("dp", "fsdp", "fsdp-tp", "zero2")),
    ):
        found += [(middle, "llama3-8b", 2, name, variant) for name in some]
    found += [(large, "llama3-8b", 2, n, "scanned") for n in ("fsdp", "fsdp-tp")]
    found += [(large, "gpt2-124m", 2, n, "scanned") for n in ("zero1", "megatron-tp")]
    found += [(middle, "gpt3-175b", 2, n, "scanned") for n in ("fsdp", "fsdp-tp")]
    found += [(small, "gpt2-124m", 4, n, "unrolled") for n in ("dp", "fsdp")]
    return [*found, (middle, "llama3-8b", 32, "fsdp", "remat")]


def mesh_of(case: Case, kind: str, num_chips: int) -> dict[str, int]:
    """As much tensor parallelism as a node or a torus dim has, the rest for data."""
    from autoshard.plan.files import load_strategy

    axes = list(load_strategy(case[3]).mesh)
    mesh = dict.fromkeys(axes, 1)
    rest = num_chips
    if "tensor" in mesh:  # GPT-2 has 12 heads
        mesh["tensor"] = 4 if case[1] == "gpt2-124m" else TENSOR[kind]
        rest //= mesh["tensor"]
    mesh["fsdp" if "fsdp" in mesh else "data"] = rest
    return mesh


def run(case: Case, kind: str) -> dict[str, Any]:
    """One case: how it failed, or its figures."""
    from autoshard import api
    from autoshard.ir.errors import AutoshardError
    from autoshard.plan.schema import ModelRef

    spec, model, layers, strategy, variant = case
    chips, policy = api.cluster(spec), api.load_strategy(strategy)
    fixed = dict(zip(("microbatches", "remat"), SCHEDULES[variant], strict=True))
    mesh = mesh_of(case, kind, chips.num_chips)
    schedule = policy.schedule.model_copy(update=fixed)
    policy = policy.model_copy(update={"mesh": mesh, "schedule": schedule})
    rows = ROWS if model == "gpt2-124m" or variant == "accumulated" else 1
    ref = ModelRef(
        model=model,
        batch=chips.num_chips * rows,
        seq=SEQ[model],
        optimizer="adamw",
        learning_rate=1e-3,
        dtype="bf16",
        scan_layers=variant != "unrolled",
    )
    named = {**named_of(case), "mesh": mesh}
    try:
        resolved = api.resolve(ref, layers=layers)
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
        return {**named, "failed": str(error)}
    memory = found.compiled
    if memory is None:
        return {**named, "failed": "refused for want of memory"}
    table = plan.predicted.memory
    return {
        **named,
        "planned_bytes": table.total,
        "planned_state_bytes": table.params + table.optimizer + table.other,
        "compiled_bytes": memory.peak_bytes,
        "compiled_argument_bytes": memory.argument_bytes,
        "compiled_reported_bytes": memory.reported_bytes,
        "error": table.total / memory.peak_bytes - 1,
        "compile_s": found.compile_s,
    }


def named_of(case: Case) -> dict[str, Any]:
    """A case in words."""
    return dict(
        zip(("cluster", "model", "layers", "strategy", "variant"), case, strict=True)
    )


def totals(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of all cases together, and of each model, strategy and variant."""
    ran = [case for case in found if "failed" not in case]
    errors = sorted(abs(case["error"]) for case in ran)
    groups: dict[str, list[float]] = {}
    for case in ran:
        for key in ("model", "strategy", "variant"):
            groups.setdefault(f"{key} {case[key]}", []).append(case["error"])
    return {
        "cases": len(found),
        "failed": len(found) - len(ran),
        "error_median": statistics.median(errors) if errors else None,
        "error_p90": errors[round(0.9 * (len(errors) - 1))] if errors else None,
        "signed_error_median_of": {
            name: statistics.median(group) for name, group in sorted(groups.items())
        },
    }


def options() -> argparse.Namespace:
    """The command line."""
    parser = _record.parser(__doc__, "cases whose name contains it")
    add = parser.add_argument
    add("kind", choices=tuple(CLUSTERS), help="whose compiler")
    add("--minutes", type=float, default=60.0, help="begin no case after so many")
    return parser.parse_args()


def main() -> int:
    """Runs the cases; 1 when a bar is missed."""
    arguments, start = options(), _record.begin()
    import jax

    jax.config.update("jax_platforms", "cpu")
    found, left_out = [], []
    begin_s = time.monotonic()
    for case in cases(arguments.kind):
        if arguments.only not in " ".join(map(str, case)):
            continue
        if time.monotonic() - begin_s > 60 * arguments.minutes:
            left_out.append(named_of(case))
            continue
        found.append(run(case, arguments.kind))
        error = found[-1].get("error", float("nan"))
        print(*case, f"{error:+.3f}", sep="  ", file=sys.stderr, flush=True)
    headers = (
        "cluster",
        "model",
        "layers",
        "strategy",
        "variant",
        "planned / compiled",
    )
    lines = [
        (*(case[key] for key in headers[:-1]), f"{1 + case['error']:.3f}")
        for case in found
        if "failed" not in case
    ]
    _record.table(headers, lines)
    whole = totals(found)
    print(*(f"{key}: {value}" for key, value in whole.items()), sep="\n")
    passed = bool(lines) and not whole["failed"] and not left_out
    passed = passed and whole["error_median"] <= BAR_MEDIAN
    passed = passed and whole["error_p90"] <= BAR_P90
    words = ["python benchmarks/memory_targets.py", arguments.kind]
    if arguments.only:
        words.append(f"--only '{arguments.only}'")
    if arguments.minutes != 60.0:
        words.append(f"--minutes {arguments.minutes:g}")
    _record.write(
        arguments.into,
        f"memory_targets_{arguments.kind}",
        what=(__doc__ or "").strip(),
        command=" ".join(words),
        figures={**whole, "left_out": left_out, "by_case": found},
        passed=passed,
        start=start,
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
