"""Programs that other people wrote, planned at full size and run at a small one.

For each client (`benchmarks/clients`), in a process of its own:

full    The train step of the published size is traced abstractly and propagated under
        every strategy file for 64 H100s: seconds, counts, the predicted memory of the
        best candidate that divides.
small   A small configuration is searched on 8 virtual CPU devices under several
        strategies and run for 2 steps. Loss, every gradient, every updated parameter
        and the optimizer state are compared, leaf by leaf, with the same step on one
        device, float32. Bar: the norm of every difference is at most 1e-5 of the norm
        of the reference. ResNets, where gradients of batch norms are sums that nearly
        cancel, are compared in float64 instead, with a bar of 1e-10. A leaf whose
        gradient is zero in exact arithmetic (the bias of attention's keys) is held
        against the norm of all leaves of its kind.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import _record

BAR = 1e-5
FLOAT64_BAR = 1e-10
STEPS = 2
FULL_CLUSTER = "h100:64"
SMALL_CLUSTER = "cpu:8"
SMALL_STRATEGIES = ("auto", "fsdp", "megatron-tp", "fsdp-tp")
CHILD_LIMIT_S = 1800


# --- in the child: one client ---------------------------------------------------------


def told(error: Exception) -> dict[str, Any]:
    """What went wrong, as data."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "autoshard" in f.filename]
    at = (ours or frames)[-1]
    return {
        "error": type(error).__name__,
        "message": str(error)[:2000],
        "at": f"{'/'.join(Path(at.filename).parts[-3:])}:{at.lineno} ({at.name})",
    }


def full(name: str) -> dict[str, Any]:
    """Traces the published size and propagates it under every strategy."""
    from clients import clients

    from autoshard import cluster
    from autoshard.plan.files import load_strategy, strategy_names
    from autoshard.search.candidates import Space

    case = clients()[name].full()
    chips = cluster(FULL_CLUSTER)
    start_s = time.perf_counter()
    space = Space(case.step, case.abstract_args, lambda _: None, load_strategy("auto"))
    try:
        sketch = space.sketch("none")
    except Exception as error:
        return told(error)
    assert sketch is not None
    traced = sketch.traced
    found: dict[str, Any] = {
        "ops": len(traced.program.ops),
        "params": sum(_elements(i.shape) for i in traced.inputs if i.state == "params"),
        "classes": len({c for dims in sketch.classes.of_value for c in dims}),
        "names": sorted({n for ns in sketch.classes.names.values() for n in ns}),
        "trace_and_analyse_s": round(time.perf_counter() - start_s, 2),
        "strategies": {},
    }
    for strategy in strategy_names():
        try:
            found["strategies"][strategy] = _propagated(space, strategy, chips)
        except Exception as error:
            found["strategies"][strategy] = told(error)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["process_peak_bytes"] = peak_kib * 1024
    return found


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _propagated(space: Any, name: str, chips: Any) -> dict[str, Any]:
    """One strategy on the cluster: the candidate predicted to be the fastest."""
    import numpy as np

    from autoshard.cost.price import MEMORY_HEADROOM
    from autoshard.ir.mesh import AXES
    from autoshard.plan.files import load_strategy
    from autoshard.plan.sharded import Layout
    from autoshard.propagate import propagate
    from autoshard.search.annotations import check_annotations
    from autoshard.search.candidates import Watch
    from autoshard.search.space import of_one_stage

    strategy = load_strategy(name)
    # One trace serves all strategies that ship: none names axes or paths anew.
    assert not strategy.aliases, name
    assert not strategy.specs, name
    assert not strategy.replicate, name
    check_annotations(space.sketch("none").traced, strategy)
    # Every layout of one stage is priced, without what a schedule adds to it.
    plain = {"remat": "none", "context_kind": "all_gather", "offload": ()}
    schedule = strategy.schedule.model_copy(update=plain)
    watch = Watch()
    structure = of_one_stage(strategy.model_copy(update={"schedule": schedule}))
    groups = list(space.priced(structure, chips, watch=watch))
    capacity = chips.hbm_bytes * MEMORY_HEADROOM
    best = None
    for group in groups:
        for k in range(len(group.sizes)):
            over = float(group.peak_bytes[k]) > capacity
            # Of those that fit the fastest; where none does, the smallest.
            rank = (over, float(group.peak_bytes[k] if over else group.step_s[k]))
            if best is None or rank < best[0]:
                best = (rank, group, k)
    counts = {
        "candidates": int(sum(len(g.sizes) for g in groups)),
        "indivisible": watch.indivisible,
    }
    if best is None:
        return {**counts, "error": "Indivisible", "message": "no candidate divides"}
    (over, _), group, k = best
    sizes = dict(zip(AXES, np.asarray(group.sizes[k]).tolist(), strict=True))
    sketch = space.sketch("none")
    layout = Layout.of(group.strategy, sizes)
    start_s = time.process_time()
    sharded = propagate(sketch.traced, sketch.classes, layout)
    return {
        **counts,
        "propagate_cpu_s": round(time.process_time() - start_s, 3),
        "mesh": {axis: n for axis, n in sizes.items() if n > 1},
        "microbatches": int(group.cuts[k]),
        "reshards": len(sharded.reshards),
        "notes": len(sharded.notes),
        "peak_bytes_per_chip": int(group.peak_bytes[k]),
        "fits": not over,
        "step_s": float(group.step_s[k]),
    }


