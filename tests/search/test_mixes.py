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
from autoshard.ir.errors import InfeasibleError
from autoshard.plan.cluster import cluster
from autoshard.search.solver import Solver

CI, ALL = range(8), range(80)


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
    # Mixes are of candidates that fit with the policy that recomputes more.
    fits = [
        p
        for p in fits
        if (without(p), p.strategy.schedule.remat.split("=")[0]) in alone
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
@pytest.mark.parametrize("seed", ALL[len(CI) :])
def test_the_best_mix_is_found_at_length(seed):
    check_exact(seed)
