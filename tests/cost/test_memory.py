"""Peak memory against closed forms of papers, and what must never be violated."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from autoshard.cost.decoder import Decoder
from autoshard.cost.memory import memory, too_large
from autoshard.cost.run import Layout, Recompute, Run, Runs
from autoshard.cost.software import SOFTWARE
from autoshard.plan.cluster import cluster
from autoshard.validation.remat import recompute

# GPT-3 as in Korthikanti et al. 2022, arXiv:2205.05198, table 3.
GPT3 = Decoder(96, 12288, 96, 96, 128, 49152, 51200, gated=False, tied=True)
S, B, H, A = 2048, 1, 12288, 96
MEGATRON = SOFTWARE["zero-bubble"]  # dropout, and attention that is not fused


def held(layout, decoder=GPT3, seq=S, software=MEGATRON, stage="largest", chip="h100"):
    per = 8 if layout.chips % 8 == 0 else 1
    where = cluster(f"{chip}:{layout.chips // per * per}")
    return memory(Runs.of([Run(decoder, where, layout, seq, software)]), stage=stage)


def peak(layout, **how):
    return held(layout, **how).peak_bytes[0]


# --- state: Rajbhandari et al. 2020, arXiv:1910.02054 ---

# Figure 1: GB per device of 7.5 billion parameters over 64 devices.
FIGURE_1 = {0: 120.0, 1: 31.4, 2: 16.6, 3: 1.88}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_state_is_that_of_the_zero_paper(zero):
    layout = Layout(data=64, shard=64 if zero else 1, zero=zero)
    found = held(layout, software=SOFTWARE["internevo"])  # gradients in 16 bits
    state = found.params + found.gradients + found.optimizer
    per_param = state[0] / GPT3.params
    assert per_param * 7.5 == pytest.approx(FIGURE_1[zero], rel=0.005)


def test_float32_sums_add_two_bytes_a_parameter():
    narrow, wide = (
        held(Layout(), software=SOFTWARE[name]) for name in ("internevo", "zero-bubble")
    )
    more = (wide.gradients - narrow.gradients)[0]
    assert more == pytest.approx(2 * GPT3.params)


def test_experts_are_sharded_over_fewer_replicas():
    moe = Decoder(4, 1024, 8, 8, 128, 4096, 32000, experts=8, top_k=2)
    layout = Layout(data=8, shard=8, zero=1, expert=8)
    found = held(layout, decoder=moe, software=SOFTWARE["megatron-core"])
    # One expert each, all of its state; of the rest a share.
    experts = moe.layers * moe.expert_params
    rest = moe.params - experts
    assert found.optimizer[0] == pytest.approx(12 * (experts / 8 + rest / 8))
    assert found.params[0] == pytest.approx(2 * (experts / 8 + rest))


def test_frozen_weights_have_no_gradients():
    found = held(Layout(frozen=True))
    assert found.gradients[0] == found.optimizer[0] == 0


# --- activations: Korthikanti et al. 2022, section 4 and table 2 ---


def per_layer(tensor=1, sequence=False, again=None):
    layout = Layout(
        tensor=tensor,
        sequence=sequence,
        microbatch=B,
        recompute=again or Recompute(),
    )
    return held(layout).activations[0] / GPT3.layers


SBH = S * B * H
SCORES = 5 * A * S / H
SELECTIVE = recompute("selective", MEGATRON)
FULL = recompute("full", MEGATRON)


@pytest.mark.parametrize(
    ("tensor", "sequence", "again", "formula"),
    [
        (1, False, None, SBH * (34 + SCORES)),
        (8, False, None, SBH * (10 + 24 / 8 + SCORES / 8)),
        (8, True, None, SBH / 8 * (34 + SCORES)),
        (8, False, SELECTIVE, SBH * (10 + 24 / 8)),
        (8, True, SELECTIVE, SBH * 34 / 8),
    ],
)
def test_activations_of_a_layer(tensor, sequence, again, formula):
    assert per_layer(tensor, sequence, again) == pytest.approx(formula)


def test_full_recomputation_keeps_a_layer_s_input():
    # State shared by many, so that the peak is not at the update.
    layout = Layout(data=64, shard=64, zero=3, microbatch=4, recompute=FULL)
    found = held(layout).activations[0] / GPT3.layers
    assert found == pytest.approx(2 * 4 * SBH)


def test_recomputation_needs_one_layer_whole():
    layout = Layout(data=64, shard=64, zero=3, microbatch=1, recompute=FULL)
    found = held(layout, decoder=dataclasses.replace(GPT3, vocab=1000))
    assert found.temporary[0] > SBH * (34 + SCORES - 2)


@pytest.mark.parametrize(("virtual", "more"), [(1, 1.0), (3, 1 + 7 / (8 * 3))])
def test_the_first_stage_holds_all_layers_worth(virtual, more):
    # Equation 5 and section 4.2.3: L layers' worth whatever the stages.
    layout = Layout(stage=8, virtual=virtual, microbatches=64, microbatch=1)
    found = held(layout, stage="first").activations[0]
    # Besides, what it sent is held: 2sbh for each of the microbatches.
    assert found == pytest.approx(96 * SBH * (34 + SCORES) * more, rel=0.003)


def test_zero_bubble_holds_twice_as_much():
    # Qi et al. 2024, arXiv:2401.10241, section 4: ZB-2p against ZB-1p.
    few, many = (
        held(
            Layout(stage=8, microbatches=64, schedule=schedule), stage="first"
        ).activations[0]
        for schedule in ("zb-1p", "zb-2p")
    )
    assert many == pytest.approx(2 * few)


def test_no_more_microbatches_are_held_than_there_are():
    found = [
        held(Layout(stage=8, microbatches=m), stage="first").activations[0]
        for m in (1, 2, 8, 64)
    ]
    assert found[1] == pytest.approx(2 * found[0])
    assert found[2] == pytest.approx(8 * found[0])
    assert found[3] == found[2]


# --- stages ---

SMALL = Decoder(16, 1024, 8, 8, 128, 4096, 1_000_000)


def test_the_last_stage_holds_the_logits():
    layout = Layout(stage=4, microbatches=1, microbatch=4)
    first = held(layout, decoder=SMALL, stage="first")
    largest = held(layout, decoder=SMALL)
    assert first.logits[0] == 0
    # A float32 copy, at the least.
    assert largest.logits[0] > 4 * 4 * S * SMALL.vocab
    assert largest.peak_bytes[0] > first.peak_bytes[0]


def test_the_first_stage_holds_most_where_the_vocabulary_is_small():
    small = dataclasses.replace(SMALL, vocab=1000)
    layout = Layout(stage=4, microbatches=64, microbatch=4)
    assert peak(layout, decoder=small) == peak(layout, decoder=small, stage="first")


def test_the_second_stage_may_hold_most():
    # 22 layers on 8 stages: 2 on the first, 3 on the second (Qi et al. 2024, section
    # 5.1), so 8 * 2 layers' worth there and 7 * 3 here.
    odd = dataclasses.replace(SMALL, layers=22, vocab=1000)
    layout = Layout(stage=8, microbatches=64, microbatch=4)
    first, most = (
        held(layout, decoder=odd, stage=stage) for stage in ("first", "largest")
    )
    assert most.activations[0] / first.activations[0] == pytest.approx(
        21 / 16, rel=0.02
    )


def test_stages_by_cost_have_all_layers_between_them():
    # nanotron: 16 layers and a head that costs 4 of them, on 4 stages: 5 and more on
    # the first, where the sum of costs first is above a quarter of 20.
    decoder = Decoder(16, 2048, 32, 32, 64, 8192, 131072, tied=True)
    layout = Layout(stage=4, microbatches=64)
    nanotron = SOFTWARE["nanotron"]
    found = held(layout, decoder=decoder, software=nanotron, stage="first")
    table = decoder.vocab * decoder.embed
    layers = (found.params[0] / 2 - table) / decoder.layer_params
    assert layers == pytest.approx(6)


# --- what must never be violated ---

BASE = Layout(
    data=8,
    shard=8,
    zero=1,
    tensor=2,
    sequence=True,
    stage=2,
    microbatch=16,
    microbatches=8,
)


@pytest.mark.parametrize("software", sorted(SOFTWARE))
@pytest.mark.parametrize(
    "less",
    [
        {"shard": 16, "data": 16},
        {"tensor": 4},
        {"microbatch": 1},
        {"recompute": FULL},
        {"context": 2},
        {"stage": 4},
    ],
    ids=lambda less: next(iter(less)),
)
def test_spreading_more_takes_less(software, less):
    fewer = dataclasses.replace(BASE, **less)
    how = {"software": SOFTWARE[software]}
    assert peak(fewer, **how) < peak(BASE, **how)


@pytest.mark.parametrize("software", sorted(SOFTWARE))
def test_each_zero_level_takes_no_more_state(software):
    states = []
    for zero in (1, 2, 3):
        layout = dataclasses.replace(BASE, shard=8, zero=zero)
        found = held(layout, software=SOFTWARE[software])
        states.append((found.params + found.gradients + found.optimizer)[0])
    assert states == sorted(states, reverse=True)


def test_what_is_counted_is_in_order():
    for name in SOFTWARE:
        found = held(BASE, software=SOFTWARE[name])
        assert 0 < found.allocated_bytes[0] <= found.reserved_bytes[0]
        assert found.reserved_bytes[0] < found.peak_bytes[0]


def test_runs_do_not_touch_each_other():
    layouts = [BASE, Layout(), Layout(data=64, shard=64, zero=3)]
    runs = [Run(GPT3, cluster(f"h100:{x.chips}"), x, S) for x in layouts]
    together = memory(Runs.of(runs)).peak_bytes
    alone = [memory(Runs.of([run])).peak_bytes[0] for run in runs]
    np.testing.assert_allclose(together, alone)


# --- what fits ---

LLAMA_8B = Decoder(32, 4096, 32, 8, 128, 14336, 128256)


@pytest.mark.parametrize(
    ("chips", "fails"),
    [(1, True), (8, False)],  # 16 bytes of each of 8 billion parameters: 128 GB
)
def test_too_large_for_one_but_not_for_eight(chips, fails):
    zero = 3 if chips > 1 else 0
    layout = Layout(data=chips, shard=chips, zero=zero, recompute=FULL)
    run = Run(LLAMA_8B, cluster(f"h100:{chips}"), layout, 4096)
    assert bool(too_large(Runs.of([run]))[0]) is fails


def test_a_larger_chip_holds_what_a_smaller_one_does_not():
    layout = Layout(data=8, shard=8, zero=1, recompute=FULL)
    fails = [
        bool(too_large(Runs.of([Run(LLAMA_8B, cluster(f"{c}:8"), layout, 4096)]))[0])
        for c in ("a100-40g", "b200")
    ]
    assert fails == [True, False]