def small(name: str, strategies: tuple[str, ...]) -> dict[str, Any]:
    """Searches, runs and compares the small size under each strategy."""
    import jax
    from clients import clients

    client = clients()[name]
    jax.config.update("jax_enable_x64", client.cancels)
    case, bar = client.small(), BAR
    if client.cancels:
        case, bar = case.in_float64(), FLOAT64_BAR
    found: dict[str, Any] = {}
    references: dict[Any, Any] = {}
    for strategy in strategies:
        start_s = time.perf_counter()
        try:
            found[strategy] = _compared(case, strategy, bar, references)
        except Exception as error:
            found[strategy] = {**told(error), "passed": False}
        found[strategy]["duration_s"] = round(time.perf_counter() - start_s, 1)
    return found


def _compared(
    case: Any, strategy: str, bar: float, references: dict[Any, Any]
) -> dict[str, Any]:
    import jax
    import numpy as np

    import autoshard as ash

    plan = ash.search(
        case.step,
        *case.abstract_args,
        cluster=SMALL_CLUSTER,
        strategy=strategy,
        executable=True,
    )
    is_train_step = isinstance(case.step, ash.TrainStep)
    if is_train_step:
        parallel = ash.parallelize(case.step, plan)
        got: Any = (parallel.init(0),)
    else:
        parallel = ash.parallelize(case.step, plan, *case.abstract_args)
        got = case.init(0)
    # Dropout draws per microbatch, so the reference cuts its batch alike.
    schedule = (plan.microbatches, plan.remat)
    if schedule not in references:
        references[schedule] = _reference(case, *schedule)
    kinds: dict[str, dict[str, Any]] = {}
    for number, want in enumerate(references[schedule]):
        *got, metrics = parallel(*got, case.batch(number))
        others = [np.asarray(x) for x in jax.tree.leaves((*got, {"metrics": metrics}))]
        pairs = zip(want.values(), others, strict=True)
        _merge(kinds, dict(zip(want, pairs, strict=True)), case.noise)
    sharded = sum(
        any(axes for axes in t.storage.dims)
        for t in plan.tensors
        if t.state == "params"
    )
    worst = {kind: facts["worst"] for kind, facts in kinds.items()}
    return {
        "mesh": {a.axis: a.size for a in plan.axes if a.size > 1},
        "microbatches": plan.microbatches,
        "remat": plan.remat,
        "ops": plan.program.ops,
        "collectives": len(plan.predicted.collectives),
        "constraints": len(plan.constraints),
        "params_sharded": sharded,
        "bar": bar,
        "loss": float(metrics["loss"]),
        "worst": worst,
        "where": {kind: facts["where"] for kind, facts in kinds.items()},
        "leaves": {kind: facts["leaves"] for kind, facts in kinds.items()},
        # Written so that a NaN does not pass.
        "passed": all(w <= bar for w in worst.values()),
    }


def _reference(case: Any, microbatches: int, remat: str) -> list[dict[str, Any]]:
    """State and metrics after each step on one device, by path."""
    import jax
    import numpy as np

    from autoshard.ir.train_step import TrainStep, path_string

    step = case.step
    if isinstance(step, TrainStep):
        step = step.with_schedule(microbatches=microbatches, remat=remat)
    run = jax.jit(step)
    state, results = case.init(0), []
    for number in range(STEPS):
        *state, metrics = run(*state, case.batch(number))
        after = (*state, {"metrics": metrics})
        results.append(
            {
                path_string(path): np.asarray(leaf)
                for path, leaf in jax.tree_util.tree_flatten_with_path(after)[0]
            }
        )
    return results


def _kind(path: str) -> str:
    parts = path.split("/")
    for kind in ("metrics", "gradients"):
        if kind in parts:
            return kind
    if {"mu", "nu", "count"} & set(parts):
        return "optimizer"
    return "state"


def _merge(kinds: dict[str, Any], leaves: dict[str, Any], noise: Any) -> None:
    """Adds the differences of one step to the worst so far, by kind of leaf."""
    import numpy as np

    norms: dict[str, float] = {}
    for path, (want, _) in leaves.items():
        square = float(np.square(np.asarray(want, np.float64)).sum())
        norms[_kind(path)] = norms.get(_kind(path), 0.0) + square
    for path, (want, got) in leaves.items():
        kind = _kind(path)
        facts = kinds.setdefault(kind, {"worst": 0.0, "where": "", "leaves": 0})
        a, b = np.asarray(want, np.float64), np.asarray(got, np.float64)
        whole = norms[kind] ** 0.5
        is_noise = any(re.search(pattern, path) for pattern in noise)
        scale = whole if is_noise else float(np.linalg.norm(a))
        difference = float(np.linalg.norm(a - b))
        relative = difference / scale if scale else difference
        facts["leaves"] += 1
        if not relative <= facts["worst"]:
            facts["worst"], facts["where"] = relative, path
            if not np.isfinite(relative):
                facts["worst"] = 1e30  # JSON has no infinity


