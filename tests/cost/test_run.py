"""Runs by numbers: chips and tokens of a layout, contradictions, and arrays of runs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from helpers.runs import LLAMA, figure, run
from hypothesis import given
from hypothesis import strategies as st

from autoshard.cost.run import Layout, Recompute, Runs
from autoshard.ir.errors import InputError
from autoshard.plan.cluster import cluster

ways = st.integers(1, 16)


@given(ways, ways, ways, ways)
def test_each_chip_has_one_coordinate(data, tensor, context, stage):
    layout = Layout(data=data, tensor=tensor, context=context, stage=stage)
    assert layout.chips == len(np.zeros((data, tensor, context, stage)).ravel())


@given(ways, ways, ways, st.integers(1, 4))
def test_tokens_are_those_of_the_batch(data, microbatch, microbatches, context):
    """How a sequence is cut, and its layers, changes no batch."""
    layout = Layout(
        data=data, microbatch=microbatch, microbatches=microbatches, context=context
    )
    batch = sum(microbatch for _ in range(data) for _ in range(microbatches))
    assert run(layout, seq=128).tokens == batch * 128


POSITIVE = [f.name for f in dataclasses.fields(Layout)]
POSITIVE = [
    name
    for name in POSITIVE
    if name not in ("zero", "sequence", "schedule", "recompute", "frozen")
]


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -2, math.nan])
def test_numbers_must_be_positive(name, value):
    with pytest.raises(InputError, match=f"{name} = {value}; it must be positive"):
        Layout(**{name: value})


def test_state_is_sharded_over_replicas():
    assert Layout(data=2, context=4, shard=8, zero=3).shard == 8
    with pytest.raises(InputError, match="9 ways and has only 8 replicas"):
        Layout(data=2, context=4, shard=9, zero=3)


@pytest.mark.parametrize("zero", [-1, 4])
def test_zero_has_four_stages(zero):
    with pytest.raises(InputError, match=f"zero = {zero}; it is 0, 1, 2 or 3"):
        Layout(zero=zero)


def test_full_recomputation_is_a_forward_pass():
    every = dataclasses.asdict(Recompute.full())
    assert {name for name, share in every.items() if share != 1.0} == {"offloaded"}
    # The last product's result is the block's output, which is kept elsewhere.
    needed = dataclasses.asdict(Recompute.full(replays_all=False))
    assert needed == {**every, "down": 0.0}


# --- arrays ---


def test_arrays_hold_the_numbers_of_each_run():
    layouts = [
        Layout(data=2, microbatch=3),
        Layout(tensor=2, stage=4, sequence=True, recompute=Recompute(up=0.25)),
    ]
    one = run(layouts[0], seq=128, by="xla", on="v5e:8")
    other = run(layouts[1], seq=256, by="nanotron", on="h100:8", dtype="f8")
    runs = Runs.of([one, other])
    assert len(runs) == 2
    assert runs.data.tolist() == [2, 1]
    assert runs.chips.tolist() == [2, 8]
    assert runs.seq.tolist() == [128, 256]
    assert runs.sequence.tolist() == [0, 1]
    assert runs.again_up.tolist() == [0, 0.25]
    assert runs.params.tolist() == [LLAMA.params] * 2
    assert runs.torus.tolist() == [True, False]
    assert runs.dims.tolist() == [2, 1]
    assert runs.generation.tolist() == ["v5e", "hopper"]
    assert runs.where("name", "nanotron", "alpa").tolist() == [False, True]
    # NVIDIA H100 datasheet: 1979 dense TFLOP/s in FP8, half of it in 16 bits.
    assert runs.peak[1] == pytest.approx(1979e12, rel=1e-3)
    assert runs.peak_16[1] == pytest.approx(989.5e12, rel=1e-3)
    assert runs.peak[0] == runs.peak_16[0] == 197e12
    assert runs.power.tolist() == [1, 1]


def test_a_number_that_runs_do_not_have():
    with pytest.raises(AttributeError, match="horses"):
        Runs.of([run()]).horses  # noqa: B018


def test_a_part_of_less_power():
    """A card of 500 W where the full part takes 700 W, in three digits."""
    assert round(500 / 700, 3) == Runs.of([run(on="h100-96g:8")]).power[0]


def test_a_chip_without_a_generation():
    h100 = cluster("h100:8")
    chip = h100.chip.model_copy(update={"generation": None})
    unnamed = h100.model_copy(update={"chip": chip})
    assert Runs.of([run(on=unnamed)]).generation.tolist() == ["other"]


def test_a_dtype_that_a_chip_has_no_peak_for():
    with pytest.raises(InputError, match="f8"):
        Runs.of([run(on="a100-80g:8", dtype="f8")])


def test_eight_bits_on_a_chip_whose_peak_in_16_bits_is_lacking():
    h100 = cluster("h100:8")
    peaks = {"f8": figure(2e15)}
    chip = h100.chip.model_copy(update={"peak_flops_per_s": peaks})
    with pytest.raises(InputError, match="bf16"):
        Runs.of([run(on=h100.model_copy(update={"chip": chip}), dtype="f8")])
