"""Peak bytes on a device of runs given by numbers.

State by storage, activations by what the backward pass needs of a layer, times the
microbatches that the first pipeline stage holds, and what exists for a moment only:
one layer's recomputed activations, gathered parameters, logits, buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from autoshard.cost.constants import Constants
from autoshard.cost.layer import layer
from autoshard.cost.run import Runs, Vector


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device that holds most, per run, by what they hold.

    Attributes:
        params: Parameters as they are computed with, and as they are stored.
        gradients: Gradients, and what they are summed in.
        optimizer: Moments and the float32 copy of the parameters.
        activations: What the backward pass needs of all layers.
        logits: Scores over the vocabulary, and their gradients.
        temporary: One layer's recomputed activations, gathered parameters.
        runtime: Contexts, communication buffers, fragments that cannot be used.
    """

    params: Vector
    gradients: Vector
    optimizer: Vector
    activations: Vector
    logits: Vector
    temporary: Vector
    runtime: Vector

    @property
    def peak_bytes(self) -> Vector:
        """Bytes at the peak."""
        return sum((getattr(self, f.name) for f in fields(self)), np.zeros(1))


def memory(runs: Runs, constants: Constants | None = None) -> Memory:
    """Predicts the peak memory of runs.

    Args:
        runs: What is run, where, how and by what.
        constants: Of the cost model, by default as fitted to published runs.

    Returns:
        Bytes per run on the device that holds most, by what they hold.

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
    part = layer(runs, constants)
    layers = runs.layers / runs.stage
    first = np.ceil(np.where(_even(runs), layers, (runs.layers + 2) / runs.stage - 1))
    table = runs.vocab * runs.embed / runs.tensor
    tables = np.where(runs.stage > 1, 1.0, np.where(runs.tied > 0, 1.0, 2.0))
    # The first stage holds the embedding; its layers' parameters are `part.params`.
    own = first * part.params + tables * table
    shard = np.maximum(runs.shard, 1.0)
    split = [np.where(runs.zero >= stage, shard, 1.0) for stage in (3, 2, 1)]
    trained = np.where(runs.frozen > 0, 0.0, 1.0)
    xla = runs.where("name", "xla")
    # JAX and FSDP trainers store float32 parameters and compute with a 16-bit copy;
    # the others store 16 bits, and a float32 copy with the optimizer's state.
    full = xla | runs.where("name", "composer", "torchtitan")
    params = own * np.where(full, 4.0, 2.0) / split[0]
    copies = np.where(full, 8.0, 12.0)
    optimizer = trained * own * copies / split[2]
    # Summed in float32 beside the 16-bit ones, or only once where there is no sum.
    held = np.where(full, 4.0, runs.gradient_bytes)
    held = held + np.where(
        runs.where("fusion", "eager") & (held == 4) & ~full, 2.0, 0.0
    )
    gradients = trained * own * held / split[1]
    kept, whole = _activations(runs, constants, part.tokens)
    waiting = np.minimum(runs.stage, runs.microbatches)
    # Interleaving holds (p - 1) / (p v) more (Korthikanti et al. 2022, section 4.2.3).
    more = 1 + np.where(
        (runs.virtual > 1) & (runs.stage > 1),
        (runs.stage - 1) / (runs.stage * runs.virtual),
        0.0,
    )
    twice = np.array([r.layout.schedule == "zb-2p" for r in runs.runs])
    waiting = waiting * more * np.where(twice, 2.0, 1.0)
    activations = first * waiting * kept
    again = np.where(kept < 0.9 * whole, whole, 0.0)
    gathered = np.where(runs.zero == 3, 2 * 2 * part.params + 2 * table, 0.0)
    score = np.where(runs.where("loss", "eager"), 14.0, 8.0)
    logits = part.tokens * runs.vocab / runs.tensor * score
    logits = np.where(runs.stage > 1, 0.0, logits)
    state = params + gradients + optimizer + activations + logits
    slack = np.where(runs.torus, 0.0, constants["memory.slack"] * state)
    base = np.where(runs.torus, 0.3e9, constants["memory.runtime_bytes"])
    return Memory(
        params=params,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        temporary=again + gathered,
        runtime=base + slack,
    )


def _even(runs: Runs) -> np.ndarray:
    return np.floor(runs.layers / runs.stage) * runs.stage == runs.layers


def _activations(
    runs: Runs, constants: Constants, tokens: Vector
) -> tuple[Vector, Vector]:
    """Bytes of a layer that the backward pass needs: as kept, and with all kept."""
    tensor = runs.tensor
    whole = np.where(runs.sequence > 0, tensor, 1.0)
    queries = runs.heads * runs.head_dim / tensor
    keys = runs.kv_heads * runs.head_dim / tensor
    dense = np.where(runs.experts > 0, runs.dense_mlp, runs.mlp)
    hidden = (1 - runs.moe_share) * dense
    hidden = hidden + runs.moe_share * (runs.shared_mlp + runs.top_k * runs.mlp)
    hidden = hidden / tensor
    eager = np.select(
        [runs.where("fusion", "eager"), runs.where("fusion", "kernels")],
        [constants["memory.eager"], constants["memory.kernels"]],
        1.0,
    )
    residual = 2 * tokens * runs.embed / whole
    # Inputs of two norms and of the two groups of products, in 16 bits.
    around = residual * 4 * eager
    projected = 2 * tokens * (queries + 2 * keys)
    context = 2 * tokens * queries
    # What the hidden width is made of, and the activation's result.
    wide = 2 * tokens * hidden * (runs.matrices + (eager - 1) * (runs.matrices - 1))
    scores = np.where(
        runs.where("attention", "unfused"),
        5 * tokens * runs.seq * runs.heads / tensor,
        0.0,
    )
    every = around + projected + context + wide + scores
    all_again = runs.again_traffic >= 1.0
    kept = (
        residual * np.where(all_again, 1.0, 4 * eager)
        + projected * (1 - runs.again_qkv)
        + context * (1 - runs.again_attention)
        + wide * (1 - runs.again_up)
        + scores * (1 - runs.again_attention)
    )
    host = runs.again_offloaded > 0
    return np.where(host, 0.0, kept), every


def too_large(runs: Runs, constants: Constants | None = None) -> np.ndarray:
    """Whether each run needs more memory than a chip has.

    Args:
        runs: What is run, where, how and by what.
        constants: Of the cost model, by default as fitted to published runs.

    Returns:
        bool[run].
    """
    room = np.array([float(run.cluster.hbm_bytes) for run in runs.runs])
    return memory(runs, constants).peak_bytes > room
