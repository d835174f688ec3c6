"""Published rows: each becomes a model, a cluster, a layout and what was measured.

A row that cannot be read, or does not say enough, is left out with a reason; nothing
that it does not say is made up, but for what `known.toml` gives a source for.
"""

from __future__ import annotations

import csv
import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from autoshard.cost.decoder import Decoder
from autoshard.cost.run import Layout, Run, Schedule
from autoshard.cost.software import Software, named
from autoshard.ir.errors import InputError
from autoshard.plan.chip import Figure, Link, load_type
from autoshard.plan.cluster import Cluster, cluster
from autoshard.validate.remat import recompute

GIB = 2**30
COLUMNS = ("framework", "chip", "n_layers", "step_time_s", "notes")
"""Columns by which a file of published runs is told from other tables."""

PARAMS_TOLERANCE = 0.08
"""How far the parameters of the printed sizes may be from the printed parameters: names
round to a tenth, and positions and norms are not counted."""

LARGEST = 1e18
"""No number of a row is above it, and none is below its inverse."""


class LeftOutError(Exception):
    """A row is not used; the message says why."""


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
                whole = not _missing(record) and _seconds(record, None) is not None
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
        for number, line in enumerate(lines[1:], start=2):
            if line:
                filled = line + [""] * (len(header) - len(line))
                yield number, dict(zip(header, filled, strict=False))

    return each()


@cache
def known() -> dict[str, Any]:
    """What rows call things; see `known.toml`."""
    text = resources.files("autoshard.validate").joinpath("known.toml")
    return tomllib.loads(text.read_text(encoding="utf-8"))


def _number(record: dict[str, str], name: str) -> float | None:
    """A column's number, or None where it is blank.

    Raises:
        LeftOutError: It is not a number, or not a positive one.
    """
    text = record.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise LeftOutError(f"{name} is {text[:30]!r}, not a number") from None
    if not math.isfinite(value) or value < 0:
        raise LeftOutError(f"{name} is {text[:30]!r}; it must be positive")
    if value and not 1 / LARGEST < value < LARGEST:
        raise LeftOutError(f"{name} is {text[:30]!r}, which no run has")
    return value or None


def _count(record: dict[str, str], name: str, default: int) -> int:
    value = _number(record, name)
    if value is None:
        return default
    if value != int(value):
        raise LeftOutError(f"{name} is {value:g}, not whole")
    return int(value)


_NEEDED = (
    *("n_layers", "d_model", "n_heads", "d_ff", "seq_len", "global_batch_seqs"),
    *("n_chips", "micro_batch", "dp"),
)


def _missing(record: dict[str, str]) -> list[str]:
    return [name for name in _NEEDED if not record.get(name, "").strip()]


def _row(source: str, line: int, record: dict[str, str]) -> Row:
    missing = _missing(record)
    if missing:
        raise LeftOutError(f"not given: {', '.join(missing)}")
    notes = record.get("notes", "")
    if re.search(r"plan not recorded|not recorded|auto_sharding|heuristic", notes):
        raise LeftOutError("the plan was found by a search and is not recorded")
    chip = _chip(record)
    year = re.search(r"20\d\d", record.get("source_date", ""))
    software = named(record["framework"], int(year.group()) if year else 2024)
    if software is None:
        raise LeftOutError(f"software {record['framework'][:40]!r} is not known")
    if software.fusion == "compiler" and re.search(r"\beager\b", notes):
        software = software.model_copy(update={"fusion": "eager"})
    for entry in known()["states"]:
        experts = bool(_count(record, "n_experts", 0))
        if software.name == entry["software"] and experts == entry["experts"]:
            update = {k: entry[k] for k in ("optimizer_bytes", "logits")}
            software = software.model_copy(update=update)
    offload = record.get("offload", "").lower()
    if re.search(r"optimizer|params|cpu|unclear", offload):
        raise LeftOutError("optimizer or parameters are kept in the host's memory")
    decoder = _decoder(record, notes)
    layout = _layout(record, notes, software)
    slices = _slices(record, notes)
    where = _cluster(record, chip, layout.chips, slices)
    dtype = _dtype(record)
    seq = _count(record, "seq_len", 0)
    if not seq:
        raise LeftOutError("seq_len must be positive")
    run = Run(decoder, where, layout, seq, software, dtype, slices)
    try:
        where.peak_flops_per_s(dtype)
    except InputError as e:
        raise LeftOutError(f"{where.type_name} has no peak for {dtype}") from e
    # "crash or OOM" says only that it failed.
    failed = bool(re.search(r"(?<!crash or )(?<!crashed or )\bOOM\b", notes))
    measured = None if failed else _seconds(record, run)
    memory = _number(record, "peak_mem_gib")
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


def _chip(record: dict[str, str]) -> str:
    text = record["chip"]
    table: dict[str, str] = known()["chips"]
    for start, name in table.items():
        if text.startswith(start):
            words = record.get("interconnect", "")
            for system in known()["systems"]:
                if system["chip"] == name and system["words"] in words:
                    return system["type"]
            return name
    raise LeftOutError(f"chip {text[:40]!r} is not in the catalogue")


