"""A layer's parts: FLOPs and bytes of each, counted by hand on a chip of round figures.

Everything but what a test is about is free: see `helpers.runs.free`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers.runs import LARGE, LLAMA, free, plain, run, runs, software
from hypothesis import given
from hypothesis import strategies as st

from autoshard.cost.constants import Constants
from autoshard.cost.decoder import Decoder
from autoshard.cost.layer import collective_s, layer, placed, shares, transfers
from autoshard.cost.run import Layout, Runs

PEAK = 989.4e12  # NVIDIA H100 datasheet (SXM5), dense bf16
MIXTRAL = Decoder(32, 4096, 32, 8, 128, 14336, 32000, experts=8, top_k=2)
MIXED = dataclasses.replace(MIXTRAL, dense_layers=8, dense_mlp=512, shared_mlp=1024)
TOKENS = 2 * 4096  # of a microbatch of two sequences


def parts(layout=None, constants=None, **kwargs):
    return layer(runs(layout, on=plain(), **kwargs), constants or free())


def moved(layout, constants, on, **kwargs):
    found = runs(layout, on=on, **kwargs)
    return transfers(found, constants, layer(found, constants))


# --- products ---


@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("context", [1, 4])
def test_products_of_a_dense_layer(tensor, context):
    part = parts(Layout(tensor=tensor, context=context, microbatch=2))
    each = 2 * TOKENS / context / tensor / PEAK
    assert part.tokens == TOKENS / context
    assert part.qkv == pytest.approx(each * 4096 * (4096 + 2 * 1024))
    assert part.out == pytest.approx(each * 4096 * 4096)
    assert part.up == pytest.approx(each * 4096 * 2 * 14336)
    assert part.down == pytest.approx(each * 4096 * 14336)


def test_an_mlp_without_a_gate():
    part = parts(decoder=dataclasses.replace(LLAMA, gated=False))
    assert part.up == pytest.approx(2 * 4096 * 4096 * 14336 / PEAK)
    assert part.down == pytest.approx(part.up)


@pytest.mark.parametrize("decoder", [MIXTRAL, MIXED], ids=["all", "some"])
@pytest.mark.parametrize("expert", [1, 2, 8])
def test_products_of_experts_are_those_of_active_parameters(decoder, expert):
    part = parts(Layout(data=8, expert=expert, microbatch=2), decoder=decoder)
    router = decoder.moe_share * 8 * 4096  # too thin to count
    active = decoder.active_layer_params - router
    assert part.products == pytest.approx(2 * TOKENS * active / PEAK)


def test_slots_of_experts_that_are_not_filled():
    full = parts(Layout(microbatch=2), decoder=MIXTRAL)
    half = parts(Layout(microbatch=2, capacity=2.0), decoder=MIXTRAL)
    assert half.up == pytest.approx(2 * full.up)
    assert half.down == pytest.approx(2 * full.down)
    assert half.qkv == full.qkv


def test_latent_attention_is_priced_by_its_parameters():
    plain_params = LLAMA.attention_matmul_params
    other = dataclasses.replace(LLAMA, attention_params=3 * plain_params)
    one, three = parts(), parts(decoder=other)
    assert three.qkv + three.out == pytest.approx(3 * (one.qkv + one.out))
    assert three.up == one.up


def test_head_is_three_products_and_the_loss():
    """Forward, and gradients of both operands; twelve bytes a logit."""
    part = parts(Layout(microbatch=2))
    assert part.head == pytest.approx(3 * 2 * TOKENS * 4096 * 128256 / PEAK)
    slow = 1e9
    part = layer(runs(Layout(microbatch=2), on=plain(hbm=slow)), free())
    assert part.head > 12 * TOKENS * 128256 / slow


# --- attention and traffic ---


@pytest.mark.parametrize("tensor", [1, 4])
def test_attention_is_split_by_heads(tensor):
    constants = free(attention__flash3_hopper=0.5)
    part = parts(Layout(tensor=tensor, microbatch=2), constants)
    assert part.attention == pytest.approx(
        2 * TOKENS * 4096 * 4096 / tensor / (0.5 * PEAK)
    )
    # Scores again, and two products for each of the two of the forward pass.
    assert part.attention_back == (1 + 2 * 2) / 2


def test_unfused_attention():
    constants = free(attention__unfused=1.0)
    by = software("zero-bubble")
    found = runs(Layout(microbatch=2), on=plain(hbm=1e12), by=by)
    part = layer(found, constants)
    scores = 2 * 4096 * 4096 * 32
    products = 2 * 2 * scores * 128 / (0.6 * PEAK)
    assert part.attention == pytest.approx(products + 4 * 2 * scores / 1e12)
    assert part.attention_back == 2


@pytest.mark.parametrize(
    ("on", "by", "name"),
    [
        ("h100:8", "composer", "flash1_hopper"),
        ("a100-80g:8", "composer", "flash1_ampere"),
        ("b200:8", "nanotron", "flash2_hopper"),
        ("a100-80g:8", "nanotron", "flash2_ampere"),
        ("h100:8", "xla", "flash3_hopper"),
        ("a100-80g:8", "xla", "flash2_ampere"),
        ("v5p:2x2x2", "xla", "tpu"),
        ("v5e:8", "nanotron", "tpu"),
    ],
)
def test_which_attention_a_chip_and_software_have(on, by, name):
    found = runs(on=on, by=by)
    one = layer(found, free(**{f"attention__{name}": 0.5})).attention
    two = layer(found, free(**{f"attention__{name}": 0.25})).attention
    assert two == pytest.approx(2 * one)
    assert one == pytest.approx(2 * 4096 * 4096 * 4096 / (0.5 * found.peak_16))


def test_attention_of_eight_bit_runs_is_done_in_16():
    constants = free(attention__flash3_hopper=0.5)
    one, other = parts(constants=constants), parts(constants=constants, dtype="f8")
    assert other.attention == one.attention
    assert other.qkv == pytest.approx(one.qkv / 2, rel=1e-3)


@pytest.mark.parametrize("sequence", [False, True])
def test_traffic_of_points(sequence):
    """Reads and writes of 16 bits of a dense layer of one sequence, op by op."""
    tensor = 4
    layout = Layout(tensor=tensor, sequence=sequence)
    part = layer(
        runs(layout, on=plain(hbm=1e12), by="megatron-core"),
        free(traffic__kernels=1.0),
    )
    residual = 4096 if not sequence else 4096 / tensor
    passes = 2 * (2 + 3) * residual  # a norm: in, out; a sum: two in, one out
    passes += 3 * (4096 + 2 * 1024) / tensor  # rotary tables, and copies
    passes += (2 + 1) * 14336 / tensor  # gate and up in, their product out
    assert part.traffic == pytest.approx(passes * 2 * 4096 / 1e12)


@pytest.mark.parametrize(
    ("by", "name"),
    [("nanotron", "eager"), ("megatron-core", "kernels"), ("xla", "compiler")],
)
def test_who_fuses_decides_the_traffic(by, name):
    on = plain(hbm=1e12)
    one = layer(runs(on=on, by=by), free(**{f"traffic__{name}": 1.0})).traffic
    two = layer(runs(on=on, by=by), free(**{f"traffic__{name}": 2.0})).traffic
    assert one > 0
    assert two == pytest.approx(2 * one)


# --- what a chip holds ---


@given(
    st.sampled_from([LLAMA, MIXTRAL]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 8]),
)
def test_chips_hold_a_layer_together(decoder, tensor, expert):
    layout = Layout(data=8, tensor=tensor, expert=expert if decoder.experts else 1)
    held = float(parts(layout, decoder=decoder).params[0])
    experts = decoder.expert_params
    others = decoder.layer_params - experts
    assert held * tensor * layout.expert == pytest.approx(
        others * layout.expert + experts
    )


# --- share of peak ---


def test_shares():
    constants = free(
        matmul__hopper=0.8, matmul__training=0.9, matmul__2022=0.7, matmul__fp8=0.6,
        matmul__v5e=0.5, power__exponent=2.0,
    )  # fmt: skip
    together = [
        (run(), 0.8 * 0.9),
        (run(by="alpa"), 0.8 * 0.9 * 0.7),
        (run(dtype="f8"), 0.8 * 0.9 * 0.6),
        (run(on="h100-96g:8"), 0.8 * 0.9 * 0.714**2),
        (run(on="v5e:8"), 0.5),
    ]
    found = shares(Runs.of([each for each, _ in together]), constants)
    assert found.tolist() == pytest.approx([share for _, share in together])


# --- collectives ---


@given(st.integers(1, 64), st.sampled_from([1, 2, 8, 16]))
def test_a_group_is_placed_in_as_few_nodes_as_it_can(size, within):
    found = Runs.of([run()])
    inside, outside = placed(found, np.array([float(size)]), within)
    assert inside * outside == pytest.approx(size)
    assert inside <= max(8 / within, 1)
    assert outside == 1 or inside == max(8 / within, 1)


def test_a_group_of_one_sends_nothing():
    found = runs(on="h100:64")
    for kind in ("all_gather", "all_reduce", "all_to_all", "reduce_scatter"):
        one = np.ones(1)
        took = collective_s(found, Constants.shipped(), kind, 1e9 * one, one, one)
        assert took == 0, kind


def test_bytes_in_several_launches_wait_for_each():
    """Eight launches add seven latencies, and send as many bytes."""
    on = plain("h100:8", near=1e12)
    slow = [
        link.model_copy(
            update={
                "latency_s": link.latency_s.model_copy(update={"value": 1e-3}),
            }
        )
        for link in on.chip.links
    ]
    chip = on.chip.model_copy(update={"links": tuple(slow)})
    found = runs(on=on.model_copy(update={"chip": chip}))
    eight, one = np.full(1, 8.0), np.ones(1)

    def took(times):
        return collective_s(
            found, free(network__gpu=1.0), "all_gather", 8e9 * one, eight, one, times
        )

    assert took(1.0) == pytest.approx(7 / 8 * 8e9 / 1e12 + 7e-3)
    assert took(8.0) == pytest.approx(7 / 8 * 8e9 / 1e12 + 8 * 7e-3)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_tensor_parallelism_sums_twice_a_pass(tensor):
    """Each sum by a ring sends (n - 1) / n of the buffer twice."""
    layout = Layout(tensor=tensor, microbatch=2)
    found = moved(layout, free(network__gpu=1.0), plain(near=1e11), by="megatron-2021")
    sums = 2 * 2 * (tensor - 1) / tensor * TOKENS * 4096 * 2
    assert found.tensor == pytest.approx(sums / 1e11)
    assert found.expert == found.context == found.gather == 0


def test_tensor_parallelism_beside_products():
    constants = free(network__gpu=1.0, tensor__overlapped=0.25, tensor__compiler=0.125)
    layout, on = Layout(tensor=8), plain(near=1e11)
    exposed = moved(layout, constants, on, by="megatron-2021").tensor
    hidden = moved(layout, constants, on, by="megatron-core").tensor
    assert hidden == pytest.approx(exposed / 4)
    # A compiler's collective matmuls are those of TPUs.
    assert moved(layout, constants, on, by="xla").tensor == pytest.approx(exposed)
    tpu = plain("v5e:8", near=1e11)
    on_torus = free(network__tpu=1.0, tensor__compiler=0.125)
    all_shown = free(network__tpu=1.0, tensor__compiler=1.0)
    assert moved(layout, on_torus, tpu).tensor == pytest.approx(
        moved(layout, all_shown, tpu).tensor / 8
    )


@pytest.mark.parametrize("nodes", [1, 4])
def test_parameters_are_gathered_in_16_bits(nodes):
    chips = 8 * nodes
    on = plain(f"h100:{chips}", near=1e11, far=1e10)
    found = moved(
        Layout(data=chips, shard=chips, zero=3), free(network__gpu=1.0), on
    )  # fmt: skip
    bytes_ = 2 * LLAMA.layer_params
    ring = (chips - 1) / chips * bytes_
    # Between nodes each of a node's cards carries an eighth.
    expected = ring * 7 / 8 / 1e11 if nodes > 1 else ring / 1e11
    if nodes > 1:
        expected = max(expected, ring / 8 / 1e10)
    assert found.gather == pytest.approx(expected)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_whole_parameters_are_not_gathered(zero):
    layout = Layout(data=8, shard=8 if zero else 1, zero=zero)
    assert moved(layout, Constants.shipped(), "h100:8").gather == 0


def test_keys_and_values_of_the_other_parts_of_a_sequence():
    layout = Layout(context=4, tensor=2)
    found = moved(layout, free(network__gpu=1.0), plain(near=1e11))
    # Keys and values of 8 heads of 128, half of them on a chip, of 4096 positions.
    bytes_ = 2 * 2 * 4096 * 8 * 128 / 2
    assert found.context == pytest.approx(3 / 4 * bytes_ / 1e11)


@pytest.mark.parametrize("decoder", [MIXTRAL, MIXED], ids=["all", "some"])
def test_rows_go_to_experts_and_back(decoder):
    layout = Layout(data=8, expert=8, microbatch=2)
    found = moved(layout, free(network__gpu=1.0), plain(near=1e11), decoder=decoder)
    share = (decoder.layers - decoder.dense_layers) / decoder.layers
    rows = 2 * TOKENS * decoder.top_k * 4096 * 2 * share
    assert found.expert == pytest.approx(7 / 8 * rows / 1e11)


def test_a_dense_model_has_no_experts_to_send_to():
    assert moved(Layout(data=8, expert=8), Constants.shipped(), "h100:8").expert == 0


def test_a_free_network():
    layout = Layout(data=4, shard=4, zero=3, tensor=2)
    found = moved(layout, free(), plain(near=LARGE, far=LARGE))
    assert found.tensor + found.gather == 0
