"""Training in a process of its own that is killed at a chosen step, and resumed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

STEPS, EVERY = 26, 5
# Before the first save there is nothing to resume from; near the last step the process
# might end before the kill comes.
FIRST_KILL, LAST_KILL = EVERY, STEPS - 6
TIMEOUT_S = 180


class Killed(NamedTuple):
    """What a run that was killed and resumed did.

    Attributes:
        asked: The step whose line in the metrics file triggered the kill.
        died_after: The last step that it wrote down before it died.
        resumed_at: Steps done in the checkpoint that it was resumed from.
        before: Its metrics when it died, as `read_metrics` gives them.
        after: Its metrics in the end.
    """

    asked: int
    died_after: int
    resumed_at: int
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


def command(directory: Path, *, resume: bool = False) -> list[str]:
    """The command line of a run that keeps all it writes in `directory`."""
    words = [sys.executable, "-m", "autoshard.cli", "run", "llama3-tiny"]
    words += ["--cluster", "cpu:8", "--batch", "8", "--seq", "32"]
    words += ["--steps", str(STEPS), "--checkpoint-every", str(EVERY)]
    words += ["--checkpoint", str(directory / "checkpoints")]
    words += ["--metrics", str(directory / "metrics.jsonl")]
    return [*words, "--resume"] if resume else words


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The complete lines of the metrics file; floats as the text that is written."""
    text = (directory / "metrics.jsonl").read_text()
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line, parse_float=str) for line in complete.splitlines()]


def numbers(metrics: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm of each line: what a kill must not change."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics]


def run_to_the_end(directory: Path, *, resume: bool = False) -> str:
    """Runs to the last step; what it said."""
    directory.mkdir(exist_ok=True)
    done = subprocess.run(
        command(directory, resume=resume),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_killed(directory: Path, *, asked: int) -> Killed:
    """Runs, kills with SIGKILL when step `asked` is written down, and resumes."""
    directory.mkdir(exist_ok=True)
    _run_until(directory, asked)
    before = read_metrics(directory)
    said = run_to_the_end(directory, resume=True)
    found = re.search(r"resumed .* at step (\d+)", said)
    assert found, f"the resumed run did not say where it went on:\n{said}"
    return Killed(
        asked=asked,
        died_after=before[-1]["step"],
        resumed_at=int(found.group(1)),
        before=before,
        after=read_metrics(directory),
    )


def _run_until(directory: Path, asked: int) -> None:
    metrics, said = directory / "metrics.jsonl", directory / "said.txt"
    checkpoints = directory / "checkpoints"
    with said.open("w") as log:
        process = subprocess.Popen(
            command(directory), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline_s = time.monotonic() + TIMEOUT_S
            # Line k + 1 is that of step k. Saves are written in the background, and
            # on a busy machine the first may be complete only some steps later.
            while not (
                metrics.exists()
                and metrics.read_bytes().count(b"\n") > asked
                and any(path.name.isdigit() for path in checkpoints.iterdir())
            ):
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline_s, f"no step {asked} in {TIMEOUT_S}s"
                time.sleep(0.001)
        finally:
            process.kill()
            process.wait()
    # Anything else would mean that it had ended by itself before the kill came.
    assert process.returncode == -signal.SIGKILL, said.read_text()


def check(killed: Killed, expected: list[dict[str, Any]]) -> None:
    """Asserts that the kill left no trace in the metrics.

    Raises:
        AssertionError: A step is missing, doubled or different.
    """
    assert [line["step"] for line in expected] == list(range(STEPS))
    assert numbers(killed.after) == numbers(expected)
    assert numbers(killed.before) == numbers(expected)[: len(killed.before)]
    assert killed.asked <= killed.died_after
    # It went on from a save, and had to do again what came after it.
    assert killed.resumed_at % EVERY == 0
    assert 0 < killed.resumed_at <= killed.died_after + 1
