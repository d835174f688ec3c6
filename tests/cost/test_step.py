"""One step: arithmetic by hand, pipelines played out, and laws of scaling."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.runs import LLAMA, free, plain, run, runs, software, step
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.cost.constants import Constants
from autoshard.cost.decoder import Decoder
from autoshard.cost.run import Layout, Recompute, Run, Runs
from autoshard.cost.software import SOFTWARE
from autoshard.cost.step import StepTime, _bubble, _stages, predict
from autoshard.plan.cluster import cluster

PEAK = 989.4e12  # NVIDIA H100 datasheet (SXM5), dense bf16
ROWS = [f.name for f in dataclasses.fields(StepTime)]
MIXTRAL = Decoder(32, 4096, 32, 8, 128, 14336, 32000, experts=8, top_k=2)
SHIPPED = Constants.shipped()


def seconds(layout=None, constants=None, **kwargs):
    return float(step(layout, constants, **kwargs).step_s[0])


# --- only products take time ---

LAYOUTS = {
    "one chip": Layout(microbatch=2, microbatches=4),
    "data": Layout(data=8, microbatch=1),
    "fsdp": Layout(data=8, shard=8, zero=3, microbatch=1, microbatches=3),
    "tensor": Layout(data=2, tensor=4, sequence=True),
    "context": Layout(context=8),
    "all": Layout(data=2, tensor=2, context=2, shard=4, zero=1, microbatches=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("decoder", [LLAMA, MIXTRAL], ids=["dense", "experts"])
def test_products_alone_take_six_flops_a_parameter_and_token(name, decoder):
    layout = LAYOUTS[name]
    what = run(layout, decoder=decoder, on=plain())
    router = decoder.layers * decoder.experts * decoder.embed  # too thin to count
    met = decoder.layers * decoder.active_layer_params + decoder.vocab * decoder.embed
    flops = 6 * (met - router) * what.tokens
    took = float(predict(Runs.of([what]), free()).step_s[0])
    assert took == pytest.approx(flops / layout.chips / PEAK)


def test_attention_recomputes_its_scores():
    """Published FLOPs count four products backward; a fused kernel does five."""
    constants = free(attention__flash3_hopper=0.5)
    took = step(Layout(microbatch=2), constants, on=plain()).attention
    seq = 4096
    counted = LLAMA.model_flops_per_token(seq) - LLAMA.model_flops_per_token(0)
    assert took == pytest.approx((2 + 5) / (2 + 4) * counted * 2 * seq / (0.5 * PEAK))


def test_full_recomputation_is_a_forward_pass_more():
    once = step(Layout(), free(), on=plain(), by="megatron-core").products
    layout = Layout(recompute=Recompute.full())
    again = step(layout, free(), on=plain(), by="megatron-core").products
    assert again == pytest.approx(once * 4 / 3)


PARTS = {
    "qkv": 4096 * (4096 + 2 * 1024),
    "out": 4096 * 4096,
    "up": 4096 * 2 * 14336,
    "down": 4096 * 14336,
}


@pytest.mark.parametrize("part", PARTS)
def test_each_product_is_recomputed_by_itself(part):
    once = step(Layout(), free(), on=plain()).products
    layout = Layout(recompute=Recompute(**{part: 0.5}))
    more = step(layout, free(), on=plain()).products - once
    assert more == pytest.approx(0.5 * 32 * 2 * 4096 * PARTS[part] / PEAK)


@pytest.mark.parametrize(
    ("part", "passes"), [("attention", 3.5), ("traffic", 3)]
)  # fmt: skip
def test_attention_and_traffic_are_recomputed(part, passes):
    once = getattr(step(Layout()), part)
    layout = Layout(recompute=Recompute(**{part: 1.0}))
    assert getattr(step(layout), part) == pytest.approx(once * (passes + 1) / passes)


def test_collectives_are_recomputed():
    once = step(Layout(tensor=8)).collectives
    again = step(Layout(tensor=8, recompute=Recompute(collectives=1.0)))
    assert again.collectives == pytest.approx(once * 3 / 2)


@pytest.mark.parametrize("shard", [1, 8])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_frozen_weights_have_no_gradients_and_no_update(zero, shard):
    """Two products for three, of layers and head; what is gathered is not scattered."""
    layout = Layout(
        data=64, shard=64 // shard if zero else 1, zero=zero, microbatches=2
    )
    frozen = dataclasses.replace(layout, frozen=True)
    constants = free(network__gpu=1.0, optimizer__fused=1.0, gather__interference=1.0)
    on = plain("h100:64")
    took, trained = (
        step(each, constants, on=on, by="megatron-core") for each in (frozen, layout)
    )
    assert took.products == pytest.approx(trained.products * 2 / 3)
    assert took.head == pytest.approx(trained.head * 2 / 3)
    assert took.collectives == pytest.approx(trained.collectives * 2 / 3)
    assert took.reduction + took.update == pytest.approx(0, abs=1e-20)


# --- pipelines, event by event ---


def play(orders, follows, takes):
    """End of the last of all tasks, each device doing its own in order.

    Args:
        orders: Tasks of each device.
        follows: Task -> tasks whose results it needs.
        takes: Task -> seconds.
    """
    ends, waiting = {}, [list(order) for order in orders]
    clocks = [0.0] * len(orders)
    while any(waiting):
        before = len(ends)
        for device, order in enumerate(waiting):
            while order and all(need in ends for need in follows(order[0])):
                task = order.pop(0)
                ready = max((ends[need] for need in follows(task)), default=0.0)
                clocks[device] = max(clocks[device], ready) + takes(task)
                ends[task] = clocks[device]
        assert len(ends) > before, "the schedule waits for itself"
    return max(ends.values())


def interleaved(stages, virtual, count):
    """Order of each stage: Megatron-LM's, which is 1F1B where there is one part.

    A task is ("F" or "B", microbatch, part of all `stages * virtual` parts).
    """
    orders = []
    for stage in range(stages):

        def forward(k, stage=stage):
            part = k % (stages * virtual) // stages
            batch = k // (stages * virtual) * stages + k % stages
            return ("F", batch, part * stages + stage)

        def backward(k, stage=stage):
            part = virtual - 1 - k % (stages * virtual) // stages
            batch = k // (stages * virtual) * stages + k % stages
            return ("B", batch, part * stages + stage)

        tasks = count * virtual
        if virtual == 1:
            warm = stages - stage - 1
            orders.append(one_by_one(stage, warm, count))
            continue
        warm = min(2 * (stages - stage - 1) + (virtual - 1) * stages, tasks)
        order = [forward(k) for k in range(warm)]
        for k in range(warm, tasks):
            order += [forward(k), backward(k - warm)]
        order += [backward(k) for k in range(tasks - warm, tasks)]
        orders.append(order)
    return orders


def one_by_one(stage, warm, count):
    warm = min(warm, count)
    order = [("F", k, stage) for k in range(warm)]
    for k in range(warm, count):
        order += [("F", k, stage), ("B", k - warm, stage)]
    return order + [("B", k, stage) for k in range(count - warm, count)]


def needs(parts):
    def follows(task):
        kind, batch, part = task
        if kind == "F":
            return [("F", batch, part - 1)] if part else []
        after = [("B", batch, part + 1)] if part + 1 < parts else []
        return [("F", batch, part), *after]

    return follows


def played(stages, virtual, count, costs):
    """Seconds of a step whose parts take `costs`, a third of them forward."""
    return play(
        interleaved(stages, virtual, count),
        needs(stages * virtual),
        lambda task: costs[task[2]] * (1 / 3 if task[0] == "F" else 2 / 3),
    )


def piped(layout, layers, each=1.0, head=0.0, by="megatron-core"):
    """Seconds of the pipeline's stages and bubble, a layer being `each` seconds."""
    decoder = dataclasses.replace(LLAMA, layers=layers)
    found = runs(layout, decoder=decoder, on="h100:64", by=by)
    stage = _stages(found, np.full(1, each), np.full(1, head))
    mean = np.full(1, (layers * each + head) / layout.stage)
    bubble = _bubble(found, SHIPPED, stage, mean)
    return float((layout.microbatches * stage + bubble)[0])


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 16])
def test_1f1b_as_played(stages, count):
    layout = Layout(stage=stages, microbatches=count)
    costs = [3.0] * stages
    assert piped(layout, 3 * stages) == pytest.approx(played(stages, 1, count, costs))


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("virtual", [2, 3, 4])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_interleaved_1f1b_as_played(stages, virtual, rounds):
    count = stages * rounds
    layout = Layout(
        stage=stages, virtual=virtual, microbatches=count, schedule="interleaved"
    )
    costs = [1.0] * (stages * virtual)
    found = played(stages, virtual, count, costs)
    assert piped(layout, stages * virtual) == pytest.approx(found)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("virtual", [1, 2, 4])
