"""The plan found against plain strategies, all compiled for the chips themselves.

For models of the zoo, layers in a loop, on v5e, v5p and H100 clusters, the search plans
a step under `auto` (what can be executed) and under each of the strategies people write
by hand; every plan that fits is compiled ahead of time for its cluster, with neither a
TPU nor a GPU at hand. The cost of a plan is the compiler's own estimate of everything
that is not a collective, and of collectives: XLA's estimate on GPUs, the planned
time on TPUs, whose compiler gives none; of both the part that the cost model finds
not hidden by computation. A plan that the compiler refuses for want of memory, or
whose compiled memory is above the chip's, is out. Plans that are alike are compiled
once.

Bars: the cost of the plan found is never above 1.02 times that of the best strategy,
and is lower in the geometric mean.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from typing import Any

import _record

STRATEGIES = (
    "dp", "fsdp", "megatron-tp", "megatron-sp", "fsdp-tp", "redco",
)  # fmt: skip
FOUND = "auto"
CLUSTERS = {
    "tpu": ("v5e:2x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x2", "v5p:4x4x4", "v5p:4x8x8"),
    "gpu": ("h100:8", "h100:64", "h100:256"),
}
MODELS = {"gpt2-124m": 1024, "gpt2-1.5b": 1024, "llama3-8b": 4096}
SEQUENCES_PER_CHIP = 2
BAR = 1.02


def options() -> argparse.Namespace:
    """The command line."""
    parser = _record.parser(__doc__, "cases whose name contains it")
    add = parser.add_argument
    add("kind", choices=tuple(CLUSTERS), help="whose compiler")
    return parser.parse_args()


def case(spec: str, model: str) -> dict[str, Any]:
    """Costs of the plan found and of those of every strategy, by name."""
    from autoshard import api
    from autoshard.ir.errors import InfeasibleError
    from autoshard.plan.schema import ModelRef

    chips, seq = api.cluster(spec), MODELS[model]
    ref = ModelRef(
        model=model,
        batch=SEQUENCES_PER_CHIP * chips.num_chips,
        seq=seq,
        optimizer="adamw",
        learning_rate=3e-4,
        dtype="bf16",
    )
    resolved = api.resolve(ref)
    found: dict[str, Any] = {}
    compiled: dict[str, dict[str, Any]] = {}
    for name in (FOUND, *STRATEGIES):
        try:
            plan = api.search(
                resolved.step,
                resolved.batch,
                cluster=chips,
                strategy=name,
                model_ref=ref,
                executable=True,
            )
        except InfeasibleError as error:
            found[name] = {"left_out": f"no plan: {str(error).splitlines()[0]}"}
            continue
        key = layout_of(plan)
        if key not in compiled:
            start_s = time.monotonic()
            compiled[key] = figures(plan, api.verify_plan(resolved.step, plan))
            took_s = time.monotonic() - start_s
            print(f"{spec} {model} {name}: {took_s:.0f} s", file=sys.stderr, flush=True)
        found[name] = compiled[key]
    return {
        "cluster": spec,
        "model": model,
        "batch": ref.batch,
        "seq": seq,
        **rank(found),
    }


def layout_of(plan: Any) -> str:
    """What makes the program that is compiled: two plans with it are alike."""
    sizes = {axis.axis: axis.size for axis in plan.axes}
    tensors = [(t.path, t.storage, t.compute) for t in plan.tensors]
    schedule = plan.strategy.schedule
    alike = (sizes, tensors, plan.outputs, plan.constraints, schedule)
    return repr(alike)


def figures(plan: Any, verified: Any) -> dict[str, Any]:
    """A compiled plan's cost, and what it is made of."""
    predicted = plan.predicted
    shown, hidden = predicted.collective_s, predicted.hidden_s
    said = {
        "mesh": {axis.axis: axis.size for axis in plan.axes if axis.size > 1},
        "microbatches": plan.strategy.schedule.microbatches,
        "remat": plan.strategy.schedule.remat,
        "predicted_s": predicted.step_s,
        "compile_s": verified.compile_s,
    }
    if verified.fits is False:
        return {**said, "left_out": "the compiler's program does not fit in memory"}
    assert verified.time is not None
    moved_s = verified.time.collective_s
    # Of what the compiler emits as much is hidden as of what was planned.
    share = shown / (shown + hidden) if shown + hidden else 1.0
    exposed_s = shown if moved_s is None else share * moved_s
    return {
        **said,
        "cost_s": verified.time.compute_s + exposed_s,
        "compute_s": verified.time.compute_s,
        "collective_s": moved_s,
        "exposed_s": exposed_s,
        "unknown_ops": verified.time.unknown,
    }


def rank(found: dict[str, Any]) -> dict[str, Any]:
    """The plan found beside the best of the others."""
    costs = {n: f["cost_s"] for n, f in found.items() if n != FOUND and "cost_s" in f}
    best = min(costs, key=costs.__getitem__, default=None)
    ours = found[FOUND].get("cost_s")
    ratio = ours / costs[best] if best is not None and ours is not None else None
    return {"best": best, "ratio": ratio, "plans": found}


def main() -> int:
    """Compiles every case; 1 when a bar is missed."""
    given, start = options(), _record.begin()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cases = [
        case(spec, model)
        for spec in CLUSTERS[given.kind]
        for model in MODELS
        if given.only in f"{spec} {model}"
    ]
    ratios = [one["ratio"] for one in cases if one["ratio"] is not None]
    _record.table(
        ("cluster", "model", "found ms", "best", "ratio"),
        [
            (
                one["cluster"],
                one["model"],
                f"{1e3 * one['plans'][FOUND].get('cost_s', math.nan):.1f}",
                one["best"] or "-",
                "-" if one["ratio"] is None else f"{one['ratio']:.3f}",
            )
            for one in cases
        ],
    )
    logs = [math.log(ratio) for ratio in ratios]
    mean = math.exp(math.fsum(logs) / len(logs)) if logs else math.inf
    worst = max(ratios, default=math.inf)
    # A case without a plan, where a strategy has one, is the worst of all.
    lost = [o for o in cases if o["best"] is not None and o["ratio"] is None]
    passed = not lost and worst <= BAR and mean < 1.0
    print(f"worst ratio {worst}, geometric mean {mean}, without a plan {len(lost)}")
    words = ["python benchmarks/compiled_plans.py", given.kind]
    words += [f"--only '{given.only}'"] if given.only else []
    _record.write(
        given.into,
        f"compiled_plans_{given.kind}",
        what=(__doc__ or "").strip(),
        command=" ".join(words),
        figures={
            "bar": BAR,
            "worst_ratio": worst if ratios else None,
            "geometric_mean": mean if ratios else None,
            "lost": len(lost),
            "by_case": cases,
        },
        passed=passed,
        start=start,
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
