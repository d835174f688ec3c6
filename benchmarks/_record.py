"""What a benchmark found, with all that is needed to judge and to repeat it.

JAX is not imported here: the peak memory of a child process counts that of the process
which started it, so a benchmark that measures children must itself stay small.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"


class Start(NamedTuple):
    """What must be read before a measurement, as it may change while that runs.

    Attributes:
        commit: See `commit`.
        date: When, in UTC.
        load: Runnable processes on average over the minute before; times taken on a
            busy machine say little.
    """

    commit: str
    date: str
    load: float


def begin() -> Start:
    """Notes the state of the checkout and of the machine."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Start(commit(), now, round(os.getloadavg()[0], 2))


LOOPS = 10_000_000


def loop_s() -> float:
    """Seconds of a plain loop: how fast the machine is just now."""
    start_s, total = time.perf_counter(), 0
    for number in range(LOOPS):
        total += number
    return time.perf_counter() - start_s


def parser(about: str, only: str = "") -> argparse.ArgumentParser:
    """The command line that benchmarks share, for more to be added.

    Args:
        about: The module docstring of the benchmark, shown by `--help`.
        only: What `--only TEXT` leaves, in words; there is no such option without.

    Returns:
        A parser of `into`, the folder that gets the record, and of `only`.
    """
    found = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--into",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="where to write the record (default: benchmarks/results)",
    )
    if only:
        found.add_argument("--only", default="", metavar="TEXT", help=only)
    return found


def arguments(about: str) -> argparse.Namespace:
    """The command line of a benchmark that has nothing more on it.

    Args:
        about: As in `parser`.
    """
    return parser(about).parse_args()


def write(
    into: Path,
    name: str,
    *,
    what: str,
    command: str,
    figures: dict[str, Any],
    passed: bool,
    start: Start,
) -> None:
    """Writes `<into>/<name>.json` and says where.

    Args:
        into: Folder; made if it is not there.
        name: Name of the record, without `.json`.
        what: What was measured, how, and against which bar, in a few sentences.
        command: What to type at the top of a checkout to do it again.
        figures: The numbers, units in their names.
        passed: Whether every bar was met.
        start: From `begin`, called before the measurement.
    """
    record: dict[str, Any] = {
        "name": name,
        "what": what,
        "command": command,
        "date": start.date,
        "commit": start.commit,
        "versions": versions(),
        "hardware": hardware(),
        "load_before": start.load,
        "passed": passed,
        "figures": figures,
    }
    into.mkdir(parents=True, exist_ok=True)
    path = into / f"{name}.json"
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    shown = path.resolve()
    print(f"wrote {shown.relative_to(ROOT) if ROOT in shown.parents else shown}")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    from autoshard.ir.version import VERSION

    found = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {"python": platform.python_version(), **found, "autoshard": VERSION}


def hardware() -> dict[str, str | int]:
    """The host: processor, the cores this process may use, and memory."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _processor(),
        "cores": cores or 0,
        "memory_bytes": memory_bytes,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # only Linux has the file
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout, `-dirty` when files differ from it.

    The records themselves do not count: a second benchmark would otherwise be marked
    dirty by the record of the first.
    """
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return head + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows under headers: text to the left, everything else to the right."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(headers))]
    for number, row in enumerate(cells):
        aligned = []
        for k, (cell, width) in enumerate(zip(row, widths, strict=True)):
            is_text = all(isinstance(r[k], str) and not _numeric(r[k]) for r in rows)
            aligned.append(cell.ljust(width) if is_text else cell.rjust(width))
        print("  ".join(aligned).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def _numeric(text: str) -> bool:
    return text[:1].isdigit()