@pytest.mark.parametrize("head", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_pipeline_with_a_head_as_played(stages, virtual, head, rounds):
    """All wait for the stage with the head; it waits for the others once."""
    count = stages * rounds
    layout = Layout(stage=stages, virtual=virtual, microbatches=count)
    costs = [4.0] * (stages * virtual - 1) + [4.0 + head]
    found = played(stages, virtual, count, costs)
    layers = 4 * stages * virtual
    assert piped(layout, layers, head=head) == pytest.approx(found)


def even_slots(layers, stages, each, head):
    """Slowest stage where the embedding and the head have a layer's place each."""
    size = 1  # of a stage, the least that holds all
    while size * stages < layers + 2:
        size += 1
    first, between = [0.0] + [each] * (size - 1), [each] * size
    last = [each] * (size - 1) + [head]
    return max(sum(first), sum(between), sum(last))


@pytest.mark.parametrize(
    ("layers", "stages"),
    [(70, 12), (10, 4), (22, 8), (126, 16), (11, 4), (31, 8), (32, 5)],
)
@pytest.mark.parametrize("head", [0.25, 1.0, 3.0])
def test_layers_that_do_not_divide(layers, stages, head):
    layout = Layout(stage=stages)
    decoder = dataclasses.replace(LLAMA, layers=layers)
    found = runs(layout, decoder=decoder, on="h100:64")
    slowest = _stages(found, np.full(1, 2.0), np.full(1, 2.0 * head))
    assert slowest == even_slots(layers, stages, 2.0, 2.0 * head)


def best_cut(costs, stages):
    """Least time of the slowest of so many neighbouring parts, by trying all."""
    ends = range(1, len(costs))
    return min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs))))
        for cuts in itertools.combinations(ends, stages - 1)
    )


