"""A model by its numbers and the same model traced: what both are said to do.

Neither is computed from the other: numbers go through `cost.decoder`, the traced step
through rules, propagation and the plan's collectives.
"""

from __future__ import annotations

import pytest

from autoshard import api, models
from autoshard.cost.decoder import Decoder
from autoshard.plan.schema import ModelRef

BATCH, SEQ = 16, 4096


def by_numbers(name):
    config = models.get(name)
    return Decoder(
        layers=config.layers,
        embed=config.embed,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        mlp=config.mlp,
        vocab=config.vocab,
        gated=config.activation == "swiglu",
        tied=config.tied_head,
    )


def planned(name, strategy):
    ref = ModelRef(
        model=name,
        batch=BATCH,
        seq=SEQ,
        optimizer="adamw",
        learning_rate=1e-3,
        dtype="bf16",
    )
    resolved = api.resolve(ref)
    policy = api.load_strategy(strategy)
    schedule = {"microbatches": 1, "remat": "full"}
    policy = policy.model_copy(
        update={"schedule": policy.schedule.model_copy(update=schedule)}
    )
    return api.search(resolved.step, resolved.batch, cluster="h100:8", strategy=policy)


@pytest.mark.parametrize("name", ["llama3-8b", "llama3-70b", "gpt2-1.5b"])
def test_parameters_are_those_of_the_model_but_for_norms_biases_and_positions(name):
    config, decoder = models.get(name), by_numbers(name)
    rest = models.num_params(config) - decoder.params
    # Of a layer at most two norms and the biases of its products, and the positions.
    vectors = 4 * config.embed + 2 * config.mlp + 6 * config.heads * config.head_dim
    assert 0 < rest <= config.layers * vectors + (config.max_seq + 2) * config.embed


def test_fsdp_moves_and_multiplies_what_the_numbers_say():
    decoder, plan = by_numbers("llama3-8b"), planned("llama3-8b", "fsdp")
    tokens = BATCH * SEQ
    # The traced program multiplies scores that the mask hides.
    masked = 6 * decoder.layers * decoder.heads * decoder.head_dim * SEQ
    flops = decoder.model_flops_per_token(SEQ) + masked
    assert plan.predicted.model_flops == pytest.approx(flops * tokens, rel=1e-12)

    gathered = sum(
        c.bytes_ * c.count
        for c in plan.predicted.collectives
        if c.kind == "all_gather" and c.value.startswith("params/")
    )
    # In 16 bits, forward and backward; the token table is looked up forward only.
    table = decoder.vocab * decoder.embed
    assert gathered == pytest.approx(2 * (2 * decoder.params - table), rel=1e-3)


def test_tensor_parallelism_sums_the_residual_stream_twice_a_layer_and_pass():
    decoder, plan = by_numbers("llama3-8b"), planned("llama3-8b", "megatron-tp")
    sizes = {a.axis: a.size for a in plan.axes}
    replicas = sizes.get("data", 1)
    residual = 2 * BATCH * SEQ // replicas * decoder.embed
    runs = sum(
        c.count
        for c in plan.predicted.collectives
        if c.kind == "all_reduce" and c.axes == ("tensor",) and c.bytes_ == residual
    )
    # Forward, recomputed and backward, two each, but for the recomputed sum that
    # nothing needs; before and behind the layers the lookup's and the head's.
    assert 5 * decoder.layers <= runs <= 6 * decoder.layers + 2