def _decoder(record: dict[str, str], notes: str) -> Decoder:
    """The model; gates and tied embeddings are told by the printed parameters."""
    model = record.get("model", "").lower()
    layers = _count(record, "n_layers", 0)
    embed, heads = _count(record, "d_model", 0), _count(record, "n_heads", 0)
    if not (layers and embed and heads):
        raise LeftOutError("n_layers, d_model and n_heads must be positive")
    mlp, vocab = _count(record, "d_ff", 0), _count(record, "vocab", 0)
    framework = record["framework"].lower()
    for entry in known()["vocabularies"]:
        if not vocab and entry["words"] in framework:
            vocab = entry["vocab"]
    if not vocab:
        raise LeftOutError("not given: vocab")
    extra: dict[str, int] = {}
    experts = _count(record, "n_experts", 0)
    for entry in known()["experts"] if experts else ():
        if entry["words"] in model:
            fields = set(Decoder.__dataclass_fields__) & set(entry)
            extra = {name: entry[name] for name in fields}
            if "dense_share" in entry:
                extra["dense_layers"] = round(layers * entry["dense_share"])
                extra.setdefault("dense_mlp", mlp)
            break
    printed = _number(record, "params_b")
    best: Decoder | None = None
    for gated in (True, False):
        for tied in (True, False):
            try:
                decoder = Decoder(
                    layers=layers,
                    embed=embed,
                    heads=heads,
                    kv_heads=_count(record, "n_kv_heads", heads),
                    head_dim=_count(record, "head_dim", embed // heads),
                    mlp=mlp,
                    vocab=vocab,
                    gated=gated,
                    tied=tied,
                    experts=experts,
                    top_k=_count(record, "top_k", 0),
                    **extra,
                )
            except InputError as e:
                raise LeftOutError(str(e)) from e
            if printed is None or "proxy" in notes:
                return decoder
            if best is None or _off(decoder, printed) < _off(best, printed):
                best = decoder
    assert best is not None
    assert printed is not None
    if _off(best, printed) > PARAMS_TOLERANCE:
        raise LeftOutError(
            f"the sizes given make {best.params / 1e9:.3g} billion parameters, not "
            f"{printed:g}"
        )
    return best


def _off(decoder: Decoder, billions: float) -> float:
    return abs(decoder.params / 1e9 / billions - 1)


def _layout(record: dict[str, str], notes: str, software: Software) -> Layout:
    chips = _count(record, "n_chips", 0)
    tensor, stage = _count(record, "tp", 1), _count(record, "pp", 1)
    context = _count(record, "cp", 1)
    if not chips or chips % (tensor * stage * context):
        raise LeftOutError(
            f"{chips} chips are no multiple of tp {tensor} x pp {stage} x cp {context}"
        )
    data = chips // (tensor * stage * context)
    batch = _number(record, "global_batch_seqs") or 0.0
    microbatch = _number(record, "micro_batch") or 0.0
    steps = _number(record, "grad_accum")
    if not (batch and microbatch):
        raise LeftOutError("global_batch_seqs and micro_batch must be positive")
    if steps is None:
        steps = max(1.0, round(batch / (microbatch * data)))
    if abs(microbatch * steps * data / batch - 1) > 0.01:
        # Counted per core, or with accumulation printed otherwise: the batch decides.
        microbatch = batch / (data * steps)
    text = record.get("zero_stage", "").strip()
    if text and not re.match(r"[0-3]\b", text):
        raise LeftOutError(f"zero_stage {text[:30]!r} is not known")
    shard = data * context
    # Some tables write "full" where parameters are sharded over all replicas.
    words = record.get("fsdp", "").strip().lower()
    if words in ("full", "true", "false", "no"):
        shards = shard if words in ("full", "true") else 1
    else:
        shards = _count(record, "fsdp", 1)
    zero = int(text[0]) if text else 3 if shards > 1 else 0
    ways = re.search(r"over (\d+) ranks", text)
    if ways:
        shard = min(int(ways.group(1)), shard)
    elif zero == 3 and shards > 1:
        shard = min(shards, shard)
    shares = recompute(_recomputed(record), software)
    if shares is None:
        raise LeftOutError(f"recomputation {record['recompute'][:40]!r} is not known")
    framework = record["framework"].lower()
    if any(entry["words"] in framework for entry in known()["offloads"]):
        shares = replace(shares, offloaded=1.0)
    try:
        return Layout(
            data=data,
            shard=shard if zero else 1,
            zero=zero,
            tensor=tensor,
            sequence=record.get("sp", "").lower()[:4] in ("1", "true"),
            context=context,
            expert=_count(record, "ep", 1),
            stage=stage,
            virtual=_count(record, "vpp", 1),
            schedule=_schedule(record.get("schedule", "")),
            microbatch=microbatch,
            microbatches=steps,
            recompute=shares,
            capacity=_capacity(notes),
            frozen=record.get("task", "") == "lora",
        )
    except InputError as e:
        raise LeftOutError(str(e)) from e


def _recomputed(record: dict[str, str]) -> str:
    return record.get("recompute", "")


def _capacity(notes: str) -> float:
    found = re.search(r"capacity_factor (\d+(?:\.\d+)?)", notes)
    return float(found.group(1)) if found else 1.0


def _schedule(text: str) -> Schedule:
    words = text.lower()
    for start in ("zb-h1", "zb-1p", "zb-2p"):
        if words.startswith(start):
            return start
    if words.startswith("zb"):  # ZB-H2 needs as much memory, and leaves as little
        return "zb-2p"
    return "interleaved" if words.startswith(("interleaved", "1f1b-i")) else "1f1b"


def _slices(record: dict[str, str], notes: str) -> int:
    found = re.search(r"(\d+) slice", notes + record.get("interconnect", ""))
    return max(1, int(found.group(1))) if found else 1


def _dtype(record: dict[str, str]) -> str:
    text = record.get("precision", "").lower()
    if re.search(r"fp8|float8|mxfp8|int8", text):
        return "f8"
    if re.search(r"fp4|float4", text):
        raise LeftOutError("four bits")
    if text.startswith(("fp16", "f16")) or record["chip"].startswith("V100"):
        return "f16"
    if "bf16" in text or "bfloat16" in text or not text:
        return "bf16"
    if re.search(r"fp32|float32", text):
        return "f32"
    raise LeftOutError(f"precision {text[:40]!r} is not known")


def _cluster(record: dict[str, str], name: str, chips: int, slices: int) -> Cluster:
    """The cluster of a row, with the network that its interconnect column states."""
    chip = load_type(name)
    try:
        if chip.kind == "tpu":
            if chips % slices:
                raise LeftOutError(f"{chips} chips are not in {slices} equal slices")
            return cluster(f"{name}:{chips // slices}")
        per_node = int(chip.chips_per_node.value)
        inside = next(n for n in range(min(per_node, chips), 0, -1) if not chips % n)
        where = Cluster(chip=chip, shape=(chips // inside, inside))
    except InputError as e:
        raise LeftOutError(str(e)) from e
    rate = _network_bytes_per_s(record.get("interconnect", ""), per_node)
    if not rate or name in {s["type"] for s in known()["systems"]}:
        return where
    stated = Figure(value=rate, source="the row's interconnect column")
    links: tuple[Link, ...] = tuple(
        link.model_copy(update={"bytes_per_s": stated})
        if link.level == "network"
        else link
        for link in chip.links
    )
    own = chip.model_copy(update={"links": links})
    return where.model_copy(update={"chip": own})


def _network_bytes_per_s(text: str, per_node: int) -> float | None:
    """Bytes/s of one chip's card, where words on the network state it."""
    each = re.search(r"(\d+)\s?Gb/s (?:RDMA )?per GPU|RDMA (\d+) Gb/s per GPU", text)
    if each:
        return float(each.group(1) or each.group(2)) * 1e9 / 8
    cards = re.search(r"(\d+)\s?x\s?~?(?:HDR )?(\d+)\s?Gb", text)
    if cards:
        return int(cards.group(1)) * int(cards.group(2)) * 1e9 / 8 / per_node
    node = re.search(r"(\d+) Gbps(?:/node| inter-node)", text)
    if node:
        return int(node.group(1)) * 1e9 / 8 / per_node
    return None


def _seconds(record: dict[str, str], run: Run | None) -> float | None:
    """Seconds per step: as printed, or from tokens/s, or from FLOP/s as counted."""
    try:
        step = _number(record, "step_time_s")
        batch = _number(record, "global_batch_seqs")
        seq, chips = _number(record, "seq_len"), _number(record, "n_chips")
        rate = _number(record, "tokens_per_s_per_device")
        flops = _number(record, "tflops_per_device")
    except LeftOutError:
        if run is None:
            return None
        raise
    if step or not (batch and seq and chips):
        return step
    tokens = batch * seq
    if rate:
        return tokens / (rate * chips)
    if not flops:
        return None
    if run is None:
        return 1.0  # a figure is given
    decoder, how = run.decoder, record.get("flops_convention", "")
    if re.search(r"96B|hardware|INCLUDES", how):
        # Narayanan et al. 2021, arXiv:2104.04473, equation 3: recomputation counted.
        h, layers, vocab = decoder.embed, decoder.layers, decoder.vocab
        terms = 1 + seq / (6 * h) + vocab / (16 * layers * h)
        counted = 96 * layers * h * h * terms
    else:
        used = decoder.layers * decoder.active_layer_params
        counted = 6 * (used + decoder.vocab * decoder.embed)
        counted += 12 * decoder.layers * decoder.heads * decoder.head_dim * seq
    return counted * tokens / (flops * 1e12 * chips)
