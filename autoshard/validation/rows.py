"""Published rows: each becomes a model, a cluster, a layout and what was measured.

A row that cannot be read, or does not say enough, is left out with a reason; nothing
that it does not say is made up, but for what `known.toml` gives a source for.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoshard.cost.run import Layout, Run
from autoshard.cost.software import named
from autoshard.ir.errors import InputError
from autoshard.validation.fields import (
    LeftOutError,
    chip_of,
    cluster_of,
    count,
    decoder_of,
    dtype_of,
    known,
    layout_of,
    missing,
    number,
    seconds_of,
    slices_of,
    vocab_of,
)

GIB = 2**30
COLUMNS = ("framework", "chip", "n_layers", "step_time_s", "notes")
"""Columns by which a file of published runs is told from other tables."""


@dataclass(frozen=True, slots=True)
class Row:
    """A published run that can be predicted.

    Attributes:
        source: Name of the file, without its ending.
        line: In it, counted from 1 with the header.
        model: As the row calls it.
        chip: Type in the catalogue.
        run: What was run.
        measured_s: Seconds per step; None where it ran out of memory or is not given.
        memory_bytes: Peak bytes on a device, or None.
        out_of_memory: Whether it ran out of memory.
        clean: Whether it is of the sort that the model is fitted to: 16 bits, a quiet
            machine, not marked as suspect.
        doubt: Why it is not clean.
        assumed: What the row does not say and was taken from elsewhere, and where.
    """

    source: str
    line: int
    model: str
    chip: str
    run: Run
    measured_s: float | None
    memory_bytes: float | None
    out_of_memory: bool
    clean: bool
    doubt: str
    assumed: str = ""

    @property
    def group(self) -> tuple[Any, ...]:
        """Rows of one group are plans for one model and batch on one cluster."""
        run = self.run
        tokens = round(run.tokens)
        return (self.source, self.model, self.chip, run.layout.chips, run.seq, tokens)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not used.

    Attributes:
        source: Name of the file.
        line: In it.
        reason: Why.
        whole: Whether its configuration is given in full, and measured.
    """

    source: str
    line: int
    reason: str
    whole: bool


def read(directory: Path | str) -> tuple[list[Row], list[LeftOut]]:
    """Reads every table of published runs of a directory.

    Args:
        directory: With CSV files of the columns of `benchmarks/published`; files with
            other columns are passed over.

    Returns:
        Rows that can be predicted, and those left out, each with its reason.

    Raises:
        InputError: There is no such directory, or no table of runs in it.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a directory; name one with CSV files of runs"
        )
    rows: list[Row] = []
    out: list[LeftOut] = []
    tables = 0
    for path in sorted(folder.glob("*.csv")):
        records = _records(path)
        if records is None:
            continue
        tables += 1
        for line, record in records:
            try:
                rows.append(_row(path.stem, line, record))
            except LeftOutError as e:
                whole = not missing(record) and seconds_of(record, None) is not None
                out.append(LeftOut(path.stem, line, str(e), whole))
    if not tables:
        raise InputError(
            f"{folder} holds no table of published runs: a CSV file with the columns "
            f"{', '.join(COLUMNS)} and those of benchmarks/published/README.md"
        )
    return rows, out


def _records(path: Path) -> Iterator[tuple[int, dict[str, str]]] | None:
    """Lines of a table by column, or None where it is another sort of table."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            lines = list(csv.reader(file))
    except (OSError, csv.Error) as e:
        raise InputError(f"the table {path} cannot be read: {e}") from e
    if not lines or not set(COLUMNS) <= set(lines[0]):
        return None
    header = lines[0]

    def each() -> Iterator[tuple[int, dict[str, str]]]:
        for at, line in enumerate(lines[1:], start=2):
            if line:
                filled = line + [""] * (len(header) - len(line))
                yield at, dict(zip(header, filled, strict=False))

    return each()


def _row(source: str, line: int, record: dict[str, str]) -> Row:
    blank = missing(record)
    if blank:
        raise LeftOutError(f"not given: {', '.join(blank)}")
    notes = record.get("notes", "")
    if re.search(r"plan not recorded|not recorded|auto_sharding|heuristic", notes):
        raise LeftOutError("the plan was found by a search and is not recorded")
    chip = chip_of(record)
    year = re.search(r"20\d\d", record.get("source_date", ""))
    software = named(record["framework"], int(year.group()) if year else 2024)
    if software is None:
        raise LeftOutError(f"software {record['framework'][:40]!r} is not known")
    if software.fusion == "compiler" and re.search(r"\beager\b", notes):
        software = software.model_copy(update={"fusion": "eager"})
    for entry in known()["states"]:
        experts = bool(count(record, "n_experts", 0))
        if software.name == entry["software"] and experts == entry["experts"]:
            update = {k: entry[k] for k in ("optimizer_bytes", "logits")}
            software = software.model_copy(update=update)
    offload = record.get("offload", "").lower()
    if re.search(r"optimizer|params|cpu|unclear", offload):
        raise LeftOutError("optimizer or parameters are kept in the host's memory")
    decoder = decoder_of(record, notes)
    layout = layout_of(record, notes, software)
    slices = slices_of(record, notes)
    where = cluster_of(record, chip, layout.chips, slices)
    dtype = dtype_of(record)
    seq = count(record, "seq_len", 0)
    if not seq:
        raise LeftOutError("seq_len must be positive")
    run = Run(decoder, where, layout, seq, software, dtype, slices)
    try:
        where.peak_flops_per_s(dtype)
    except InputError as e:
        raise LeftOutError(f"{where.type_name} has no peak for {dtype}") from e
    # "crash or OOM" says only that it failed.
    failed = bool(re.search(r"(?<!crash or )(?<!crashed or )\bOOM\b", notes))
    measured = None if failed else seconds_of(record, run)
    memory = number(record, "peak_mem_gib")
    if measured is None and memory is None and not failed:
        if re.search(r"\bOOM\b", notes):
            raise LeftOutError("failed, and whether for want of memory is not said")
        raise LeftOutError("neither time nor memory is given")
    doubt = _doubt(record, notes, dtype, layout, failed)
    return Row(
        source=source,
        line=line,
        model=record.get("model", ""),
        chip=where.type_name,
        run=run,
        measured_s=measured,
        memory_bytes=None if memory is None or failed else memory * GIB,
        out_of_memory=failed,
        clean=not doubt,
        doubt=doubt,
        assumed=vocab_of(record)[1],
    )


def _doubt(
    record: dict[str, str], notes: str, dtype: str, layout: Layout, failed: bool
) -> str:
    """Why a row says little of the model, or nothing."""
    quality = re.search(r"quality=(\w+)", notes)
    if failed:
        return "ran out of memory"
    if quality and quality.group(1) != "ok":
        return f"marked {quality.group(1)}"
    if quality and layout.tensor > 1 and layout.stage > 1:
        return "tensor parallelism in a pipeline, bound by launches"
    if "noise" in notes or re.search(r"\+-\s?40%", notes):
        return "its source warns of noise"
    if dtype not in ("bf16", "f16"):
        return "eight bits"
    return ""
