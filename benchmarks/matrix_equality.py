"""Every strategy against one device, over the whole matrix.

{gpt2-tiny, llama3-tiny} x {layers in a loop, unrolled} x every strategy file x {as
searched, two microbatches with full rematerialisation}, float32 on 8 virtual CPU
devices. Each case searches a plan, writes and reads it as JSON, runs 3 steps of AdamW
with it, and compares loss, gradients, parameters and optimizer state, leaf by leaf,
with the plain step on one device. Bar: the norm of every difference is at most 1e-5
of the norm of the reference, and every plan's JSON comes back as it was.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import _record
import jax

from autoshard.plan.files import load_strategy, strategy_names

sys.path.insert(0, str(_record.ROOT / "tests"))
from helpers import equality

BAR = 1e-5
MODELS = ("gpt2-tiny", "llama3-tiny")
LAYERS = {"scanned": True, "unrolled": False}
SCHEDULES = ("as searched", "microbatches=2 remat=full")


def case(model: str, layers: str, strategy: str, schedule: str) -> dict[str, Any]:
    """Runs one case; the worst difference by kind, and in which leaf."""
    if schedule == "as searched":
        policy = load_strategy(strategy)
    else:
        policy = equality.pinned(strategy, microbatches=2, remat="full")
    start_s = time.perf_counter()
    found = equality.run_and_compare(model, LAYERS[layers], policy)
    kind = max(found["worst"], key=found["worst"].__getitem__)
    return {
        "model": model,
        "layers": layers,
        "strategy": strategy,
        "schedule": schedule,
        **found,
        "worst_of_all": found["worst"][kind],
        "worst_kind": kind,
        "duration_s": round(time.perf_counter() - start_s, 1),
        # Written so that a NaN does not pass.
        "passed": found["round_trip"]
        and all(difference <= BAR for difference in found["worst"].values()),
    }


def row(found: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    where = found["where"][found["worst_kind"]] or found["worst_kind"]
    return (
        found["model"],
        found["layers"],
        found["strategy"],
        mesh or "one device",
        f"{found['microbatches']}",
        found["remat"],
        f"{found['worst_of_all']:.1e}",
        "" if found["passed"] else "FAILED",
        where,
    )


def main() -> int:
    """Runs the matrix; 1 when a case is beyond the bar."""
    options, start = _record.arguments(__doc__ or ""), _record.begin()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    names = strategy_names()
    matrix = list(itertools.product(MODELS, LAYERS, names, SCHEDULES))
    cases = []
    for number, (model, layers, strategy, schedule) in enumerate(matrix, start=1):
        cases.append(case(model, layers, strategy, schedule))
        print(f"{number}/{len(matrix)}", *row(cases[-1]), file=sys.stderr, flush=True)
        jax.clear_caches()  # nothing that was compiled is used twice
    headers = ("model", "layers", "strategy", "mesh", "microbatches", "remat", "worst")
    _record.table((*headers, "", "where"), [row(found) for found in cases])
    worst = max(found["worst_of_all"] for found in cases)
    failed = [found for found in cases if not found["passed"]]
    print(f"{len(cases)} cases, worst {worst:.2e} (bar {BAR}), {len(failed)} failed")
    _record.write(
        options.into,
        "equality",
        what=(__doc__ or "").strip(),
        command="python benchmarks/matrix_equality.py",
        figures={
            "bar": BAR,
            "cases": len(cases),
            "failed": len(failed),
            "worst": worst,
            "batch": equality.BATCH,
            "seq": equality.SEQ,
            "steps": equality.STEPS,
            "dtype": "float32",
            "by_case": cases,
        },
        passed=not failed,
        start=start,
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
