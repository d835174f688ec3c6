"""Searching with pipeline stages, against every candidate priced by itself."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.equality import abstract_batch, make_step
from helpers.spaces import floats, small_memory
from helpers.staged import instance, one_by_one, scanned_mlp

import autoshard as ash
from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy, plan_from_json, plan_to_json
from autoshard.search.pinning import with_pins
from autoshard.search.solver import Solver

CI, ALL = range(10), range(60)


def check_exact(seed):
    given = instance(seed)
    every = one_by_one(given)
    assert every
    peaks = sorted(f.peak_bytes for f in every)
    limit = float(np.random.default_rng([seed, 2]).choice([*peaks, peaks[-1]]))
    chips = small_memory(given.cluster, limit * 1.0001 / MEMORY_HEADROOM)
    fitting = sorted(
        (f.step_s, f.peak_bytes) for f in every if f.peak_bytes <= limit * 1.0001
    )
    solver = Solver(given.step, (given.batch,), chips, given.strategy)
    for best in (1, 3, None):
        explored = solver.explored(best)
        assert explored.ranked[0][0] == pytest.approx(fitting[0][0], rel=1e-9)
        assert explored.lower_bound_s == explored.ranked[0][0]
    # Alike candidates are priced once, so that times are compared and not counted.
    times = np.unique(np.round([t for t, _ in fitting], 15))
    mine = np.array([e[0] for e in explored.ranked])
    assert all(np.isclose(mine, t, rtol=1e-9).any() for t in times)


@pytest.mark.parametrize("seed", CI)
def test_search_with_stages_is_exact(seed):
    check_exact(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ALL[len(CI) :])
def test_search_with_stages_is_exact_at_length(seed):
    check_exact(seed)


STEP, BATCH = make_step("llama3-tiny", scan=True), abstract_batch()
CHIPS = cluster("h100:16")
BLOCKS = 4
"""Of llama3-tiny."""


def pinned(**pins):
    return Solver(STEP, (BATCH,), CHIPS, with_pins(load_strategy("auto"), pins))


def test_a_pipeline_is_written_down_whole():
    [plan] = pinned(stage=2, pipeline="1f1b", vocab="ends").plans()
    schedule = plan.strategy.schedule
    assert (schedule.pipeline, schedule.virtual, plan.sizes["stage"]) == ("1f1b", 1, 2)
    assert len(schedule.blocks) == 2
    predicted = plan.predicted
    parts = predicted.matmul_s + predicted.memory_bound_s + predicted.collective_s
    parts += predicted.bubble_s + predicted.transfer_s
    assert parts == pytest.approx(predicted.step_s)
    assert predicted.bubble_s > 0 < predicted.transfer_s
    assert plan.certificate.gap <= 0.01
    assert plan_from_json(plan_to_json(plan)) == plan


def test_blocks_that_are_fixed_are_obeyed():
    [even] = pinned(stage=2, pipeline="1f1b").plans()
    assert sum(even.strategy.schedule.blocks) == BLOCKS
    [odd] = pinned(stage=2, pipeline="1f1b", blocks=(1, 3)).plans()
    assert odd.strategy.schedule.blocks == (1, 3)
    assert odd.predicted.step_s >= even.predicted.step_s


def test_what_cannot_be_run_is_refused_and_left_out():
    [plan] = pinned(stage=2, remat="none").plans()
    assert plan.not_executable == ("2 pipeline stages",)
    with pytest.raises(InputError, match=r"2 pipeline stages.*--executable"):
        ash.parallelize(STEP, plan)
    only = ash.search(STEP, BATCH, cluster=CHIPS, executable=True)
    assert only.sizes["stage"] == 1
    assert not only.not_executable
    with pytest.raises(InputError, match=r"stage = 2.*cannot be run yet"):
        ash.search(STEP, BATCH, cluster=CHIPS, pins={"stage": 2}, executable=True)


@pytest.mark.parametrize(
    ("pins", "kind", "said"),
    [
        (
            {"stage": 16},
            InfeasibleError,
            "stage = 16.*more stages.*cut into, 4 blocks",
        ),
        (
            {"stage": 2, "pipeline": "1f1b", "blocks": (1, 1)},
            InputError,
            r"blocks = \[1, 1\].*2 blocks.*program has 4",
        ),
        (
            {"stage": 4, "pipeline": "1f1b", "blocks": (1, 3)},
            InfeasibleError,
            r"blocks = \[1, 3\].*stage = 4",
        ),
    ],
)
def test_stages_that_cannot_be(pins, kind, said):
    with pytest.raises(kind, match=said):
        pinned(**pins).plans()


def test_without_a_pipeline_stage_is_an_axis_like_any_other():
    pins = {"stage": 2, "pipeline": "none", "rules.mlp": "stage", "data": 8}
    [plan] = pinned(**pins).plans()
    assert plan.sizes["stage"] == 2
    assert plan.strategy.schedule.pipeline == "none"
    assert not plan.not_executable
    up = next(t for t in plan.tensors if t.path == "params/blocks/mlp/up")
    assert "stage" in {axis for dim in up.compute.dims for axis in dim}


def test_a_program_without_blocks_has_one_stage():
    step = ash.train_step(
        lambda w, x: ((x @ w) ** 2).mean(),
        scanned_mlp(2).optimizer,
        model=lambda key: np.ones((16, 8), np.float32),
    )
    batch = floats(32, 16)
    found = Solver(step, (batch,), CHIPS, load_strategy("auto"))
    assert all((g.sizes[:, 0] == 1).all() for g in found.explored().groups)
    with pytest.raises(InfeasibleError, match=r"stage = 2.*no block repeats"):
        found.pinned({"stage": 2}).plans()
