"""Mixes of policies, searched and held against every mix of every candidate alone."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.spaces import (
    OneByOne,
    active,
    fitting,
    floats,
    mlp_step,
    of_mesh,
    small_memory,
)
from helpers.staged import scanned_mlp

from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.plan.cluster import cluster
from autoshard.plan.files import plan_from_json, plan_to_json
from autoshard.search.pinning import with_pins
from autoshard.search.solver import Solver

CI, ALL = (2, 13, 25, 30), range(80)


def every_remat(blocks):
    """The policies, and all mixes of two: the one that recomputes more comes first."""
    mixes = [
        f"{lean}={count},{fast}={blocks - count}"
        for fast, lean in (("none", "dots"), ("none", "full"), ("dots", "full"))
        for count in range(1, blocks)
    ]
    return ("none", "dots", "full", *mixes)


def instance(seed):
    """A program of a few blocks, in a loop or not, and a space with few meshes."""
    rng = np.random.default_rng([seed, 23])
    blocks = int(rng.integers(2, 7))
    width, rows = int(rng.choice([8, 16, 64])), int(rng.choice([8, 512, 4096]))
    if rng.random() < 0.7:
        step = scanned_mlp(blocks, width, 32, int(rng.choice([0, 16, 1024])))
    else:
        step = mlp_step(width, 32, blocks)
    chips = cluster(str(rng.choice(["cpu:2", "h100:2", "h100:4", "v5e:2x2"])))
    axes = ["data", "fsdp"][: int(rng.integers(1, 3))]
    storage = {"params": ("fsdp",)} if "fsdp" in axes and rng.random() < 0.5 else {}
    cuts = "auto" if rng.random() < 0.2 else 1
    strategy = of_mesh(*axes, storage=storage, remat="mix", microbatches=cuts)
    return step, blocks, floats(rows, width), chips, strategy


def without(priced):
    """What a candidate is but for its policies."""
    schedule = priced.strategy.schedule.model_copy(update={"remat": "none"})
    return str(active(priced.strategy.model_copy(update={"schedule": schedule})))


ONE = ([True], [True, False])
"""Which of a candidate's policies fit for all blocks, the leaner one first."""


def policies(priced):
    """Those of a candidate, the one that recomputes more first."""
    return [part.split("=")[0] for part in priced.strategy.schedule.remat.split(",")]


def check_exact(seed):
    """Whether the best plan is a mix; for one plan or more the search finds it."""
    step, blocks, batch, chips, strategy = instance(seed)
    priced = OneByOne(step, batch, strategy, every_remat(blocks)).price(chips)
    rng = np.random.default_rng([seed, 24])
    # Memory that some mix has just enough of.
    peaks = [p.peak_bytes for p in priced if "=" in p.strategy.schedule.remat]
    limit = float(rng.choice(sorted(peaks)))
    tight = small_memory(chips, limit * 1.0001 / MEMORY_HEADROOM)
    fits = fitting(priced, tight)
    alone = {(without(p), p.strategy.schedule.remat) for p in fits}
    # Mixes are of candidates that fit with the policy that recomputes more alone.
    fits = [
        p for p in fits if [(without(p), own) in alone for own in policies(p)] in ONE
    ]
    solver = Solver(step, (batch,), tight, strategy)
    if not fits:
        with pytest.raises(InfeasibleError):
            solver.plans()
        return False
    best = min(fits, key=lambda p: p.step_s)
    for wanted in (1, 3):
        explored = solver.explored(wanted)
        assert explored.ranked[0][0] == pytest.approx(best.step_s, rel=1e-9), (
            seed,
            wanted,
            best.strategy.schedule,
        )
        assert explored.lower_bound_s == explored.ranked[0][0]
    return "=" in best.strategy.schedule.remat


