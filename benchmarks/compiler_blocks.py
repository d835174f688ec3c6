"""Planned compute time of blocks against the TPU compiler's own estimate, with no TPU.

Two layers of real width are planned under a strategy and compiled ahead of time for
each generation. The cycles that the compiler notes on what it runs, at the chip's
clock, are told apart by where they come from: the loop over blocks forward and
backward, the optimizer's update, and the rest, which is embedding, head and loss. An op
without a name counts to what it reads. The planned kernels are told apart alike, and
priced at the rates that the compiler takes for granted (`cost/compiler.toml`); beside
them stand the times at the rates of real runs. Bar: each part within 10 %.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _record
import numpy as np

CLUSTERS = ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4")
MODELS = {"llama3-8b": (8, 2048), "gpt2-1.5b": (16, 1024)}
LAYERS = 2
PARTS = ("block", "ends", "update")
BAR = 0.10
_NAME = re.compile(r'op_name="([^"]*)"')
_PASSIVE = ("bitcast", "constant", "get-tuple-element", "parameter", "tuple")


def options() -> argparse.Namespace:
    """The command line."""
    parser = _record.parser(__doc__, "cases whose name contains it")
    add = parser.add_argument
    add("--strategy", default="fsdp", help="under which the layers are planned")
    add(
        "--texts",
        type=Path,
        metavar="DIR",
        help="keep compiled programs, and read them",
    )
    return parser.parse_args()


def case(spec: str, model: str, strategy: str, texts: Path | None) -> dict[str, Any]:
    """Seconds per part: planned at the compiler's rates and at real ones; compiled."""
    from autoshard import api
    from autoshard.plan.schema import ModelRef
    from autoshard.verify.module import Module
    from autoshard.verify.targets import target_of

    batch, seq = MODELS[model]
    ref = ModelRef(
        model=model,
        batch=batch,
        seq=seq,
        optimizer="adamw",
        learning_rate=1e-3,
        dtype="bf16",
    )
    resolved = api.resolve(ref, layers=LAYERS)
    policy = api.load_strategy(strategy)
    fixed = {"microbatches": 1, "remat": "none"}
    schedule = policy.schedule.model_copy(update=fixed)
    policy = policy.model_copy(update={"schedule": schedule})
    plan = api.search(resolved.step, resolved.batch, cluster=spec, strategy=policy)
    target = target_of(plan)
    clock_hz = target.clock_hz
    assert clock_hz is not None, spec
    name = f"{model}_{spec.replace(':', '_')}_{strategy}_{LAYERS}.hlo"
    text = compiled_text(resolved.step, plan, target, texts / name if texts else None)
    found: Counter[str] = Counter()
    for part, cycles in compiled_parts(Module(text)):
        found[part] += cycles
    planned, real = planned_parts(resolved, plan)
    return {
        "cluster": spec,
        "model": model,
        "strategy": strategy,
        "mesh": {axis.axis: axis.size for axis in plan.axes},
        "layers": LAYERS,
        "batch": batch,
        "seq": seq,
        "planned_s": planned,
        "planned_at_real_rates_s": real,
        "compiler_s": {part: found[part] / clock_hz for part in planned},
    }


def compiled_text(step: Any, plan: Any, target: Any, kept: Path | None) -> str:
    """The scheduled program, compiled or as it was kept."""
    from autoshard.lower import parallelize

    if kept is not None and kept.exists():
        return kept.read_text()
    run: Any = parallelize(step, plan, devices=target.devices())
    lowered = run.jitted.lower(run.abstract_state, run.abstract_batch)
    text = str(lowered.compile().as_text())
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(text)
    return text


def compiled_parts(module: Any) -> Iterator[tuple[str, int]]:
    """`(part, cycles)` of all that the compiler gives cycles for, but collectives."""
    from autoshard.ir.train_step import UPDATE_SCOPE
    from autoshard.verify.clocks import cycles_of

    rows = list(_walk(module, module.entry, 1, None))
    loops: list[str] = []
    for instruction, _, loop in rows:
        if loop is not None and "/while/body/" in _name(instruction):
            loops += [loop] if loop not in loops else []
    part_of: dict[str, str] = {}
    for instruction, runs, loop in rows:
        name = _name(instruction)
        before = [part_of[o] for o in _operands(instruction) if o in part_of]
        if loop in loops:
            part = "block"
        elif UPDATE_SCOPE in name or name.startswith("args["):
            part = "update"  # arguments are copied for it
        elif name:
            part = "ends"
        else:
            part = before[0] if before else "ends"
        if before or instruction.opcode not in _PASSIVE:
            part_of[instruction.name] = part
        cycles = cycles_of(instruction)
        if cycles:
            yield part, cycles * runs


