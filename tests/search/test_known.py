"""What a search knows of its candidates holds, and a later one finds what it would."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.equality import abstract_batch, make_step
from helpers.spaces import floats, mlp_step, of_mesh

from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.search.explore import explore
from autoshard.search.known import Known
from autoshard.search.pinning import with_pins
from autoshard.search.solver import Solver

STEP, BATCH = mlp_step(layers=2), floats(16, 32)
STRATEGY = of_mesh(
    "stage", "data", "fsdp", "tensor",
    rules={"batch": "auto", "mlp": "auto", "vocab": "auto"},
    storage={"params": "auto", "gradients": "auto", "optimizer": "auto"},
    microbatches="auto", remat="auto", pipeline="auto", order="auto",
)  # fmt: skip


def apart_from_counts(plans):
    """Plans without what was tried for them, which hangs on what was known before."""
    dropped = {"enumerated", "indivisible", "infeasible", "alike", "pruned"}
    return [
        (
            plan.model_copy(update={"certificate": None}),
            plan.certificate.model_dump(exclude=dropped),
        )
        for plan in plans
    ]


@pytest.fixture(scope="module")
def solved():
    solver = Solver(
        make_step("llama3-tiny", scan=True),
        (abstract_batch(),),
        cluster("h100:8"),
        load_strategy("auto"),
    )
    solver.plans()
    return solver


@pytest.mark.parametrize(
    "chain",
    [
        [{"tensor": 2, "remat": "full"}],
        [{"stage": 1}],
        [{"stage": 2, "pipeline": "1f1b"}, {"microbatches": 4}],
        [{"rules.vocab": "none"}, {"storage.optimizer": "data+fsdp"}],
        [{"order": "fsdp+data+tensor+stage"}],
        [{"data": 8}, {"data": 2}],
    ],
)
def test_fixing_fields_one_after_the_other_finds_what_fixing_all_does(solved, chain):
    strategy, solver = solved.strategy, solved
    for pins in chain:
        solver, strategy = solver.pinned(pins), with_pins(strategy, pins)
        alone = Solver(
            solved.fn, solved.args, solved.cluster, strategy, space=solved.space
        )
        found, expected = solver.plans(2), alone.plans(2)
        assert apart_from_counts(found) == apart_from_counts(expected)


@pytest.mark.parametrize("chips", ["h100:8", "v5e:2x4", "cpu:8"])
@pytest.mark.parametrize(
    "pins", [{}, {"stage": 1}, {"pipeline": "zb-h1"}, {"order": "data"}, {"fsdp": 2}]
)
def test_no_candidate_is_below_what_is_known_of_it(chips, pins):
    there = cluster(chips)
    space = Solver(STEP, (BATCH,), there, STRATEGY).space
    known = explore(space, STRATEGY, there, best=2).known
    fewer, room = with_pins(STRATEGY, pins), there.hbm_bytes * MEMORY_HEADROOM
    ways, above = space.pipelines(fewer), 0
    for group in space.price(fewer, there):
        own = [(group.sizes, group.cuts)]
        own_known = Known(fewer, ways, own, known)
        floor_s = own_known.floor_s(group.strategy, group.offloads, 0)
        fits = group.peak_bytes <= room
        assert (floor_s[fits] <= group.step_s[fits]).all()
        above += int((floor_s > 0).sum())
    assert above


def test_what_holds_of_fewer_ways_is_not_taken_over():
    there = cluster("cpu:8")
    space = Solver(STEP, (BATCH,), there, STRATEGY).space
    narrow = with_pins(STRATEGY, {"pipeline": "1f1b", "order": "data+fsdp"})
    known = explore(space, narrow, there, best=1).known
    for pins in ({"order": "data+fsdp"}, {"pipeline": "1f1b"}, {"pipeline": "none"}):
        wider = with_pins(STRATEGY, pins)
        for group in space.price(wider, there):
            own = [(group.sizes, group.cuts)]
            taken = Known(wider, space.pipelines(wider), own, known)
            floor_s = taken.floor_s(group.strategy, group.offloads, 0)
            # Where all have one stage, none takes turns.
            one_stage = bool((group.sizes[:, 0] == 1).all())
            if "order" not in pins or not one_stage:
                assert not floor_s.any()


@pytest.mark.parametrize("share", [0.5, 1.0, 1.01])
def test_a_guess_that_is_too_low_changes_nothing(share):
    there = cluster("h100:8")
    space = Solver(STEP, (BATCH,), there, STRATEGY).space
    expected = explore(space, STRATEGY, there, best=4)
    limit_s = expected.watch.step_s
    found = explore(space, STRATEGY, there, best=4, guess_s=share * limit_s)
    both = (
        [entry[:2] for entry in own.ranked if entry[0] <= limit_s * (1 + 1e-12)]
        for own in (found, expected)
    )
    # Priced among others, the last digit may be another one.
    np.testing.assert_allclose(*both, rtol=1e-12)
    assert found.lower_bound_s == pytest.approx(expected.lower_bound_s, rel=1e-12)