@given(st.integers(1, 9), st.integers(1, 5), st.floats(0.1, 8.0))
def test_balanced_stages_are_within_a_layer_of_the_best_cut(layers, stages, head):
    stages = min(stages, layers)
    decoder = dataclasses.replace(LLAMA, layers=layers)
    found = runs(Layout(stage=stages), decoder=decoder, on="h100:64", by="nanotron")
    slowest = float(_stages(found, np.full(1, 1.0), np.full(1, head))[0])
    best = best_cut([1.0] * layers + [head], stages)
    # No cut beats it; layers are whole, so a cut may miss it by one of them.
    assert slowest <= best * (1 + 1e-12)
    assert best <= slowest + 1.0 + 1e-12


@given(st.integers(1, 40), st.integers(1, 16), st.floats(0.0, 8.0), st.booleans())
def test_the_slowest_stage_is_no_faster_than_the_average(layers, stages, head, even):
    decoder = dataclasses.replace(LLAMA, layers=layers)
    by = software(stages="balanced" if even else "by layers")
    found = runs(Layout(stage=stages), decoder=decoder, on="h100:64", by=by)
    slowest = _stages(found, np.full(1, 1.0), np.full(1, head))
    assert slowest >= (layers + head) / stages * (1 - 1e-12)


def bubble_share(schedule, stages, count):
    layout = Layout(stage=stages, microbatches=count, schedule=schedule)
    one = np.ones(1)
    return float(_bubble(runs(layout, on="h100:64"), SHIPPED, one, one)[0])


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-1p", "zb-2p"])
@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_zero_bubble_schedules_fill_some_of_the_bubble(schedule, stages):
    shares = [bubble_share(schedule, stages, count) for count in range(1, 80)]
    assert all(0 < share < stages - 1 for share in shares)
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-1p", "zb-2p"])
@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_one_microbatch_has_little_to_fill_the_bubble_with(schedule, stages):
    """It goes through all stages and back; only its weights' gradients are late."""
    third = 1 / 3
    busy = 3 * third
    through = stages * third + stages * third + third
    assert bubble_share(schedule, stages, 1) >= (through - busy) * (1 - 1e-12)


