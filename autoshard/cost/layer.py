"""Times of one layer's parts in one pass of one microbatch, for many runs at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autoshard.cost.constants import Constants
from autoshard.cost.kernels import (
    fused_attention_s,
    product_s,
    share_of_peak,
    unfused_attention_s,
)
from autoshard.cost.network import Group, time_s
from autoshard.cost.run import Runs, Vector


@dataclass(frozen=True, slots=True)
class Layer:
    """Seconds of a layer's parts, and what it holds on a chip, per run.

    Attributes:
        qkv: Projections to queries, keys and values.
        out: Attention's output projection.
        up: The MLP's products into its hidden width.
        down: The product out of it.
        attention: Attention itself.
        attention_back: Its backward pass over its forward pass.
        traffic: Point-by-point ops.
        head: The output projection and the loss, forward and backward.
        params: Parameters of the layer on a chip, in whole where they are gathered.
        tokens: Positions of a microbatch on a chip.
    """

    qkv: Vector
    out: Vector
    up: Vector
    down: Vector
    attention: Vector
    attention_back: Vector
    traffic: Vector
    head: Vector
    params: Vector
    tokens: Vector

    @property
    def products(self) -> Vector:
        """All products of a forward pass."""
        return self.qkv + self.out + self.up + self.down


def shares(runs: Runs, constants: Constants) -> Vector:
    """Share of peak that large products reach, per run."""
    share = np.array(
        [
            share_of_peak(g, "tpu" if torus else "gpu", constants)
            for g, torus in zip(runs.generation, runs.torus, strict=True)
        ]
    )
    share = share * np.where(runs.where("era", "2022"), constants["matmul.2022"], 1.0)
    low = runs.peak > runs.peak_16
    share = share * np.where(low, constants["matmul.fp8"], 1.0)
    return share * runs.power ** constants["power.exponent"]


def layer(runs: Runs, constants: Constants) -> Layer:
    """Prices the parts of an average layer of each run."""
    share = shares(runs, constants)
    tokens = runs.microbatch * runs.seq / runs.context
    tensor, embed = runs.tensor, runs.embed

    def product(m: Vector, k: Vector, n: Vector) -> Vector:
        return product_s(
            m,
            k,
            n,
            peak=runs.peak,
            share=share,
            hbm=runs.hbm,
            half_dim=constants["matmul.half_dim"],
        )

    queries = runs.heads * runs.head_dim / tensor
    keys = runs.kv_heads * runs.head_dim / tensor
    # Latent attention has other projections of as many parameters.
    plain = 2 * embed * runs.head_dim * (runs.heads + runs.kv_heads)
    latent = runs.attention_matmul_params / plain
    up, down = _mlp(runs, constants, tokens, product)
    attention, back = _attention(runs, constants, share, tokens, queries)
    hidden = (1 - runs.moe_share) * np.where(runs.experts > 0, runs.dense_mlp, runs.mlp)
    hidden = hidden + runs.moe_share * (runs.shared_mlp + runs.top_k * runs.mlp)
    whole = np.where(runs.sequence > 0, tensor, 1.0)
    # Two norms and two residual sums of four reads or writes and one; rotary tables;
    # the activation between the MLP's products. In 16 bits.
    # Models without gates have learned positions, or none, and no rotary tables.
    rotated = np.where(runs.gated > 0, 3.0, 1.5)
    moved = 10 * embed / whole + rotated * (queries + 2 * keys)
    moved = moved + 1.5 * (runs.matrices - 1) * hidden / tensor
    sent = runs.moe_share * runs.top_k * 4 * embed
    moved = moved + sent * constants["traffic.dispatch"]
    passes = np.select(
        [runs.where("fusion", "eager"), runs.where("fusion", "kernels")],
        [constants["traffic.eager"], constants["traffic.kernels"]],
        constants["traffic.compiler"],
    )
    logits = tokens * runs.vocab / tensor
    head = np.where(runs.frozen > 0, 2.0, 3.0)
    # Fused: 16-bit scores read twice, and their gradients written and read twice. In
    # float32: as many, and the casts.
    loss = np.select(
        [runs.where("loss", "eager"), runs.where("loss", "float32")],
        [constants["loss.eager_bytes"], 26.0],
        12.0,
    )
    local = runs.plain_params + runs.moe_share * runs.expert_params / runs.expert
    return Layer(
        qkv=product(tokens, embed, queries + 2 * keys) * latent,
        out=product(tokens, queries, embed) * latent,
        up=up,
        down=down,
        attention=attention,
        attention_back=back,
        traffic=passes * 2 * tokens * moved / runs.hbm,
        head=head * product(tokens, embed, runs.vocab / tensor)
        + logits * loss / runs.hbm,
        params=local / tensor,
        tokens=tokens,
    )


def _mlp(
    runs: Runs,
    constants: Constants,
    tokens: Vector,
    product: Callable[[Vector, Vector, Vector], Vector],
) -> tuple[Vector, Vector]:
    """Products into and out of the MLP's hidden width, dense and of experts."""
    into, tensor, embed = runs.matrices - 1, runs.tensor, runs.embed
    dense = np.where(runs.experts > 0, runs.dense_mlp, runs.mlp)
    parts = [(1 - runs.moe_share, dense), (runs.moe_share, runs.shared_mlp)]
    up, down = np.zeros(len(runs)), np.zeros(len(runs))
    for share, width in parts:
        there = np.where((share > 0) & (width > 0), share, 0.0)
        width = np.maximum(width, 1.0)
        up = up + there * product(tokens, embed, into * width / tensor)
        down = down + there * product(tokens, width / tensor, embed)
    experts = np.maximum(np.maximum(runs.experts, 1.0) / runs.expert, 1.0)
    rows = np.maximum(tokens * runs.top_k * runs.capacity / experts, 1.0)
    each = runs.moe_share * experts / constants["matmul.experts"]
    up = up + each * product(rows, embed, into * runs.mlp / tensor)
    return up, down + each * product(rows, runs.mlp / tensor, embed)


