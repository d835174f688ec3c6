"""Peak bytes on a device of runs given by numbers.

A device holds state as its software stores it, what the backward pass needs of all
microbatches in flight, and what exists for a moment only. Which stage of a pipeline
holds most, and when, depends on the run: the first stage has most microbatches in
flight, the second more layers where the first has the embedding, the last the logits;
and the peak is at the loss, inside a layer's backward pass, or at the update.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from autoshard.cost.constants import Constants
from autoshard.cost.pipeline import in_flight
from autoshard.cost.run import Runs, Vector

TPU_RUNTIME_BYTES = 0.3e9
"""Held back on a TPU: its compilers report what of its memory a program may not use."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on a device at its peak, per run, by what they hold.

    Attributes:
        params: Parameters as they are stored, and copies of them that stay.
        gradients: Gradients, and what they are summed in.
        optimizer: Moments and the float32 copy of the parameters.
        activations: What the backward pass needs of all layers.
        logits: Scores over the vocabulary, their copies and gradients.
        temporary: One layer's recomputed activations and gradients, gathered
            parameters, intermediate results of the update.
        slack: What the allocator has reserved and no tensor uses.
        runtime: Contexts, libraries and communication buffers.
    """

    params: Vector
    gradients: Vector
    optimizer: Vector
    activations: Vector
    logits: Vector
    temporary: Vector
    slack: Vector
    runtime: Vector

    @property
    def allocated_bytes(self) -> Vector:
        """Bytes of tensors: PyTorch's allocated bytes, XLA's allocation."""
        return self.peak_bytes - self.slack - self.runtime

    @property
    def reserved_bytes(self) -> Vector:
        """Bytes that the allocator holds: PyTorch's reserved bytes."""
        return self.peak_bytes - self.runtime

    @property
    def peak_bytes(self) -> Vector:
        """Bytes taken from the device, as nvidia-smi counts them."""
        return sum((getattr(self, f.name) for f in fields(self)), np.zeros(1))


def memory(
    runs: Runs,
    constants: Constants | None = None,
    stage: Literal["largest", "first"] = "largest",
) -> Memory:
    """Predicts the peak memory of runs.

    Args:
        runs: What is run, where, how and by what.
        constants: Of the cost model, by default as fitted to published runs.
        stage: Of a pipeline: the one that holds most, or the first.

    Returns:
        Bytes per run on one device of that stage, by what they hold.

    >>> from autoshard.cost.decoder import Decoder
    >>> from autoshard.cost.run import Layout, Run
    >>> from autoshard.plan.cluster import cluster
    >>> llama = Decoder(32, 4096, 32, 8, 128, 14336, 128256)
    >>> layout = Layout(data=64, shard=64, zero=3, microbatch=1)
    >>> held = memory(Runs.of([Run(llama, cluster("h100:64"), layout, 4096)]))
    >>> bool(held.peak_bytes[0] < 80e9)
    True
    """
    constants = constants or Constants.shipped()
    wanted = (0,) if stage == "first" else (0, 1, -1)
    found = [m for s in wanted for m in _moments(runs, constants, _stage(runs, s))]
    best = np.argmax([m.peak_bytes for m in found], axis=0)
    return Memory(
        **{
            f.name: np.choose(best, [getattr(m, f.name) for m in found])
            for f in fields(Memory)
        }
    )


