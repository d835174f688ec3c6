"""How far from the best the plans of the zoo may be, and how soon they are found again.

Every model of the zoo is searched under `auto` on clusters of 8 to 64 chips. The gap of
a plan is what its certificate says: its time, priced with its microbatches traced, over
the bound on everything in the space. Then one field is fixed by hand, and the same
solver is asked again.

Bars: no gap above 1 %; a second solve within one second, in the median.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import _record

MODELS = {
    "gpt2-tiny": 256,
    "llama3-tiny": 256,
    "gpt3-tiny": 256,
    "mixtral-tiny": 256,
    "gpt2-124m": 1024,
    "gpt2-1.5b": 1024,
    "llama3-8b": 8192,
    "mixtral-8x7b": 4096,
    "llama3-70b": 8192,
    "gpt3-175b": 2048,
    "llama3-405b": 8192,
}
"""Sequence length by model."""

CLUSTERS = ("h100:8", "h100:64", "v5e:4x4", "v5p:4x4x4")
SEQUENCES_PER_CHIP = 2
KEPT = 5
"""Candidates that a search for one plan keeps."""

PINS = ({"data": 2}, {"remat": "full"}, {"tensor": 2})
BAR_GAP, BAR_AGAIN_S = 0.01, 1.0


def case(model: str, spec: str) -> dict[str, Any]:
    """The gap of one plan, and the times of solving once and again."""
    from autoshard import api
    from autoshard.ir.errors import InfeasibleError
    from autoshard.plan.schema import ModelRef

    chips = api.cluster(spec)
    ref = ModelRef(
        model=model,
        batch=SEQUENCES_PER_CHIP * chips.num_chips,
        seq=MODELS[model],
        optimizer="adamw",
        learning_rate=3e-4,
        dtype="bf16",
    )
    resolved = api.resolve(ref)
    beside_s, start_s = _record.loop_s(), time.perf_counter()
    solver = api.solver(resolved.step, resolved.batch, cluster=chips, model_ref=ref)
    found: dict[str, Any] = {"model": model, "cluster": spec, "batch": ref.batch}
    found["loop_s"] = beside_s
    try:
        # What would fit instead is not asked for here.
        plans = solver.plans() if solver.explored(KEPT).ranked else []
    except InfeasibleError:
        plans = []
    if not plans:
        return {**found, "fits": False, "first_s": time.perf_counter() - start_s}
    [plan] = plans
    found["first_s"] = time.perf_counter() - start_s
    again = {}
    for pins in PINS:
        start_s = time.perf_counter()
        try:
            solver.pinned(pins).plans()
        except InfeasibleError:
            continue  # nothing fits, or divides, with that
        name = ",".join(f"{key}={value}" for key, value in pins.items())
        again[name] = time.perf_counter() - start_s
    return {
        **found,
        "fits": True,
        "step_s": plan.predicted.step_s,
        "lower_bound_s": plan.certificate.lower_bound_s,
        "gap": plan.certificate.gap,
        "mesh": {axis.axis: axis.size for axis in plan.axes if axis.size > 1},
        "microbatches": plan.microbatches,
        "again_s": again,
    }


def main() -> int:
    """Searches every case; 1 when a bar is missed."""
    given = _record.parser(__doc__ or "", "cases that have it").parse_args()
    start = _record.begin()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cases = []
    for model in MODELS:
        for spec in CLUSTERS:
            if given.only in f"{model} on {spec}":
                cases.append(case(model, spec))
                print(cases[-1], file=sys.stderr, flush=True)
    fitting = [one for one in cases if one["fits"]]
    again = [s for one in fitting for s in one["again_s"].values()]
    gaps = [one["gap"] for one in fitting]
    _record.table(
        ("model", "cluster", "gap %", "first s", "again s"),
        [
            (
                one["model"],
                one["cluster"],
                f"{100 * one['gap']:.2f}" if one["fits"] else "-",
                f"{one['first_s']:.1f}",
                " ".join(f"{s:.2f}" for s in one.get("again_s", {}).values()) or "-",
            )
            for one in cases
        ],
    )
    worst = max(gaps, default=None)
    median = statistics.median(again) if again else None
    print(f"worst gap {worst}, median of a second solve {median} s")
    measured = worst is not None and median is not None
    passed = measured and worst <= BAR_GAP and median <= BAR_AGAIN_S
    _record.write(
        given.into,
        "certificates",
        what=(__doc__ or "").strip(),
        command="python benchmarks/certificates.py"
        + (f" --only {given.only!r}" if given.only else ""),
        figures={
            "bar_gap": BAR_GAP,
            "bar_again_s": BAR_AGAIN_S,
            "worst_gap": worst,
            "median_again_s": median,
            "max_again_s": max(again, default=None),
            "iterations_of_loop": _record.LOOPS,
            "cases": cases,
        },
        passed=passed,
        start=start,
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