@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_zb_h1_leaves_a_third(stages):
    """Qi et al. 2024, table 2: (p - 1)(T_F + T_B - T_W), with each a third."""
    third = 1 / 3
    left = (stages - 1) * (third + third - third)
    assert bubble_share("zb-h1", stages, 16 * stages) == pytest.approx(left)


@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_schedules_that_hold_more_wait_less(stages):
    names = ["1f1b", "zb-h1", "zb-1p", "zb-2p"]
    shares = [bubble_share(name, stages, 16 * stages) for name in names]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("virtual", [1, 3])
def test_stages_send_activations_and_gradients(virtual):
    """16 bits of each position both ways; each part of a stage sends its own."""
    layout = Layout(stage=2, virtual=virtual, microbatch=2, microbatches=5)
    on = plain("h100:8", near=1e10)
    constants = free(network__point_to_point=1.0)
    silent = step(layout, free(), on=on).pipeline
    sent = step(layout, constants, on=on).pipeline - silent
    assert sent == pytest.approx(5 * virtual * 2 * (2 * 2 * 4096 * 4096) / 1e10)


def test_stages_of_a_sharded_residual_send_their_shards():
    on, constants = plain("h100:64", far=1e9), free(network__point_to_point=1.0)

    def sent(sequence):
        layout = Layout(data=4, tensor=8, stage=2, sequence=sequence)
        silent = step(layout, free(), on=on).pipeline
        return step(layout, constants, on=on).pipeline - silent

    assert sent(True) == pytest.approx(sent(False) / 8)


# --- gradients and the update ---