def too_large(
    runs: Runs, constants: Constants | None = None
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Tells which runs do not fit into their chips' memory.

    Args:
        runs: What is run, where, how and by what.
        constants: Of the cost model, by default as fitted to published runs.

    Returns:
        Per run, whether its peak is above the share of memory that can be used.

    >>> from autoshard.cost.decoder import Decoder
    >>> from autoshard.cost.run import Layout, Run
    >>> from autoshard.plan.cluster import cluster
    >>> llama = Decoder(80, 8192, 64, 8, 128, 28672, 128256)
    >>> too_large(Runs.of([Run(llama, cluster("h100:8"), Layout(data=8), 4096)]))
    array([ True])
    """
    constants = constants or Constants.shipped()
    there = np.array([r.cluster.chip.hbm_bytes.value for r in runs.runs])
    # Fragments can be given back when memory runs out: only tensors must fit. XLA is
    # given a share of a GPU's memory when it starts, and finds the rest elsewhere.
    held = memory(runs, constants)
    given = (runs.preallocates > 0) & ~runs.torus
    needed = held.allocated_bytes + np.where(given, 0.0, held.runtime)
    share = np.where(given, constants["memory.given"], constants["memory.usable"])
    return needed > share * there


@dataclass(frozen=True, slots=True)
class _Stage:
    """What one stage of each run's pipeline has.

    Attributes:
        layers: Its layers.
        tables: Embeddings and output matrices of it.
        flight: Microbatches whose activations it holds.
        first: Whether it is the first.
        last: Whether it is the last, which has the logits.
    """

    layers: Vector
    tables: Vector
    flight: Vector
    first: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    last: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def _stage(runs: Runs, index: int) -> _Stage:
    """The first (0), second (1) or last (-1) stage; the last where there are fewer."""
    stages = runs.stage
    at = stages - 1 if index < 0 else np.minimum(index, stages - 1)
    last = at == stages - 1
    first = at == 0
    both = np.where(runs.tied > 0, 1.0, 2.0)
    tables = np.where(first & last, both, np.where(first | last, 1.0, 0.0))
    return _Stage(_layers(runs, at), tables, _flight(runs, at), first, last)


def _layers(runs: Runs, at: Vector) -> Vector:
    """Layers of a stage."""
    layers, stages = runs.layers, runs.stage
    # Where layers do not divide evenly, the embedding and the head count as one each.
    each = (layers + 2) / stages
    ends = (at == 0) | (at == stages - 1)
    counted = np.where(each == np.floor(each), each - ends, np.ceil(layers / stages))
    plain = np.where(layers % stages == 0, layers / stages, counted)
    # By cost: a stage is full when the sum of costs so far is above its share
    # (nanotron, `get_block_compute_costs`); the head costs as its parameters.
    share = layers + runs.vocab * runs.embed / runs.layer_params

    def upto(stage: Vector) -> Vector:
        full = np.floor((stage + 1) * share / stages) + 1
        inside = np.where(stage == stages - 1, layers, np.minimum(full, layers))
        return np.where(stage < 0, 0.0, inside)

    by_cost = upto(at) - upto(at - 1)
    split = np.where(runs.where("stages", "balanced"), by_cost, plain)
    return np.where(stages > 1, split, layers)


def _flight(runs: Runs, at: Vector) -> Vector:
    """Microbatches of which a stage holds activations, as many stages' worth."""
    schedule = np.array([r.layout.schedule for r in runs.runs])
    return in_flight(schedule, runs.stage, at, runs.virtual, runs.microbatches)


def _moments(runs: Runs, constants: Constants, stage: _Stage) -> list[Memory]:
    """A stage at the loss, in a layer's backward pass and at the update."""
    trained = np.where(runs.frozen > 0, 0.0, 1.0)
    table = runs.vocab * runs.embed / runs.tensor
    plain = runs.plain_params / runs.tensor
    expert = runs.moe_share * runs.expert_params / runs.expert / runs.tensor
    own = stage.layers * plain + stage.tables * table
    own_experts = stage.layers * expert

    def split(level: int) -> Vector:
        """Parameters on a device where this ZeRO level is sharded."""
        ways = np.where(runs.zero >= level, np.maximum(runs.shard, 1.0), 1.0)
        return own / ways + own_experts / np.maximum(ways / runs.expert, 1.0)

    stored = runs.param_bytes
    sums = np.where(stored == 4, 4.0, runs.gradient_bytes)
    half = np.array([r.dtype == "f16" for r in runs.runs])
    eager = runs.where("fusion", "eager", "kernels")
    # DeepSpeed and Megatron of 2022 sum gradients of float16 runs in 16 bits.
    sums = np.where(half & runs.where("name", "megatron-2021"), 2.0, sums)
    beside = np.where(runs.where("sums", "beside") & (sums == 4), 2.0, 0.0)
    # A flat copy for ZeRO, beside the memory of what it was made of.
    flat = np.where((runs.zero > 0) & (runs.flattens > 0), stored, 0.0)
    params = split(3) * (stored + flat)
    gradients = trained * split(2) * (sums + beside)
    optimizer = trained * split(1) * runs.optimizer_bytes
    # At the update, 16-bit sums become float32 ones, and eager programs have
    # intermediate results of Adam.
    update = np.where(eager & (sums == 2), 4.0, 0.0)
    update = update + np.where(
        runs.where("optimizer", "eager"), constants["memory.update"], 0.0
    )
    tokens = runs.microbatch * runs.seq / runs.context
    kept, again = _activations(runs, tokens)
    whole = np.where(runs.sequence > 0, runs.tensor, 1.0)
    # What was received and what was sent is held beside what layers keep.
    ends = np.where(stage.first, 0.0, 1.0) + np.where(stage.last, 0.0, 1.0)
    passed = ends * 2 * tokens * runs.embed / whole
    activations = stage.flight * (stage.layers * kept + passed)
    per_logit = np.where(
        runs.where("logits", "copied"),
        constants["memory.logits_copied"],
        constants["memory.logits_in_place"],
    )
    logits = np.where(stage.last, tokens * runs.vocab / runs.tensor * per_logit, 0.0)
    # Two layers gathered and one's gradients. At the loss, the head and its gradient,
    # and its input and that one's gradient.
    gathered = np.where((runs.zero == 3) & (runs.shard > 1), 2.0, 0.0)
    head = np.where(stage.last, 4 * tokens * runs.embed + 2 * gathered * table, 0.0)
    slack = np.where(eager, constants["memory.slack"], 0.0)
    # Each group of devices that communicate has buffers of its own.
    groups = sum(
        np.where(n > 1, 1.0, 0.0)
        for n in (runs.data, runs.tensor, runs.context, runs.stage)
    )
    base = constants["memory.runtime_bytes"] + runs.bucket_bytes
    base = base + constants["memory.group_bytes"] * groups
    base = np.where(runs.torus, TPU_RUNTIME_BYTES, base)
    zero = np.zeros(len(runs))

    def at(activations: Vector, logits: Vector, temporary: Vector) -> Memory:
        # State is allocated once; what eager programs do leaves fragments.
        moving = activations + logits + temporary
        return Memory(
            params=params + zero,
            gradients=gradients + zero,
            optimizer=optimizer + zero,
            activations=activations,
            logits=logits,
            temporary=temporary,
            slack=slack * moving,
            runtime=base + zero,
        )

    return [
        at(activations, logits, head),
        at(activations, zero, again + gathered * 3 * (plain + expert)),
        at(zero, zero, trained * split(1) * update),
    ]


def _activations(runs: Runs, tokens: Vector) -> tuple[Vector, Vector]:
    """Bytes of a layer that the backward pass needs: kept, and for a moment."""
    tensor = runs.tensor
    whole = np.where(runs.sequence > 0, tensor, 1.0)
    queries = runs.heads * runs.head_dim / tensor
    keys = runs.kv_heads * runs.head_dim / tensor
    dense = np.where(runs.experts > 0, runs.dense_mlp, runs.mlp)
    hidden = (1 - runs.moe_share) * dense
    hidden = hidden + runs.moe_share * (runs.shared_mlp + runs.top_k * runs.mlp)
    hidden = hidden / tensor
    eager = np.where(runs.where("fusion", "eager"), 1.0, 0.0)
    unfused = runs.where("attention", "unfused")
    # GPT of 2020 to 2023 drops out; its masks are bytes.
    drops = np.where(unfused & ~runs.where("fusion", "compiler"), 1.0, 0.0)
    residual = 2 * tokens * runs.embed / whole
    # Inputs of the norms and of the products after them; two dropout masks.
    around = residual * (4 + drops)
    projected = 2 * tokens * (queries + 2 * keys)
    context = 2 * tokens * queries
    gated = np.where(runs.matrices > 2, eager, 0.0)
    # What the hidden width is made of, the activation of the gate, their product.
    wide = 2 * tokens * hidden * (runs.matrices + gated)
    # Softmax, its mask and what is left (Korthikanti et al. 2022, section 4.1).
    scores = tokens * runs.seq * runs.heads / tensor * (2 + 3 * drops)
    scores = np.where(unfused, scores, 0.0)
    # Megatron's attention is computed again, its result kept; policies of XLA name it.
    compiled = runs.where("fusion", "compiler")
    all_again = runs.again_traffic >= 1.0
    kept = (
        np.where(all_again, residual, around)
        + projected * (1 - runs.again_qkv)
        + context * (1 - np.where(compiled, runs.again_attention, runs.again_out))
        + wide * (1 - runs.again_up)
        + scores * (1 - runs.again_attention)
    )
    every = around + projected + context + wide + scores
    # Gradients of a layer's parts: an input, its gradient and the output's, in whole,
    # and those of the hidden width.
    work = 6 * tokens * runs.embed + 2 * tokens * hidden * (runs.matrices - 1)
    again = np.maximum(every - kept, 0.0) + work
    return np.where(runs.again_offloaded > 0, 0.0, kept), again
