"""Training that is killed at random steps and resumed, against training that is not.

Each trial runs `autoshard run` on 8 virtual CPU devices as a process of its own, kills
it with SIGKILL when a random step is written to its metrics file, resumes it from its
last checkpoint, and compares the metrics with those of one uninterrupted run. Bar: loss
and gradient norm of every step are the same to the last digit in every trial.
"""

from __future__ import annotations

import random
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

import _record

sys.path.insert(0, str(_record.ROOT / "tests"))
from helpers import killed

TRIALS = 5


def trial(seed: int, scratch: Path, expected: list[dict[str, Any]]) -> dict[str, Any]:
    """One kill and one resume; which steps came out differently."""
    asked = random.Random(seed).randint(killed.FIRST_KILL, killed.LAST_KILL)
    found = killed.run_killed(scratch, asked=asked)
    try:
        killed.check(found, expected)
        problem = None
    except AssertionError as error:
        problem = str(error)[:2000] or "a check failed"
    return {
        "seed": seed,
        "asked_step": asked,
        "died_after_step": found.died_after,
        "resumed_at_step": found.resumed_at,
        "steps_equal": sum(
            mine == theirs
            for mine, theirs in zip(
                killed.numbers(found.after), killed.numbers(expected), strict=False
            )
        ),
        "problem": problem,
    }


def main() -> int:
    """Runs all trials; 1 when one left a trace."""
    options, start = _record.arguments(__doc__ or ""), _record.begin()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        killed.run_to_the_end(scratch / "whole")
        expected = killed.read_metrics(scratch / "whole")
        trials = []
        for number in range(TRIALS):
            seed = secrets.randbelow(2**32)
            trials.append(trial(seed, scratch / f"trial{number}", expected))
            print(f"{number + 1}/{TRIALS}", trials[-1], file=sys.stderr, flush=True)
    _record.table(
        ("seed", "killed at", "died after", "resumed at", "equal steps", ""),
        [
            (
                f"{found['seed']}",
                f"{found['asked_step']}",
                f"{found['died_after_step']}",
                f"{found['resumed_at_step']}",
                f"{found['steps_equal']}/{killed.STEPS}",
                "FAILED" if found["problem"] else "",
            )
            for found in trials
        ],
    )
    passed = not any(found["problem"] for found in trials)
    _record.write(
        options.into,
        "resume",
        what=(__doc__ or "").strip(),
        command="python benchmarks/matrix_resume.py",
        figures={
            "run": "llama3-tiny, batch 8, seq 32, bf16, on cpu:8",
            "steps": killed.STEPS,
            "checkpoint_every_steps": killed.EVERY,
            "trials": trials,
        },
        passed=passed,
        start=start,
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