def _attention(
    runs: Runs, constants: Constants, share: Vector, tokens: Vector, queries: Vector
) -> tuple[Vector, Vector]:
    """Attention's forward pass, and its backward pass over it."""
    late = np.isin(runs.generation, ["hopper", "blackwell"])
    of = {
        kind: np.where(
            late,
            constants[f"attention.{kind}_hopper"],
            constants[f"attention.{kind}_ampere"],
        )
        for kind in ("flash1", "flash2")
    }
    # cuDNN on an A100 is FlashAttention-2.
    newest = np.where(late, constants["attention.flash3_hopper"], of["flash2"])
    reached = np.select(
        [
            runs.torus,
            runs.where("attention", "flash1"),
            runs.where("attention", "flash2"),
        ],
        [constants["attention.tpu"], of["flash1"], of["flash2"]],
        newest,
    )
    fused = fused_attention_s(
        tokens,
        runs.seq,
        queries,
        runs.head_dim,
        peak=runs.peak_16,
        share=reached,
        half_head_dim=constants["attention.half_head_dim"],
    )
    # Batched products of one head's size reach about 0.6 of what large ones do.
    unfused = unfused_attention_s(
        tokens,
        runs.seq,
        queries,
        runs.heads / runs.tensor,
        peak=runs.peak_16,
        share=0.6 * share,
        hbm=runs.hbm,
        traffic=constants["attention.unfused"],
    )
    plain = runs.where("attention", "unfused")
    # A fused backward pass computes the scores again: five products for two.
    return np.where(plain, unfused, fused), np.where(plain, 2.0, 2.5)


@dataclass(frozen=True, slots=True)
class Transfers:
    """Seconds of a layer's collectives in one pass, per run.

    Attributes:
        tensor: Of tensor parallelism, exposed part.
        expert: Rows sent to experts and back.
        context: Keys and values of other parts of the sequence.
        gather: Parameters gathered where they are sharded; their gradients scattered
            take as long.
    """

    tensor: Vector
    expert: Vector
    context: Vector
    gather: Vector


def collective_s(
    runs: Runs,
    constants: Constants,
    kind: str,
    bytes_: Vector,
    inside: Vector,
    outside: Vector,
    times: Vector | float = 1.0,
) -> Vector:
    """Seconds of a collective that overlaps with nothing, per run.

    Args:
        runs: Where.
        constants: Of the cost model.
        kind: As in `network.time_s`.
        bytes_: Bytes of the larger side, of all launches.
        inside: Members in a node.
        outside: Nodes.
        times: Launches that the bytes are spread over.
    """
    group = Group(inside=inside, outside=outside)
    flat = times * time_s(kind, bytes_ / times, group, runs.fabric)
    members = inside * outside
    # A group takes up whole dims of the torus one after another, eight chips or so
    # along each, and uses the rings of both directions of those it spans.
    spans = np.clip(np.round(np.log2(np.maximum(members, 2)) / 3), 1, runs.dims)
    side = np.maximum(np.round(members ** (1 / spans)), 1)
    ring = Group(inside=members, links=2 * spans, hops=spans * side)
    torus = time_s(kind, bytes_, ring, runs.fabric.as_torus())
    return np.where(
        runs.torus, torus * constants["network.tpu"], flat * constants["network.gpu"]
    )


def transfers(runs: Runs, constants: Constants, part: Layer) -> Transfers:
    """Prices the collectives of an average layer of each run."""
    tensor, context, shard = runs.tensor, runs.context, runs.shard
    inside, outside = placed(runs, tensor, 1.0)
    width = 2 * part.tokens * runs.embed

    def time(kind: str, bytes_: Vector, inside: Vector, outside: Vector) -> Vector:
        return collective_s(runs, constants, kind, bytes_, inside, outside)

    # Two gathers and two scatters, or two all-reduces of as many bytes.
    by_tensor = 4 * time("all_gather", width, inside, outside)
    by_tensor = by_tensor * np.select(
        [runs.where("tensor", "overlapped"), runs.torus],
        [constants["tensor.overlapped"], constants["tensor.compiler"]],
        1.0,
    )
    inside, outside = placed(runs, runs.expert, tensor)
    whole = np.where(runs.sequence > 0, tensor, 1.0)
    rows = width / whole * runs.top_k
    by_expert = 2 * runs.moe_share * time("all_to_all", rows, inside, outside)
    inside, outside = placed(runs, context, tensor)
    keys = 2 * 2 * part.tokens * context * runs.kv_heads * runs.head_dim / tensor
    by_context = time("all_gather", keys, inside, outside)
    inside, outside = placed(runs, shard, tensor)
    sharded = (runs.zero == 3) & (shard > 1)
    by_shard = time("all_gather", 2 * part.params, inside, outside)
    return Transfers(
        tensor=np.where(tensor > 1, by_tensor, 0.0),
        expert=np.where((runs.experts > 0) & (runs.expert > 1), by_expert, 0.0),
        context=np.where(context > 1, by_context, 0.0),
        gather=np.where(sharded, by_shard, 0.0),
    )


def placed(runs: Runs, size: Vector, within: Vector | float) -> tuple[Vector, Vector]:
    """`(members in a node, nodes)` of a group with members `within` chips apart."""
    room = np.maximum(runs.node / within, 1.0)
    inside = np.minimum(size, room)
    return inside, size / inside
