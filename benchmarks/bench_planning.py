"""Time and memory of planning, as a user meets them: whole processes, start included.

Each run is `autoshard search` as a process of its own; wall time and peak resident
memory are those the operating system reports for it. Medians of as many runs of each
case as `--runs` says, taken in turns. A case has a bar of its own; none may use more
than 2 GB. Growth is the power of chips, or of layers, with which time rises.

Machines that are shared are not always equally fast: before each run a plain loop is
timed, too, and its seconds are kept beside those of the run.
"""

from __future__ import annotations

import argparse
import compileall
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _record

BAR_RSS_BYTES = 2e9
LAYERS = (250, 1000)
DEEP = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
"""A decoder as wide as llama3-8b, which is planned with as many layers as one likes."""


def _case(bar_wall_s: float, *words: str) -> dict[str, Any]:
    return {"bar_wall_s": bar_wall_s, "arguments": words}


def _decoder(model: str, cluster: str, batch: int) -> tuple[str, ...]:
    return (model, "--cluster", cluster, "--batch", str(batch), "--seq", "8192")


CASES = {
    "llama3-8b on h100:64": _case(10, *_decoder("llama3-8b", "h100:64", 128)),
    "llama3-405b on h100:16384": _case(
        20, *_decoder("llama3-405b", "h100:16384", 2048)
    ),
    "llama3-405b on h100:98304": _case(
        30, *_decoder("llama3-405b", "h100:98304", 12288)
    ),
    "llama3-405b on v5p:8960": _case(30, *_decoder("llama3-405b", "v5p:8960", 2240)),
    **{
        f"{layers} unrolled layers on h100:512": _case(
            60, *_decoder(f"{layers}.json", "h100:512", 512), "--unrolled"
        )
        for layers in LAYERS
    },
}


def options() -> argparse.Namespace:
    """The command line."""
    parser = _record.parser(__doc__, "cases that have it")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    return parser.parse_args()


def search(arguments: tuple[str, ...], scratch: Path) -> dict[str, Any]:
    """One process: its wall time, its peak memory, and the mesh it chose.

    Raises:
        RuntimeError: It failed; the message has the end of what it said.
    """
    plan = scratch / "found.plan.json"
    said = scratch / "said.txt"
    plan.unlink(missing_ok=True)
    beside_s = _record.loop_s()
    command = [sys.executable, "-m", "autoshard.cli", "search", *arguments]
    with said.open("w") as log:
        start_s = time.perf_counter()
        child = subprocess.Popen(
            [*command, "-o", str(plan)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=scratch,
        )
        # Not subprocess.wait: only this gives what this one child used.
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - start_s
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0 or not plan.exists():
        raise RuntimeError(
            f"autoshard search {' '.join(arguments)} ended with "
            f"{child.returncode}:\n{said.read_text()[-2000:]}"
        )
    found = re.search(r"^mesh +(.+)$", said.read_text(), re.MULTILINE)
    return {
        "wall_s": wall_s,
        "loop_s": beside_s,
        # Linux counts in KiB, macOS in bytes.
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "mesh": found.group(1).strip() if found else "not shown",
    }


def growth(cases: list[dict[str, Any]]) -> dict[str, float]:
    """The power with which wall time rises, between two cases each."""
    wall_s = {case["case"]: case["wall_s"] for case in cases}
    found = {}
    for name, form, sizes in (
        ("with_layers", "{} unrolled layers on h100:512", LAYERS),
        ("with_chips", "llama3-405b on h100:{}", (16384, 98304)),
    ):
        few, many = (wall_s.get(form.format(size)) for size in sizes)
        if few and many:
            found[name] = math.log(many / few) / math.log(sizes[1] / sizes[0])
    return found


def main() -> int:
    """Measures all cases; 1 when a bar is missed."""
    given, start = options(), _record.begin()
    # As an installer leaves it; without, each process would compile it anew where
    # Python is told to write no bytecode.
    compileall.compile_dir(_record.ROOT / "autoshard", quiet=1)
    chosen = {name: case for name, case in CASES.items() if given.only in name}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as scratch:
        for layers in LAYERS:
            config = {**DEEP, "num_hidden_layers": layers}
            (Path(scratch) / f"{layers}.json").write_text(json.dumps(config))
        for _ in range(given.runs):
            for name, case in chosen.items():
                runs[name].append(search(case["arguments"], Path(scratch)))
    cases = []
    for name, found in runs.items():
        wall_s = statistics.median(run["wall_s"] for run in found)
        rss_bytes = statistics.median(run["peak_rss_bytes"] for run in found)
        bar_wall_s = CASES[name]["bar_wall_s"]
        cases.append(
            {
                "case": name,
                "command": " ".join(("autoshard search", *CASES[name]["arguments"])),
                "mesh": found[0]["mesh"],
                "bar_wall_s": bar_wall_s,
                "wall_s": wall_s,
                "wall_s_of_each": [run["wall_s"] for run in found],
                "loop_s_of_each": [run["loop_s"] for run in found],
                "peak_rss_bytes": rss_bytes,
                "peak_rss_bytes_of_each": [run["peak_rss_bytes"] for run in found],
                "passed": wall_s <= bar_wall_s and rss_bytes <= BAR_RSS_BYTES,
            }
        )
    _record.table(
        ("case", "wall s", "of each", "peak GB", "mesh"),
        [
            (
                case["case"],
                f"{case['wall_s']:.2f}",
                " ".join(f"{s:.2f}" for s in case["wall_s_of_each"]),
                f"{case['peak_rss_bytes'] / 1e9:.2f}",
                case["mesh"],
            )
            for case in cases
        ],
    )
    print(
        *(f"growth {key}: {value:.2f}" for key, value in growth(cases).items()),
        sep="\n",
    )
    passed = all(case["passed"] for case in cases)
    _record.write(
        given.into,
        "planning",
        what=(__doc__ or "").strip(),
        command="python benchmarks/bench_planning.py"
        + (f" --only {given.only!r}" if given.only else ""),
        figures={
            "bar_peak_rss_bytes": BAR_RSS_BYTES,
            "runs_of_each": given.runs,
            "iterations_of_loop": _record.LOOPS,
            "growth": growth(cases),
            "cases": cases,
        },
        passed=passed,
        start=start,
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
