"""Sizes of a decoder: printed parameter counts, and each matrix counted one by one."""

from __future__ import annotations

import dataclasses
import math

import pytest
from helpers.runs import LLAMA
from hypothesis import given
from hypothesis import strategies as st

from autoshard.cost.decoder import Decoder
from autoshard.ir.errors import InputError
from autoshard.validation.fields import known

# DeepSeek-V3's config.json: hidden 7168, 128 heads, latent ranks 1536 (queries) and 512
# (keys and values), 128 + 64 dims of a query and key, 128 of a value.
LATENT = (
    7168 * 1536
    + 1536 * 128 * (128 + 64)
    + 7168 * (512 + 64)
    + 512 * 128 * (128 + 128)
    + 128 * 128 * 7168
)
DEEPSEEK = Decoder(
    layers=61,
    embed=7168,
    heads=128,
    kv_heads=128,
    head_dim=128,
    mlp=2048,
    vocab=129280,
    experts=256,
    top_k=8,
    dense_layers=3,
    dense_mlp=18432,
    shared_mlp=2048,
    attention_params=LATENT,
)
MIXTRAL_8X7B = Decoder(32, 4096, 32, 8, 128, 14336, 32000, experts=8, top_k=2)
MIXTRAL_8X22B = Decoder(56, 6144, 48, 8, 128, 16384, 32768, experts=8, top_k=2)
GPT3 = Decoder(96, 12288, 96, 96, 128, 49152, 50257, gated=False, tied=True)

# As their authors print them: all parameters and those that one token meets.
PRINTED = {
    "Llama-3-8B": (LLAMA, 8.03e9, 8.03e9),
    "Llama-3-70B": (
        Decoder(80, 8192, 64, 8, 128, 28672, 128256), 70.6e9, 70.6e9
    ),
    "Llama-3.1-405B": (
        Decoder(126, 16384, 128, 8, 128, 53248, 128256), 405.9e9, 405.9e9
    ),
    "Llama-3.2-1B": (
        Decoder(16, 2048, 32, 8, 64, 8192, 128256, tied=True), 1.236e9, 1.236e9
    ),
    "GPT-3": (GPT3, 174.6e9, 174.6e9),
    "Mixtral-8x7B": (MIXTRAL_8X7B, 46.7e9, 12.9e9),
    "Mixtral-8x22B": (MIXTRAL_8X22B, 140.6e9, 39.1e9),
    "DeepSeek-V3": (DEEPSEEK, 671e9, 37e9),
}  # fmt: skip


def met(decoder):
    """Parameters that one token is multiplied with or looked up in."""
    return decoder.layers * decoder.active_layer_params + decoder.vocab_params


@pytest.mark.parametrize("name", PRINTED)
def test_printed_parameters(name):
    decoder, total, active = PRINTED[name]
    assert decoder.params == pytest.approx(total, rel=0.002)
    assert met(decoder) == pytest.approx(active, rel=0.02)


def test_llama_to_the_parameter():
    """The checkpoint holds 8 030 261 248, of which two norms a layer and one more."""
    assert LLAMA.params == 8_030_261_248 - (2 * 32 + 1) * 4096


sizes = st.integers(1, 64)


@given(*[sizes] * 6, st.booleans(), st.booleans())
def test_dense_matrices_one_by_one(layers, embed, heads, dim, mlp, vocab, gated, tied):
    matrices = [(vocab, embed)]
    for _ in range(layers):
        matrices += [(embed, heads * dim)] * 3 + [(heads * dim, embed)]
        matrices += [(embed, mlp), (mlp, embed)]
        if gated:
            matrices.append((embed, mlp))
    if not tied:
        matrices.append((embed, vocab))
    decoder = Decoder(layers, embed, heads, heads, dim, mlp, vocab, gated, tied)
    assert decoder.params == pytest.approx(sum(math.prod(m) for m in matrices))


@given(
    *[sizes] * 3, st.integers(1, 8), st.integers(1, 8), st.integers(0, 8), st.booleans()
)
def test_mixture_matrices_one_by_one(
    embed, mlp, vocab, experts, moe_layers, dense, gated
):
    count, top_k = 3 if gated else 2, (experts + 1) // 2
    total, active = 2 * vocab * embed, 2 * vocab * embed
    for _ in range(dense):
        total += 4 * embed * 8 * 2 + count * embed * 5
        active += 4 * embed * 8 * 2 + count * embed * 5
    for _ in range(moe_layers):
        router, shared, one = embed * experts, count * embed * 7, count * embed * mlp
        total += 4 * embed * 8 * 2 + router + shared + experts * one
        active += 4 * embed * 8 * 2 + router + shared + top_k * one
    decoder = Decoder(
        moe_layers + dense, embed, 2, 2, 8, mlp, vocab, gated, experts=experts,
        top_k=top_k, dense_layers=dense, dense_mlp=5, shared_mlp=7,
    )  # fmt: skip
    assert decoder.params == pytest.approx(total)
    assert met(decoder) == pytest.approx(active)


def test_flops_of_a_token_are_those_of_each_product():
    """Every product of a token with a matrix, and with the keys and values it sees."""
    seq = 64
    decoder = Decoder(3, 32, 4, 2, 8, 96, 128)
    params = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 96
    products = 2 * (3 * params + 128 * 32)
    # Scores and their sum of values, with half of the sequence on average.
    attention = 3 * 2 * (2 * 4 * 8) * (seq / 2)
    # A backward pass is two products for each of the forward pass.
    assert decoder.model_flops_per_token(seq) == 3 * (products + attention)


def test_flops_of_gpt3_as_published():
    """Brown et al. 2020, table D.1: 3.14e23 FLOPs for 300 billion tokens."""
    assert GPT3.model_flops_per_token(2048) * 300e9 == pytest.approx(3.14e23, rel=0.03)


def test_latent_attention_of_the_catalogue():
    entry = next(e for e in known()["experts"] if e["words"] == "deepseek-v3")
    assert entry["attention_params"] == LATENT


@pytest.mark.parametrize(
    "name", ["layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_must_be_positive(name, value):
    with pytest.raises(InputError, match=f"{name} = {value}; it must be positive"):
        dataclasses.replace(LLAMA, **{name: value})


@pytest.mark.parametrize("top_k", [-1, 0, 9])
def test_tokens_go_to_some_of_the_experts(top_k):
    with pytest.raises(InputError, match=f"8 experts has top_k = {top_k}"):
        dataclasses.replace(MIXTRAL_8X7B, top_k=top_k)


def test_no_more_dense_layers_than_layers():
    with pytest.raises(InputError, match="61 layers has 62 dense"):
        dataclasses.replace(DEEPSEEK, dense_layers=62)
