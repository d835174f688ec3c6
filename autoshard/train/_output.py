"""Where a training run writes what it reports: the metrics file and the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from autoshard.ir.errors import InputError, OutputError
from autoshard.plan.files import check_writable, write_atomically

Log = Callable[[str], None]


def log_to_stderr(message: str) -> None:
    """Writes one line to standard error."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


class MetricsFile:
    """One JSON object a line, one line a step; a resumed run continues the file.

    Args:
        path: The file.
        first_step: The step the run starts with; later lines are of steps that a
            crash undid, and are dropped.
        resume: Whether an existing file may be continued.

    Raises:
        OutputError: The file cannot be written, or exists and `resume` is false.
        InputError: The file to continue holds something else.
    """

    def __init__(self, path: Path, *, first_step: int, resume: bool) -> None:
        check_writable(path)
        self._path = path
        if path.exists() and path.stat().st_size:
            if not resume:
                raise OutputError(
                    f"metrics file {path} already exists. Resume the run that wrote "
                    "it, name another file, or delete it."
                )
            write_atomically(path, _lines_before(path, first_step))
        try:
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"metrics file {path} cannot be written: {error.strerror}."
            ) from None

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line; it is with the operating system when this returns."""
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"metrics file {self._path} cannot be written: {error.strerror}."
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines_before(path: Path, first_step: int) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"metrics file {path} cannot be continued: {error}. Name another file."
        ) from None
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith("\n"):
                break  # torn by the crash that made the resume necessary
            raise InputError(
                f"metrics file {path}, line {number} is not a line of metrics: "
                f"{line.strip()[:60]!r}. Name another file, or delete this one."
            ) from None
        if step < first_step:
            kept.append(line if line.endswith("\n") else line + "\n")
    return "".join(kept)


class Reporter:
    """Progress of a run: a live bar on a terminal, else a line every few steps.

    Only process 0 reports, so that a log is not repeated once per process.

    Args:
        total: Steps of the whole run.
        first: Steps already done.
        every: Without a terminal, steps per line.
        log: Takes the lines; standard error when None.
        quiet: Report nothing.
    """

    def __init__(
        self, *, total: int, first: int, every: int, log: Log | None, quiet: bool
    ) -> None:
        self._total = total
        self._every = every
        self._log = log or log_to_stderr
        self._quiet = quiet
        self._bar: Progress | None = None
        if log is None and not quiet and sys.stderr.isatty():
            bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = bar.add_task("", total=total, completed=first)
            bar.start()
            self._bar = bar

    def message(self, text: str) -> None:
        """Shows a line that is not about a single step."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._log(text)

    def step(self, record: dict[str, Any]) -> None:
        """Shows the metrics of one finished step."""
        done = record["step"] + 1
        text = f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s"
        if record["mfu"] is not None:
            text += f"  MFU {record['mfu']:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif not self._quiet and (done % self._every == 0 or done == self._total):
            self._log(f"step {done}/{self._total}  {text}")

    def close(self) -> None:
        """Ends the live bar."""
        if self._bar is not None:
            self._bar.stop()
