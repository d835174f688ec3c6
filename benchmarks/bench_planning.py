"""Time and memory of planning, as a user meets them: whole processes, start included.

Each run is `autoshard search` as a process of its own; wall time and peak resident
memory are those the operating system reports for it. Three runs of each case, taken in
turns; medians. Bars: at most 10 s and at most 1.5 GB each.
"""

from __future__ import annotations

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

BAR_WALL_S, BAR_RSS_BYTES = 10.0, 1.5e9
RUNS = 3
CASES = {
    "llama3-8b on h100:64": (
        "llama3-8b", "--cluster", "h100:64", "--batch", "128", "--seq", "8192",
    ),
    "llama3-405b on h100:16384": (
        "llama3-405b", "--cluster", "h100:16384", "--batch", "2048", "--seq", "8192",
    ),
}  # fmt: skip


def search(arguments: tuple[str, ...], scratch: Path) -> dict[str, Any]:
    """One process: its wall time, its peak memory, and the mesh it chose.

    Raises:
        RuntimeError: It failed; the message has the end of what it said.
    """
    plan = scratch / "found.plan.json"
    said = scratch / "said.txt"
    plan.unlink(missing_ok=True)
    command = [sys.executable, "-m", "autoshard.cli", "search", *arguments]
    with said.open("w") as log:
        start_s = time.perf_counter()
        child = subprocess.Popen(
            [*command, "-o", str(plan)], stdout=log, stderr=subprocess.STDOUT
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
        # Linux counts in KiB, macOS in bytes.
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "mesh": found.group(1).strip() if found else "not shown",
    }


def main() -> int:
    """Measures both cases; 1 when a bar is missed."""
    options, start = _record.arguments(__doc__ or ""), _record.begin()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(RUNS):
            for name, arguments in CASES.items():
                runs[name].append(search(arguments, Path(scratch)))
    cases = []
    for name, found in runs.items():
        wall_s = statistics.median(run["wall_s"] for run in found)
        rss_bytes = statistics.median(run["peak_rss_bytes"] for run in found)
        cases.append(
            {
                "case": name,
                "command": " ".join(("autoshard search", *CASES[name])),
                "mesh": found[0]["mesh"],
                "wall_s": wall_s,
                "wall_s_of_each": [run["wall_s"] for run in found],
                "peak_rss_bytes": rss_bytes,
                "peak_rss_bytes_of_each": [run["peak_rss_bytes"] for run in found],
                "passed": wall_s <= BAR_WALL_S and rss_bytes <= BAR_RSS_BYTES,
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
    passed = all(case["passed"] for case in cases)
    _record.write(
        options.into,
        "planning",
        what=(__doc__ or "").strip(),
        command="python benchmarks/bench_planning.py",
        figures={
            "bar_wall_s": BAR_WALL_S,
            "bar_peak_rss_bytes": BAR_RSS_BYTES,
            "runs_of_each": RUNS,
            "cases": cases,
        },
        passed=passed,
        start=start,
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