@pytest.mark.parametrize("nodes", [1, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_summed_at_the_end(nodes, tied):
    """A ring sends (n - 1) / n of the gradients twice; a node's cards share them."""
    decoder = dataclasses.replace(LLAMA, tied=tied)
    near, far, chips = 1e12, 1e9, 8 * nodes
    on = plain(f"h100:{chips}", near=near, far=far)
    took = step(
        Layout(data=chips),
        free(network__gpu=1.0),
        decoder=decoder,
        on=on,
        by="megatron-2021",
    ).reduction
    ring = 2 * (chips - 1) / chips * 4 * decoder.params
    assert took == pytest.approx(ring / 8 / far if nodes > 1 else ring / near)


def test_sharded_updates_are_gathered_in_16_bits():
    """A sum of 4 bytes a parameter scattered, and 2 of the updated ones gathered."""
    on, constants = plain(near=1e10), free(network__gpu=1.0)
    layout = Layout(data=8, shard=8, zero=1)
    took = step(layout, constants, on=on, by="megatron-2021").reduction
    assert took == pytest.approx(7 / 8 * (4 + 2) * LLAMA.params / 1e10)


def test_a_backward_pass_hides_gradients():
    on = plain(near=1e12)
    layout = Layout(data=8, microbatch=2)
    all_ = free(network__gpu=1.0, data__exposed=1.0)
    long = step(layout, all_, on=on).reduction
    hidden = step(layout, free(network__gpu=1.0, data__hidden=0.5), on=on).reduction
    back = 2 / 3 * float(step(layout, free(), on=on).products[0])
    assert hidden == pytest.approx(max(float(long[0]) - 0.5 * back, 0))
    least = free(network__gpu=1.0, data__hidden=1.0, data__exposed=0.25)
    assert step(layout, least, on=on).reduction == pytest.approx(long / 4)


def test_each_rank_broadcasts_what_it_updated():
    layout = Layout(data=64, shard=64, zero=1)
    constants = free(data__broadcast_s=0.5)
    took = step(layout, constants, on=plain("h100:64"), by="internevo")
    assert took.reduction == pytest.approx(64 * 0.5)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("tensor", "stage"), [(1, 1), (4, 1)])
def test_update_moves_20_bytes_a_parameter(zero, tensor, stage):
    """A gradient, two moments in and out, and the weight: 4 + 4 * 4, of 32 bits."""
    layout = Layout(
        data=2, shard=2 if zero else 1, zero=zero, tensor=tensor, stage=stage
    )
    took = step(
        layout, free(optimizer__fused=1.0), on=plain(hbm=1e12), by="megatron-core"
    ).update
    owned = LLAMA.params / tensor / stage / (2 if zero else 1)
    assert took == pytest.approx(20 * owned / 1e12)


@pytest.mark.parametrize("expert", [1, 2, 8])
@pytest.mark.parametrize("zero", [1, 3])
def test_chips_update_each_parameter_once_together(expert, zero):
    layout = Layout(data=8, shard=8, zero=zero, expert=expert)
    took = step(
        layout,
        free(optimizer__fused=1.0),
        decoder=MIXTRAL,
        on=plain(hbm=1e12),
        by="megatron-core",
    ).update
    assert 8 * took == pytest.approx(20 * MIXTRAL.params / 1e12)


@pytest.mark.parametrize("expert", [1, 2, 8])
def test_gradients_of_experts_are_summed_over_their_replicas(expert):
    layout = Layout(data=8, expert=expert)
    on, constants = plain(near=1e10), free(network__gpu=1.0)
    took = step(layout, constants, decoder=MIXTRAL, on=on, by="megatron-2021").reduction
    experts = 32 * 8 * 3 * 4096 * 14336
    sent = 2 * 7 / 8 * 4 * (MIXTRAL.params - experts)
    alike = 8 / expert
    sent += 2 * (alike - 1) / alike * 4 * experts / expert
    assert took == pytest.approx(sent / 1e10)


def test_stages_update_their_own_layers_alone():
    decoder = dataclasses.replace(LLAMA, vocab=1)
    constants = free(optimizer__fused=1.0)
    for zero in (1, 3):
        one, four = (
            step(
                Layout(data=2, shard=2, zero=zero, stage=stage),
                constants,
                decoder=decoder,
                on=plain(hbm=1e12),
                by="megatron-core",
            ).update
            for stage in (1, 4)
        )
        assert four == pytest.approx(one / 4, rel=1e-5)


@pytest.mark.parametrize(("by", "bytes_"), [("nanotron", 12), ("megatron-core", 8)])
def test_gradients_of_microbatches_are_added_up(by, bytes_):
    """In float32: read and written, and the gradient read where it is not fused."""
    decoder = dataclasses.replace(LLAMA, tied=True)
    on = plain(hbm=1e12)
    took = step(Layout(microbatches=5), free(), decoder=decoder, on=on, by=by).update
    assert took == pytest.approx(5 * bytes_ * decoder.params / 1e12)
    assert step(Layout(), free(), decoder=decoder, on=on, by=by).update == 0


def test_slices_of_a_tpu_sum_over_the_data_center():
    constants = free(network__dcn=1.0)
    layout = Layout(data=8, shard=8, zero=3)
    on = plain("v5e:8", far=1e9)
    assert step(layout, constants, on=on).reduction == 0
    took = step(layout, constants, on=on, slices=2)
    back = 2 / 3 * took.products
    sums = 2 * 2 * 32 * LLAMA.layer_params / 8 / 1e9
    assert took.reduction == pytest.approx(np.maximum(sums - back / 2, 0) + sums / 10)


@pytest.mark.parametrize("zero", [0, 1])
def test_replicas_on_a_torus_sum_over_both_directions_of_a_ring(zero):
    """Float32 gradients; sharded state gathers what it updated in 16 bits."""
    constants = free(network__tpu=1.0, gather__interference_tpu=1.0)
    layout = Layout(data=8, shard=8 if zero else 1, zero=zero)
    took = step(layout, constants, on=plain("v5e:8", near=1e9)).reduction
    each = 4 + 2 if zero else 2 * 4
    assert took == pytest.approx(7 / 8 * each * LLAMA.params / (2 * 1e9))


def test_groups_of_shards_on_a_torus_sum_between_them():
    decoder = dataclasses.replace(LLAMA, vocab=1)
    constants = free(network__tpu=1.0, gather__interference_tpu=1.0)
    layout = Layout(data=64, shard=8, zero=3)
    on = plain("v5e:64", near=1e9)
    took = step(layout, constants, decoder=decoder, on=on).reduction
    shard = 4 * 32 * LLAMA.layer_params / 8
    assert took == pytest.approx(2 * 7 / 8 * shard / (2 * 1e9))


def test_groups_of_shards_sum_between_them():
    """Each chip's shard of float32 gradients, by a ring over the groups."""
    decoder = dataclasses.replace(LLAMA, vocab=1)
    constants = free(network__gpu=1.0, data__exposed=1.0)
    on = plain("h100:64", near=1e15, far=1e9)
    layout = Layout(data=64, shard=8, zero=3)
    took = step(layout, constants, decoder=decoder, on=on).reduction
    shard = 4 * 32 * LLAMA.layer_params / 8
    assert took == pytest.approx(2 * 7 / 8 * shard / 1e9)


# --- the host ---


def test_a_small_model_waits_for_the_host():
    tiny = Decoder(32, 64, 1, 1, 64, 64, 64)
    constants = free(host__layer_s=1e-3)
    layout = Layout(microbatches=4)
    took = step(layout, constants, decoder=tiny, on=plain(), seq=8, by="nanotron")
    # A backward pass launches twice what a forward pass does.
    launches = 4 * 32 * (1 + 2) * 1e-3
    assert took.host + took.products + took.head == pytest.approx(launches)


def test_a_large_model_hides_the_host():
    took = step(Layout(), free(host__layer_s=1e-4), on=plain(), by="nanotron")
    assert took.host == 0


def test_compiled_programs_do_not_wait_for_the_host():
    tiny = Decoder(32, 64, 1, 1, 64, 64, 64)
    assert step(Layout(), decoder=tiny, seq=8, by="xla").host == 0


# --- laws ---

CHIPS = ["h100:8", "a100-80g:64", "v5e:8", "b200:8", "v100-32g:8"]


@st.composite
def drawn(draw):
    """A run of any layout, software and chip."""
    power = st.sampled_from([1, 2, 4, 8])
    data, context = draw(power), draw(st.sampled_from([1, 2]))
    zero = draw(st.integers(0, 3))
    stage = draw(power)
    chip = draw(st.sampled_from(CHIPS))
    layout = Layout(
        data=data,
        shard=data * context if zero else 1,
        zero=zero,
        tensor=draw(power),
        sequence=draw(st.booleans()),
        context=context,
        expert=draw(st.sampled_from([1, data])),
        stage=stage,
        virtual=draw(st.sampled_from([1, 2])) if stage > 1 else 1,
        schedule=draw(st.sampled_from(["1f1b", "zb-h1", "zb-1p", "zb-2p"])),
        microbatch=draw(st.integers(1, 4)),
        microbatches=draw(st.integers(1, 32)),
        recompute=draw(st.sampled_from([Recompute(), Recompute.full()])),
        frozen=draw(st.booleans()),
    )
    decoder = draw(st.sampled_from([LLAMA, MIXTRAL]))
    by = SOFTWARE[draw(st.sampled_from(sorted(SOFTWARE)))]
    dtype = "f16" if chip.startswith("v100") else "bf16"
    seq = draw(st.sampled_from([512, 4096]))
    return Run(decoder, cluster(chip), layout, seq, by, dtype)


def total(what, constants=None):
    return float(predict(Runs.of([what]), constants).step_s[0])


@given(drawn())
def test_rows_are_times_and_add_up(what):
    took = predict(Runs.of([what]))
    rows = [float(getattr(took, name)[0]) for name in ROWS]
    assert all(np.isfinite(row) for row in rows)
    assert min(rows) >= 0
    assert sum(rows) == pytest.approx(float(took.step_s[0]))


@given(drawn())
def test_no_run_beats_the_peak(what):
    met = what.decoder.layers * what.decoder.active_layer_params
    kept = 4 if what.layout.frozen else 6
    router = what.decoder.layers * what.decoder.experts * what.decoder.embed
    flops = kept * (met - router) * what.tokens
    peak = what.cluster.peak_flops_per_s(what.dtype) * what.layout.chips
    assert total(what) > flops / peak


@given(drawn())
def test_one_chip_sends_nothing(what):
    layout = dataclasses.replace(
        what.layout, data=1, shard=1, tensor=1, context=1, expert=1, stage=1, virtual=1
    )
    took = predict(Runs.of([dataclasses.replace(what, layout=layout)]))
    for name in ("collectives", "pipeline", "bubble", "reduction"):
        assert getattr(took, name) == 0, name


@given(drawn())
def test_twice_the_layers_are_twice_the_layers_time(what):
    layers = 2 * what.decoder.layers
    twice = dataclasses.replace(
        what, decoder=dataclasses.replace(what.decoder, layers=layers)
    )
    one, two = predict(Runs.of([what])), predict(Runs.of([twice]))
    for name in ("products", "attention", "traffic", "collectives"):
        assert getattr(two, name) == pytest.approx(2 * getattr(one, name)), name
    assert two.head == pytest.approx(one.head)


@given(drawn(), st.integers(2, 5))
def test_so_many_times_the_microbatches(what, times):
    count = times * what.layout.microbatches
    more = dataclasses.replace(
        what, layout=dataclasses.replace(what.layout, microbatches=count)
    )
    one, many = predict(Runs.of([what])), predict(Runs.of([more]))
    for name in ("products", "attention", "traffic", "head", "collectives", "host"):
        assert getattr(many, name) == pytest.approx(times * getattr(one, name)), name
    assert many.bubble <= one.bubble * (1 + 1e-12)


@given(drawn(), st.sampled_from([2, 4]))
def test_a_batch_in_more_cuts_is_computed_no_faster(what, cuts):
    """Smaller products reach less of the peak, and all else is as much."""
    layout = what.layout
    cut = dataclasses.replace(
        layout,
        microbatch=layout.microbatch / cuts,
        microbatches=layout.microbatches * cuts,
    )
    one = predict(Runs.of([what]))
    many = predict(Runs.of([dataclasses.replace(what, layout=cut)]))
    for name in ("products", "attention", "traffic", "head", "collectives", "update"):
        least = getattr(one, name) * (1 - 1e-9)
        assert (getattr(many, name) >= least).all(), name


@given(drawn(), st.sampled_from(["peak", "hbm", "links"]))
def test_a_better_chip_is_no_slower(what, part):
    """Of twice the peak, twice the memory bandwidth, or twice the network's."""
    chip = what.cluster.chip

    def twice(figure):
        return figure.model_copy(update={"value": 2 * figure.value})

    changes = {
        "peak": {
            "peak_flops_per_s": {
                name: twice(peak) for name, peak in chip.peak_flops_per_s.items()
            }
        },
        "hbm": {"hbm_bytes_per_s": twice(chip.hbm_bytes_per_s)},
        "links": {
            "links": tuple(
                link.model_copy(update={"bytes_per_s": twice(link.bytes_per_s)})
                for link in chip.links
            )
        },
    }[part]
    better = what.cluster.model_copy(update={"chip": chip.model_copy(update=changes)})
    one = predict(Runs.of([what]))
    two = predict(Runs.of([dataclasses.replace(what, cluster=better)]))
    if two.host > 0:
        # What saves no time, as the host is waited for, leaves less to hide behind.
        assert two.step_s - two.reduction <= (one.step_s - one.reduction) * (1 + 1e-9)
    else:
        # A shorter backward pass may hide less, but never by more than it saves.
        assert two.step_s <= one.step_s * (1 + 1e-9)


@given(drawn())
def test_recomputing_saves_no_time(what):
    """It may hide behind the host, and sums of gradients behind it."""

    def recomputed(how):
        layout = dataclasses.replace(what.layout, recompute=how)
        took = predict(Runs.of([dataclasses.replace(what, layout=layout)]))
        return took.step_s - took.reduction

    assert recomputed(Recompute()) <= recomputed(Recompute.full()) * (1 + 1e-12)


@settings(max_examples=20)
@given(st.lists(drawn(), min_size=2, max_size=6), st.randoms())
def test_runs_are_predicted_each_by_itself(several, random):
    together = predict(Runs.of(several)).step_s
    assert together.tolist() == pytest.approx([total(each) for each in several])
    order = list(range(len(several)))
    random.shuffle(order)
    shuffled = predict(Runs.of([several[i] for i in order])).step_s
    assert shuffled.tolist() == pytest.approx([float(together[i]) for i in order])


def test_constants_are_those_shipped():
    assert seconds(Layout()) == seconds(Layout(), SHIPPED)
    assert seconds(Layout()) != seconds(Layout(), Constants.priors())
