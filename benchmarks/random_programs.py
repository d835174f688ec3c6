"""Random programs over rules of every family, sharded against unsharded.

Hypothesis draws programs of 5 to 40 ops with random meshes, strategies, annotations and
storage (`tests/fuzz`). Each is searched with its strategy, lowered and run on virtual
CPU devices, and compared with the plain function, to 1e-5 of the largest number of
every result. Propagation must give the same specs when they are fixed and again when
the ops are visited in another order, and what every argument, result and pinned value
holds on a device must be what XLA says. Bar: 20,000 programs, no failure.

A run that was stopped goes on where it was, as long as no source file has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _record

TESTS = _record.ROOT / "tests"
NAME = "random_programs"
PART = 200
"""Programs per process: a crash of XLA costs no more, and memory does not pile up."""


def arguments() -> argparse.Namespace:
    """The command line; `--part` and `--as-usual` are how a run calls itself."""
    parser = _record.parser(__doc__)
    parser.add_argument("--count", type=int, default=20_000, metavar="N")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument(
        "--state",
        type=Path,
        default=_record.ROOT / "build" / f"{NAME}.jsonl",
        metavar="FILE",
        help="what is done so far; removed to begin anew",
    )
    parser.add_argument(
        "--parts",
        type=numbers,
        metavar="A,B-C",
        help=f"these parts of {PART} programs alone, in a record of their own",
    )
    parser.add_argument("--part", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--as-usual", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """Reads `3,5-7` as 3, 5, 6, 7."""
    ends = [[int(end) for end in each.split("-")] for each in text.split(",")]
    return [n for each in ends for n in range(each[0], each[-1] + 1)]


# -- one part, in a process of its own ---------------------------------------------


def run_part(part: int, begin: int, end: int, *, as_usual: bool) -> dict[str, Any]:
    """Draws the programs of a part and checks those from `begin` to before `end`.

    XLA is told to compile fast, except where it shall do so `as_usual`.
    """
    sys.path.insert(0, str(TESTS))
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    from fuzz.check import FAST, check
    from fuzz.describe import nodes_of, to_json
    from fuzz.generate import drawn

    start_s = time.perf_counter()
    cases = drawn(part, PART)[begin:end]
    verdicts = check(cases, options={} if as_usual else FAST)
    nodes = {id(v): nodes_of(v.case.body) for v in verdicts}
    judged = [v for v in verdicts if not v.defect]
    return {
        "programs": len(judged),
        "left_out": Counter(v.defect for v in verdicts if v.defect),
        "failures": [
            {"what": v.failures, "program": to_json(v.case)} for v in judged if v.wrong
        ],
        "rounding": sum(v.noisy for v in judged),
        "worst": max(
            (v.worst for v in judged if not v.wrong and not v.noisy), default=0
        ),
        "families": Counter(n.family for v in judged for n in nodes[id(v)]),
        "programs_of_family": Counter(
            f for v in judged for f in {n.family for n in nodes[id(v)]}
        ),
        "ops": Counter(str(len(nodes[id(v)])) for v in judged),
        "meshes": Counter("x".join(map(str, v.case.mesh.values())) for v in judged),
        "train_steps": sum(v.case.train for v in judged),
        "with_collectives": sum(v.moves > 0 for v in judged),
        "with_rules_dropped": sum(bool(v.dropped) for v in judged),
        "pins_checked": sum(v.pins for v in judged),
        "duration_s": time.perf_counter() - start_s,
    }


# -- all of them -------------------------------------------------------------------


def in_process(part: int, begin: int, end: int) -> list[dict[str, Any]]:
    """Runs a part elsewhere; where XLA aborts, halves it until one program is left.

    That one is compiled once more as XLA does when it is not told to be fast.
    """
    done, said = _elsewhere(part, begin, end)
    if done is None and end - begin > 1:
        middle = (begin + end) // 2
        return in_process(part, begin, middle) + in_process(part, middle, end)
    if done is None:
        done, said = _elsewhere(part, begin, end, "--as-usual")
    if done is not None:
        return [done]
    reasons = [line for line in said if line.startswith("F")] or said[-1:]
    what = f"part {part} program {begin} ends the process: {' '.join(reasons)[:400]}"
    return [{"programs": 1, "failures": [{"what": [what], "program": ""}]}]


def _elsewhere(
    part: int, begin: int, end: int, *flags: str
) -> tuple[dict[str, Any] | None, list[str]]:
    """What a process of its own found, if it came to an end, and what it said."""
    command = [sys.executable, __file__, "--part", str(part), str(begin), str(end)]
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
        )
        said.seek(0)
        lines = said.read().splitlines()
    found = None if done.returncode else json.loads(done.stdout.splitlines()[-1])
    return found, lines


def sources() -> str:
    """A hash of all that decides a result."""
    digest = hashlib.sha256()
    for folder in (_record.ROOT / "autoshard", TESTS / "fuzz"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def added(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums what the parts found, key by key."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key == "worst":
                total[key] = max(total.get(key, 0.0), value)
            elif isinstance(value, dict):
                total[key] = dict(Counter(total.get(key, {})) + Counter(value))
            else:
                total[key] = total.get(key, type(value)()) + value
    return total


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the parts that are not done; what all of them found together."""
    version = sources()
    args.state.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    if args.state.exists():
        rows = [json.loads(line) for line in args.state.read_text().splitlines()]
    rows = [row for row in rows if row["sources"] == version]
    count = -(-args.count // PART)
    asked = args.parts or list(range(count))
    done = {row["part"] for row in rows}
    lock = threading.Lock()

    def one(part: int) -> None:
        found = added(in_process(part, 0, PART))
        with lock:
            rows.append({"part": part, "sources": version, "found": found})
            with args.state.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            total = added([row["found"] for row in rows])
            print(
                f"{total['programs']} programs, {len(total['failures'])} failures",
                flush=True,
            )

    with ThreadPoolExecutor(args.workers) as pool:
        # Programs that XLA cannot run do not count: some parts more make up for them.
        list(pool.map(one, [p for p in asked if p not in done]))
        extra = count
        while (
            not args.parts
            and added([row["found"] for row in rows])["programs"] < args.count
        ):
            if extra not in done:
                one(extra)
            extra += 1
    return added([row["found"] for row in rows])


def main() -> None:
    """Runs all parts, or the one that the command line names."""
    args = arguments()
    if args.part:
        print(json.dumps(run_part(*args.part, as_usual=args.as_usual)))
        return
    start = _record.begin()
    total = run_all(args)
    name = f"{NAME}_parts" if args.parts else NAME
    which = (
        ["--parts", ",".join(map(str, args.parts))]
        if args.parts
        else ["--count", args.count]
    )
    ops = {int(n): count for n, count in total.pop("ops", {}).items()}
    failures = total.pop("failures")
    figures = {
        **{key: total[key] for key in sorted(total)},
        "process_s": round(total.pop("duration_s", 0.0)),
        "failures": len(failures),
        "failed": failures[:20],
        "ops_least": min(ops, default=0),
        "ops_most": max(ops, default=0),
        "ops_mean": round(sum(n * c for n, c in ops.items()) / sum(ops.values()), 1),
    }
    figures.pop("duration_s")
    _record.write(
        args.into,
        name,
        what=" ".join(__doc__.split("\n\n")[1].split()),
        command=" ".join(map(str, [f"python benchmarks/{NAME}.py", *which])),
        figures=figures,
        passed=not failures and bool(args.parts or total["programs"] >= args.count),
        start=start,
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
