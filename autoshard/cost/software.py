"""What training software does with a plan: kernels, overlap, launches.

The same plan runs at another speed under another program. What decides it is a few
choices that documentation states, kept in `software.toml`; how much each of them costs
is in `constants.toml`. A plan of autoshard's own runs on XLA: `SOFTWARE["xla"]`.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Literal

from pydantic import BaseModel, ConfigDict

Attention = Literal["unfused", "flash1", "flash2", "flash3"]


class Software(BaseModel):
    """One generation of training software.

    Attributes:
        name: What it is called here.
        about: A sentence for people.
        match: Words of a framework's name that it is known by.
        since: First year of publication that an entry is for.
        until: Last year.
        fusion: Who joins point-by-point ops: nobody ("eager"), hand-written kernels, or
            a compiler.
        attention: Whether attention is one kernel, and of which generation: Triton and
            the first CUDA kernels, FlashAttention-2, or cuDNN and FlashAttention-3.
        era: "2022" where matrix products are those of that year's libraries.
        launch: Share of an eager program's launches: "all", "half" where many ops are
            fused kernels, "none" where the host is never waited for.
        reduction: When gradients are summed over data replicas.
        tensor: Whether collectives of tensor parallelism run beside products.
        gathers: Whether sharded parameters are gathered before they are needed.
        replays: Whether recomputation replays a whole block or what the backward pass
            needs.
        stages: Whether pipeline stages get equal numbers of layers, the embedding and
            the head counted as layers where they do not divide, or equal cost.
        loss: Whether the loss is one kernel, and of scores cast to float32.
        update: How updated shards reach other ranks: gathered, or each broadcast.
        optimizer: Whether the update is one kernel.
        gradient_bytes: Of one gradient as it is summed.
        sums: Whether float32 sums of gradients stand alone or beside 16-bit gradients.
        param_bytes: Of one parameter as it is stored.
        optimizer_bytes: Of Adam's state per parameter: two moments, and a float32 copy
            where parameters are stored in 16 bits.
        flattens: Whether ZeRO copies parameters into one buffer, which leaves blocks
            that fit nothing else.
        bucket_bytes: Of buffers in which gradients and parameters are sent.
        preallocates: Whether it takes a share of a GPU's memory when it starts, and
            all tensors must fit into that.
        logits: Whether the loss copies the logits, or works in place or in few kernels.
        counts: What the memory that it logs is of: tensors, what the allocator
            reserves, or all that is taken from the device.
        logged: The pipeline stage that it logs memory of.

    >>> SOFTWARE["xla"].fusion
    'compiler'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    about: str
    match: tuple[str, ...]
    since: int = 0
    until: int = 9999
    fusion: Literal["eager", "kernels", "compiler"]
    attention: Attention
    era: Literal["2022", "current"] = "current"
    launch: Literal["all", "half", "none"] = "none"
    reduction: Literal[
        "at the end", "overlapped", "overlapped by layer", "overlapped in buckets"
    ]
    tensor: Literal["exposed", "overlapped", "compiler"] = "exposed"
    gathers: Literal["ahead", "on demand"] = "ahead"
    replays: Literal["all", "what is needed"] = "all"
    stages: Literal["by layers", "balanced"] = "by layers"
    loss: Literal["fused", "float32", "eager"] = "fused"
    update: Literal["gathered", "broadcast"] = "gathered"
    optimizer: Literal["fused", "eager"] = "fused"
    gradient_bytes: int
    sums: Literal["alone", "beside"] = "alone"
    param_bytes: Literal[2, 4] = 2
    optimizer_bytes: int = 12
    flattens: bool = False
    bucket_bytes: int = 0
    preallocates: bool = False
    logits: Literal["copied", "in place"] = "in place"
    counts: Literal["allocated", "reserved", "device"] = "reserved"
    logged: Literal["largest", "first"] = "largest"


@cache
def entries() -> tuple[Software, ...]:
    """All entries, in the order in which they are tried."""
    text = resources.files("autoshard.cost").joinpath("software.toml")
    data = tomllib.loads(text.read_text(encoding="utf-8"))["software"]
    return tuple(Software.model_validate(entry) for entry in data)


SOFTWARE = {entry.name: entry for entry in reversed(entries())}


def named(framework: str, year: int) -> Software | None:
    """The software that a framework's name stands for, or None.

    Args:
        framework: As a publication writes it.
        year: When it was published.

    >>> named("NeMo/Megatron-Core", 2024).name
    'megatron-core'
    """
    text = framework.lower()
    for entry in entries():
        known = any(word in text for word in entry.match)
        if known and entry.since <= year <= entry.until:
            return entry
    return None
