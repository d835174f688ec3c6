"""Fields of a published row, read one by one; what cannot be used is said why."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any

from autoshard.cost.decoder import Decoder
from autoshard.cost.run import Layout, Run, Schedule
from autoshard.cost.software import Software
from autoshard.ir.errors import InputError
from autoshard.plan.chip import Figure, Link, load_type
from autoshard.plan.cluster import Cluster, cluster
from autoshard.validation.remat import recompute

PARAMS_TOLERANCE = 0.08
"""How far the parameters of the printed sizes may be from the printed parameters: names
round to a tenth, and positions and norms are not counted."""

LARGEST = 1e18
"""No number of a row is above it, and none is below its inverse."""


class LeftOutError(Exception):
    """A row is not used; the message says why."""


@cache
def known() -> dict[str, Any]:
    """What rows call things; see `known.toml`."""
    text = resources.files("autoshard.validation").joinpath("known.toml")
    return tomllib.loads(text.read_text(encoding="utf-8"))


def number(record: dict[str, str], name: str) -> float | None:
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


def count(record: dict[str, str], name: str, default: int) -> int:
    """A column's whole number, or a default where it is blank.

    Raises:
        LeftOutError: It is not a whole number.
    """
    value = number(record, name)
    if value is None:
        return default
    if value != int(value):
        raise LeftOutError(f"{name} is {value:g}, not whole")
    return int(value)


_NEEDED = (
    *("n_layers", "d_model", "n_heads", "d_ff", "seq_len", "global_batch_seqs"),
    *("n_chips", "micro_batch", "dp"),
)


def missing(record: dict[str, str]) -> list[str]:
    """Columns that a configuration needs and that are blank."""
    return [name for name in _NEEDED if not record.get(name, "").strip()]


def chip_of(record: dict[str, str]) -> str:
    """Chip type of a row, by its chip and the words on its network.

    Raises:
        LeftOutError: It is not in the catalogue.
    """
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


def vocab_of(record: dict[str, str]) -> tuple[int, str]:
    """The vocabulary, and where it is from if the row does not give it.

    Raises:
        LeftOutError: It is not given, and nothing is known of it.
    """
    given = count(record, "vocab", 0)
    if given:
        return given, ""
    framework = record["framework"].lower()
    for entry in known()["vocabularies"]:
        if entry["words"] in framework:
            return entry["vocab"], f"vocab {entry['vocab']}: {entry['source']}"
    raise LeftOutError("not given: vocab")


def decoder_of(record: dict[str, str], notes: str) -> Decoder:
    """The model; gates and tied embeddings are told by the printed parameters."""
    model = record.get("model", "").lower()
    layers = count(record, "n_layers", 0)
    embed, heads = count(record, "d_model", 0), count(record, "n_heads", 0)
    if not (layers and embed and heads):
        raise LeftOutError("n_layers, d_model and n_heads must be positive")
    mlp, vocab = count(record, "d_ff", 0), vocab_of(record)[0]
    extra: dict[str, int] = {}
    experts = count(record, "n_experts", 0)
    for entry in known()["experts"] if experts else ():
        if entry["words"] in model:
            fields = set(Decoder.__dataclass_fields__) & set(entry)
            extra = {name: entry[name] for name in fields}
            if "dense_share" in entry:
                extra["dense_layers"] = round(layers * entry["dense_share"])
                extra.setdefault("dense_mlp", mlp)
            break
    printed = number(record, "params_b")
    best: Decoder | None = None
    for gated in (True, False):
        for tied in (True, False):
            try:
                decoder = Decoder(
                    layers=layers,
                    embed=embed,
                    heads=heads,
                    kv_heads=count(record, "n_kv_heads", heads),
                    head_dim=count(record, "head_dim", embed // heads),
                    mlp=mlp,
                    vocab=vocab,
                    gated=gated,
                    tied=tied,
                    experts=experts,
                    top_k=count(record, "top_k", 0),
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


def layout_of(record: dict[str, str], notes: str, software: Software) -> Layout:
    """How a row's run is spread.

    Raises:
        LeftOutError: Numbers are missing or contradict each other, or words are not
            known.
    """
    chips = count(record, "n_chips", 0)
    tensor, stage = count(record, "tp", 1), count(record, "pp", 1)
    context = count(record, "cp", 1)
    if not chips or chips % (tensor * stage * context):
        raise LeftOutError(
            f"{chips} chips are no multiple of tp {tensor} x pp {stage} x cp {context}"
        )
    data = chips // (tensor * stage * context)
    batch = number(record, "global_batch_seqs") or 0.0
    microbatch = number(record, "micro_batch") or 0.0
    steps = number(record, "grad_accum")
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
        shards = count(record, "fsdp", 1)
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
            expert=count(record, "ep", 1),
            stage=stage,
            virtual=count(record, "vpp", 1),
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


def slices_of(record: dict[str, str], notes: str) -> int:
    """TPU slices that a row names, or 1."""
    found = re.search(r"(\d+) slice", notes + record.get("interconnect", ""))
    return max(1, int(found.group(1))) if found else 1


def dtype_of(record: dict[str, str]) -> str:
    """Dtype of the products, as peaks are named.

    Raises:
        LeftOutError: The words are not known, or mean four bits.
    """
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


def cluster_of(record: dict[str, str], name: str, chips: int, slices: int) -> Cluster:
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


def seconds_of(record: dict[str, str], run: Run | None) -> float | None:
    """Seconds per step: as printed, or from tokens/s, or from FLOP/s as counted."""
    try:
        step = number(record, "step_time_s")
        batch = number(record, "global_batch_seqs")
        seq, chips = number(record, "seq_len"), number(record, "n_chips")
        rate = number(record, "tokens_per_s_per_device")
        flops = number(record, "tflops_per_device")
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