@pytest.mark.parametrize("seed", CI)
def test_the_best_mix_is_found(seed):
    check_exact(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", sorted({*ALL} - {*CI}))
def test_the_best_mix_is_found_at_length(seed):
    check_exact(seed)


STEP, BATCH = scanned_mlp(4, 64), floats(4096, 64)
FIXED = {"data": 1, "fsdp": 2, "microbatches": 1}
SHARDED = {"params": ("fsdp",), "gradients": ("fsdp",)}
SMALL = of_mesh("data", "fsdp", storage=SHARDED, remat="mix", microbatches=1)


def pinned(**pins):
    return Solver(STEP, (BATCH,), cluster("h100:2"), SMALL).pinned(FIXED | pins)


def test_a_loop_in_parts_moves_what_the_whole_one_does():
    # Parameters are gathered within the loops, a block at a time, not where the stacks
    # of their shards are cut in two; nor are gradients where they are joined.
    tables = {}
    for remat in ("full", "none", "full=1,none=3"):
        [plan] = pinned(remat=remat).plans()
        moved = {}
        for c in plan.predicted.collectives:
            moved[c.kind] = moved.get(c.kind, 0) + c.bytes_ * c.count
        tables[remat] = moved
    for kind in ("all_gather", "reduce_scatter"):
        whole = (tables["full"][kind] + 3 * tables["none"][kind]) / 4
        assert tables["full=1,none=3"][kind] == whole


def test_products_of_a_mix_take_time_in_proportion():
    times = {
        remat: pinned(remat=remat).plans()[0].predicted.matmul_s
        for remat in ("full", "none", "full=3,none=1")
    }
    whole = (3 * times["full"] + times["none"]) / 4
    assert times["full=3,none=1"] == pytest.approx(whole, rel=1e-12)


def test_the_plan_is_the_mix_that_was_priced():
    [none], [full] = (pinned(remat=remat).plans() for remat in ("none", "full"))
    peaks = none.predicted.memory.total, full.predicted.memory.total
    tight = small_memory(cluster("h100:2"), sum(peaks) / 2 / MEMORY_HEADROOM)
    solver = Solver(STEP, (BATCH,), tight, SMALL).pinned(FIXED)
    [plan] = solver.plans()
    assert "=" in plan.remat
    assert plan.certificate.gap == 0
    assert not plan.not_executable
    assert plan_from_json(plan_to_json(plan)) == plan
    [same] = solver.pinned({"remat": plan.remat}).plans()
    assert same.predicted == plan.predicted
    # The same search gives the same plan, byte for byte.
    again = Solver(STEP, (BATCH,), tight, SMALL).pinned(FIXED)
    assert plan_to_json(again.plans()[0]) == plan_to_json(plan)


def test_what_a_mix_cannot_have_is_refused():
    staged = of_mesh("stage", "data", remat="full=1,none=3", pipeline="auto")
    for pins, said in (
        ({"stage": 2}, r"stage = 2 is priced for blocks that are"),
        ({"pipeline": "1f1b"}, r"pipeline = '1f1b' is priced for blocks that are"),
        ({"offload": "activations"}, "offload of activations is priced for blocks"),
    ):
        with pytest.raises(InputError, match=said):
            with_pins(staged, pins)
    with pytest.raises(InputError, match=r"is for 5 blocks, .* has 4"):
        pinned(remat="full=1,none=4").plans()


def test_stages_are_left_out_of_mixes():
    said = []
    strategy = of_mesh(
        "stage", "data", sizes={"stage": 2}, remat="mix", pipeline="1f1b"
    )
    Solver(STEP, (BATCH,), cluster("h100:2"), strategy, log=said.append).plans()
    [line] = [line for line in said if "mixes of policies left out" in line]
    assert "they are of one stage; leave stage = 'auto' or set it to 1" in line
    strategy = of_mesh("stage", "data", remat="full=1,none=3", pipeline="auto")
    [plan] = Solver(STEP, (BATCH,), cluster("h100:2"), strategy).plans()
    assert plan.sizes["stage"] == 1
    assert plan.strategy.schedule.pipeline == "none"
