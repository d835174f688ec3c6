"""Stages of a traced program: against deeper programs, all cuts, and arithmetic."""

import itertools

import numpy as np
import pytest

import autoshard as ash
from autoshard import api
from autoshard.cost import Pricer
from autoshard.cost.collectives import Meshes
from autoshard.cost.constants import Constants
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.rates import Rates
from autoshard.ir.mesh import AXES
from autoshard.plan.schema import ModelRef
from autoshard.plan.sharded import Layout
from autoshard.propagate import propagate
from autoshard.search.reading import Sketch
from autoshard.search.space import structures

BATCH, SEQ = 16, 64
H100 = ash.cluster("h100:16")


def pricer(name="llama3-tiny", strategy="fsdp", remat="none", layers=None):
    ref = ModelRef(
        model=name, batch=BATCH, seq=SEQ, optimizer="adamw", learning_rate=1e-3,
        dtype="bf16",
    )  # fmt: skip
    resolved = api.resolve(ref, layers=layers) if layers else api.resolve(ref)
    step = resolved.step.with_schedule(microbatches=1, remat=remat)
    policy = next(iter(structures(api.load_strategy(strategy))))
    sketch = Sketch.of(step, (resolved.batch,), policy)
    return Pricer(
        propagate(sketch.shallow.traced, sketch.shallow.classes, Layout.of(policy)),
        sketch.shallow.work,
    )


def row(**sizes):
    return np.array([[sizes.get(axis, 1) for axis in AXES]], dtype=np.int64)


def priced(found, how, cuts=4, **sizes):
    (prices,) = found.price_stages(H100, row(**sizes), np.array([float(cuts)]), [how])
    assert prices.cut.valid[0]
    return prices


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_block_takes_what_one_block_more_takes(remat):
    meshes, cuts = Meshes(H100, row(fsdp=16)), np.ones(1)
    rates = Rates.of(H100, Constants.shipped())
    few, many = (pricer(layers=n, remat=remat) for n in (4, 7))
    parts = many.timing.parts(meshes, cuts)
    block_s = (parts.matmul + parts.other)[0, 0] / 7
    more_s = sum(many.timing.compute_s(meshes, cuts, rates)) - sum(
        few.timing.compute_s(meshes, cuts, rates)
    )
    assert block_s == pytest.approx(float(more_s[0]) / 3, rel=1e-3)


def test_parts_add_up_to_the_step_of_one_stage():
    found = pricer(strategy="fsdp-tp")
    sizes, cuts = row(fsdp=8, tensor=2), np.array([2.0])
    parts = found.timing.parts(Meshes(H100, sizes), cuts)
    one = found.price(H100, sizes, cuts)
    assert parts.busy.sum() == pytest.approx(float(one.step_s[0]), rel=1e-12)


@pytest.mark.parametrize("vocab", ["ends", "spread"])
@pytest.mark.parametrize("stages", [2, 4])
def test_no_cut_into_whole_blocks_is_faster(stages, vocab):
    found = pricer(layers=7)
    best = priced(found, Pipeline("1f1b", 1, vocab), stage=stages, fsdp=2)
    every = [
        priced(found, Pipeline("1f1b", 1, vocab, counts), stage=stages, fsdp=2)
        for counts in itertools.product(range(1, 7), repeat=stages)
        if sum(counts) == 7
    ]
    assert len(every) > 5
    fastest = min(float(p.step_s[0]) for p in every)
    assert float(best.step_s[0]) == pytest.approx(fastest, rel=1e-9)
    blocks = best.cut.blocks_of(0, 7, stages)
    again = priced(found, Pipeline("1f1b", 1, vocab, blocks), stage=stages, fsdp=2)
    assert float(again.step_s[0]) == pytest.approx(fastest, rel=1e-9)
    assert float(again.peak_bytes[0]) == pytest.approx(float(best.peak_bytes[0]))


def state_bytes(found, wanted):
    """Bytes of parameters and both moments, of those leaves that are wanted."""
    inputs = zip(found.program.inputs, found.sharded.traced.inputs, strict=True)
    return sum(
        found.program.values[v].bytes_
        for v, info in inputs
        if info.state in ("params", "optimizer") and wanted(info.path)
    )