def child(options: argparse.Namespace) -> int:
    """Runs one client and prints what it found as one line of JSON."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    found: dict[str, Any] = {}
    if "full" in options.stage:
        found["full"] = full(options.child)
    if "small" in options.stage:
        found["small"] = small(options.child, tuple(options.strategies))
    print(json.dumps(found, allow_nan=False))
    return 0


# --- in the parent --------------------------------------------------------------------


def start_child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one client in its own process."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", name]
    command += ["--stage", *options.stage, "--strategies", *options.strategies]
    path = [str(_record.ROOT), str(_record.HERE), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            timeout=CHILD_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": "Timeout", "message": f"more than {CHILD_LIMIT_S} s"}
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        return {"error": f"exit code {done.returncode}", "message": tail}
    return json.loads(done.stdout.strip().splitlines()[-1])


def passed(found: dict[str, Any], stages: list[str]) -> bool:
    """Whether everything that was asked of a client went well."""
    good = "error" not in found
    if good and "full" in stages:
        full = found["full"]
        good = "error" not in full and not any(
            "error" in f for f in full["strategies"].values()
        )
    if good and "small" in stages:
        good = all(f["passed"] for f in found["small"].values())
    return good


def rows(name: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table: one per client and stage or strategy."""
    if "error" in found:
        return [(name, "", "FAILED", found["error"], found["message"][-100:])]
    lines = []
    if "full" in found:
        whole = found["full"]
        if "error" in whole:
            lines.append((name, "full", "FAILED", whole["error"], whole["message"]))
        else:
            by_name = whole["strategies"]
            bad = [s for s, f in by_name.items() if "error" in f]
            slowest = max([f.get("propagate_cpu_s", 0) for f in by_name.values()])
            what = f"{whole['ops']} ops, propagation {slowest} s"
            where = "; ".join(
                f"{s}: {by_name[s]['error']}: {by_name[s]['message']}" for s in bad
            )
            lines.append((name, "full", "FAILED" if bad else "", what, where))
    for strategy, facts in found.get("small", {}).items():
        if "error" in facts:
            line = (facts["error"], f"{facts['message'][:160]} at {facts['at']}")
        else:
            kind = max(facts["worst"], key=facts["worst"].__getitem__)
            mesh = " ".join(f"{a}={n}" for a, n in facts["mesh"].items())
            line = (f"{mesh}, worst {facts['worst'][kind]:.1e}", facts["where"][kind])
        lines.append((name, strategy, "" if facts["passed"] else "FAILED", *line))
    return lines


def main() -> int:
    """Runs the clients; 1 when one of them fails, 2 when none is installed."""
    parser = _record.parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="CLIENT", help="just these")
    parser.add_argument(
        "--stage", nargs="+", choices=("full", "small"), default=["full", "small"]
    )
    parser.add_argument("--strategies", nargs="+", default=list(SMALL_STRATEGIES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    from clients import clients

    start = _record.begin()
    known = clients()
    unknown = set(options.only or ()) - set(known)
    if unknown:
        parser.error(f"unknown clients {sorted(unknown)}; known: {', '.join(known)}")
    cases, missing, lines = {}, {}, []
    for name in options.only or known:
        why = known[name].missing()
        if why:
            missing[name] = why
            print(f"{name}: LEFT OUT: {why}", file=sys.stderr, flush=True)
            continue
        begun_s = time.perf_counter()
        found = start_child(name, options)
        cases[name] = {
            "package": known[name].package,
            "published": known[name].published,
            "form": known[name].form,
            "passed": passed(found, options.stage),
            "duration_s": round(time.perf_counter() - begun_s, 1),
            **found,
        }
        for line in rows(name, found):
            print(*line, file=sys.stderr, flush=True)
            lines.append(line)
    if not cases:
        return 2
    _record.table(("client", "case", "", "result", "where"), lines)
    failed = [name for name, case in cases.items() if not case["passed"]]
    print(f"{len(cases)} clients, {len(failed)} failed, {len(missing)} left out")
    _record.write(
        options.into,
        "third_party",
        what=(__doc__ or "").strip(),
        command="python benchmarks/third_party.py",
        figures={
            "bar": BAR,
            "steps": STEPS,
            "clients": len(cases),
            "failed": failed,
            "left_out": missing,
            "by_client": cases,
        },
        passed=not failed and not missing,
        start=start,
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