def _walk(
    module: Any, name: str, runs: int, loop: str | None
) -> Iterator[tuple[Any, int, str | None]]:
    computation = module.computations[name]
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            turns = module.trips(instruction, computation) or 1
            body = instruction.attribute("body").lstrip("%")
            yield from _walk(module, body, runs * turns, loop or instruction.name)
        elif instruction.opcode in ("call", "conditional"):
            for called in instruction.called:
                yield from _walk(module, called, runs, loop)
        elif not instruction.opcode.endswith("-done"):
            yield instruction, runs, loop


def _name(instruction: Any) -> str:
    found = _NAME.search(instruction.attributes)
    return found[1] if found else ""


def _operands(instruction: Any) -> list[str]:
    return [operand.lstrip("%") for operand in instruction.operands]


def planned_parts(
    resolved: Any, plan: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per part at the compiler's rates, and at those of real runs."""
    from autoshard import api
    from autoshard.cost.collectives import Meshes
    from autoshard.cost.constants import Constants
    from autoshard.cost.rates import Rates
    from autoshard.ir.mesh import AXES
    from autoshard.search.candidates import Space

    chips = api.cluster(plan.cluster.name)
    space = Space(resolved.step, (resolved.batch,), lambda _: None, plan.strategy)
    (group,) = space.price(plan.strategy, chips)
    sizes = {axis.axis: axis.size for axis in plan.axes}
    meshes = Meshes(chips, np.array([[sizes.get(axis, 1) for axis in AXES]]))
    pricer = group.pricer
    tables = []
    for rates in (Rates.compiler(chips), Rates.of(chips, Constants.shipped())):
        found = dict.fromkeys(PARTS, 0.0)
        for time in pricer.compute.times(meshes, np.ones(1), rates):
            index = time.kernel.op
            inside = pricer.program.ops[index].region > 0
            part = "block" if inside else "ends"
            part = "update" if pricer.work.update[index] else part
            found[part] += float(time.total_s[0])
        tables.append(found)
    return tables[0], tables[1]


def errors(found: dict[str, Any]) -> dict[str, float]:
    """By which part of the compiler's time the planned is more, per part and whole."""
    planned, compiled = found["planned_s"], found["compiler_s"]
    by_part = {part: planned[part] / compiled[part] - 1 for part in PARTS}
    return {**by_part, "all": sum(planned.values()) / sum(compiled.values()) - 1}


def main() -> int:
    """Plans and compiles every case; 1 when the bar is missed."""
    arguments, start = options(), _record.begin()
    import jax

    jax.config.update("jax_platforms", "cpu")
    found, rows = [], []
    for model in MODELS:
        for spec in CLUSTERS:
            if arguments.only not in f"{spec} {model}":
                continue
            one = case(spec, model, arguments.strategy, arguments.texts)
            one["error"] = errors(one)
            found.append(one)
            for part in PARTS:
                times = [one[key][part] for key in ("planned_s", "compiler_s")]
                times.insert(1, one["planned_at_real_rates_s"][part])
                shown = [f"{1e3 * time:.2f}" for time in times]
                rows.append(
                    (spec, model, part, *shown, f"{100 * one['error'][part]:+.0f}")
                )
            print(rows[-3:], file=sys.stderr, flush=True)
    headers = ("cluster", "model", "part", "planned ms", "at real rates", "compiler ms")
    _record.table((*headers, "% off"), rows)
    worst = max(abs(error) for one in found for error in one["error"].values())
    words = ["python benchmarks/compiler_blocks.py"]
    words += [f"--only '{arguments.only}'"] if arguments.only else []
    words += (
        [f"--strategy {arguments.strategy}"] if arguments.strategy != "fsdp" else []
    )
    # A text is that of the same plan; what was read was compiled before this commit.
    words += ["--texts DIR"] if arguments.texts else []
    _record.write(
        arguments.into,
        "compiler_blocks",
        what=(__doc__ or "").strip(),
        command=" ".join(words),
        figures={"bar": BAR, "worst_error": worst, "by_case": found},
        passed=worst <= BAR,
        start=start,
    )
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