@pytest.mark.parametrize("vocab", ["ends", "spread"])
def test_a_stage_holds_its_blocks_and_its_end(vocab):
    found = pricer(layers=8)
    prices = priced(found, Pipeline("1f1b", 1, vocab, (1, 2, 2, 3)), stage=4, data=4)
    meshes = Meshes(H100, row(stage=4, data=4))
    blocks = state_bytes(found, lambda path: "/blocks/" in path)
    first = state_bytes(found, lambda path: path.endswith("embedding"))
    last = state_bytes(found, lambda path: path.endswith(("head", "final_norm/scale")))
    assert blocks > 0 < first < blocks
    ends = [(first + last) / 4] * 4 if vocab == "spread" else [first, 0, 0, last]
    for stage, count, end in zip(prices.cut.stages, (1, 2, 2, 3), ends, strict=True):
        held = found.liveness.state_bytes(meshes, stage.share)
        told = float((held["params"] + held["optimizer"])[0])
        assert told == pytest.approx(count / 8 * blocks + end, abs=64)  # the counters


def test_activations_grow_with_what_is_in_flight():
    found = pricer(layers=8, remat="full")
    (sent,) = found.work.segments.sent
    # The first stage has most of the blocks, so that the peak is there.
    hows = [Pipeline(n, 1, "ends", (5, 1, 1, 1)) for n in ("1f1b", "gpipe", "zb-h2")]
    peak = {
        how.schedule: float(priced(found, how, cuts=16, stage=4, data=4).peak_bytes[0])
        for how in hows
    }
    # Of one microbatch it stashes the residual before each of its five blocks.
    stash = 5 * found.program.values[sent].bytes_ / 4 / 16
    assert peak["gpipe"] - peak["1f1b"] == pytest.approx((16 - 4) * stash, rel=0.01)
    assert peak["zb-h2"] - peak["1f1b"] == pytest.approx((8 - 4) * stash, rel=0.01)


def test_more_microbatches_shrink_the_bubble_alone():
    found = pricer(layers=8)
    steps = {
        cuts: priced(found, Pipeline("1f1b"), cuts=cuts, stage=4, data=2, fsdp=2)
        for cuts in (2, 4)
    }
    # The work of an average stage is that of the step; each of the three others is
    # waited for once, for one microbatch.
    for cuts, prices in steps.items():
        parts = found.timing.parts(
            Meshes(H100, row(stage=4, data=2, fsdp=2)), np.array([float(cuts)])
        )
        each = parts.busy - parts.update
        stages = [(s.share * each).sum() for s in prices.cut.stages]
        assert prices.cut.blocks_of(0, 8, 4) == (2, 2, 2, 2)
        whole = stages[0] + 2 * stages[1] + stages[2]
        bubble = (whole - max(stages)) / cuts
        assert float(prices.bubble_s[0]) == pytest.approx(bubble)


def test_interleaving_wants_blocks_and_microbatches_enough():
    found = pricer(layers=8)
    for blocks_per_part, cuts, valid in [(2, 4, True), (4, 4, False), (2, 6, False)]:
        how = Pipeline("interleaved", blocks_per_part)
        (prices,) = found.price_stages(
            H100, row(stage=4, data=4), np.array([float(cuts)]), [how]
        )
        assert bool(prices.cut.valid[0]) is valid


def test_faster_than_a_limit_is_all_that_has_memory():
    found = pricer(layers=8)
    sizes = np.concatenate([row(stage=2, data=8), row(stage=8, data=2)])
    cuts = np.array([2.0, 2.0])
    (free,) = found.price_stages(H100, sizes, cuts, [Pipeline("1f1b")])
    limit_s = float(free.step_s.mean())
    (few,) = found.price_stages(H100, sizes, cuts, [Pipeline("1f1b")], limit_s)
    assert np.array_equal(few.step_s, free.step_s)
    within = free.step_s <= limit_s
    assert 0 < within.sum() < 2
    assert np.array_equal(few.peak_bytes[within], free.peak_bytes[within])
    assert np.isnan(few.peak_bytes[~within]).all()
