"""Exploring under a time limit, with interruptions, and twice."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny_lm
from helpers.spaces import (
    OneByOne,
    different,
    fitting,
    floats,
    mlp_step,
    of_mesh,
    small_memory,
)

from autoshard.cost import Pricer
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy, plan_to_json
from autoshard.search.explore import explore
from autoshard.search.solver import Solver

STEP, BATCH, CHIPS = mlp_step(layers=2), floats(8, 32), cluster("cpu:4")
STRATEGY = of_mesh(
    "data", "fsdp", "tensor",
    rules={"batch": "auto", "mlp": "auto", "seq.residual": "auto"},
    storage={"params": "auto", "gradients": "auto", "optimizer": "auto"},
    microbatches="auto", remat="auto",
)  # fmt: skip


def solver(chips=CHIPS, **options):
    return Solver(STEP, (BATCH,), chips, STRATEGY, **options)


@pytest.fixture(scope="module")
def optimum_s():
    """By brute force."""
    return min(p.step_s for p in OneByOne(STEP, BATCH, STRATEGY).price(CHIPS))


def test_no_time_prices_the_first_structure_and_says_what_is_open(optimum_s):
    limited = solver(time_limit_s=0)
    explored = limited.explored(1)
    assert len(explored.groups) == explored.watch.visited == 1
    assert (explored.left > 0, explored.why) == (True, "time limit")
    assert explored.lower_bound_s <= optimum_s
    [plan] = limited.plans()
    certificate = plan.certificate
    assert not certificate.complete
    assert certificate.left == explored.left
    assert certificate.lower_bound_s <= optimum_s <= plan.predicted.step_s
    ratio = plan.predicted.step_s / certificate.lower_bound_s
    assert certificate.gap == pytest.approx(ratio - 1)


def test_enough_time_leaves_nothing(optimum_s):
    explored = solver(time_limit_s=1e6).explored(1)
    assert (explored.left, explored.why) == (0, "")
    assert explored.lower_bound_s == pytest.approx(optimum_s, rel=1e-9)


@pytest.mark.parametrize(("top", "nth"), [(1, 2), (1, 3), (5, 3), (5, 7)])
def test_an_interruption_keeps_the_best_so_far(monkeypatch, optimum_s, top, nth):
    one = solver()
    price, calls = Pricer.price_all, []

    def interrupted(self, *args, **how):
        calls.append(self)
        if len(calls) == nth:
            raise KeyboardInterrupt
        return price(self, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Pricer, "price_all", interrupted)
        explored = one.explored(top)  # as many as `plans` asks for
    assert explored.why == "interrupted"
    # Bounds leave nothing to price of some structures.
    priced = sum(len(group.sizes) > 0 for group in explored.groups)
    assert 1 <= priced <= nth - 1 <= len(explored.groups)
    best = min(float(g.step_s.min()) for g in explored.groups if len(g.step_s))
    assert explored.ranked[0][0] == best
    assert explored.lower_bound_s <= optimum_s <= best
    plan, *_ = one.plans(top)
    assert not plan.certificate.complete
    # The structure that was being priced is not counted as done.
    assert plan.certificate.left >= 1


def test_an_interruption_of_the_very_last_structure_is_not_complete(
    monkeypatch, optimum_s
):
    price, calls = Pricer.price_all, []

    def counted(self, *args, **how):
        calls.append(self)
        return price(self, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Pricer, "price_all", counted)
        solver().explored()
    last = len(calls)
    calls.clear()

    def interrupted(self, *args, **how):
        if len(calls) == last - 1:
            raise KeyboardInterrupt
        return counted(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Pricer, "price_all", interrupted)
        explored = solver().explored()
    assert explored.left >= 1
    assert explored.lower_bound_s <= optimum_s


def test_an_interruption_before_anything_was_found_is_passed_on(monkeypatch):
    def interrupted(self, *args, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pricer, "price_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        solver().explored()


def test_twice_the_same_bytes():
    texts = {plan_to_json(solver().plans()[0]) for _ in range(2)}
    assert len(texts) == 1


def test_the_front_is_that_of_brute_force():
    brute = OneByOne(STEP, BATCH, STRATEGY).price(CHIPS)
    points = {(p.step_s, p.peak_bytes) for p in brute}
    expected = sorted(
        p
        for p in points
        if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
    )
    explored = solver().explored()
    assert [e[:2] for e in explored.front()] == [
        pytest.approx(p, rel=1e-9) for p in expected
    ]
    assert len(expected) > 2
    # What is written is its two ends and some between.
    plans = solver().front(3)
    times = [p.predicted.step_s for p in plans]
    sizes = [p.predicted.memory.total for p in plans]
    assert (times, sizes) == (sorted(times), sorted(sizes, reverse=True))
    assert len(plans) == 3


def test_of_the_plans_that_are_written_none_beats_another():
    # Priced from the program without microbatches, some of these are on the front that
    # are beaten once theirs are traced.
    ids = jax.ShapeDtypeStruct((32, 64), jnp.int32)
    batch, auto = {"tokens": ids, "targets": ids}, load_strategy("auto")
    one = Solver(tiny_lm.build(), (batch,), cluster("cpu:4"), auto)
    plans = one.front(100)
    points = [(p.predicted.step_s, p.predicted.memory.total) for p in plans]
    assert len(one.explored().front()) > len(points) > 2
    assert points == sorted(points)
    for a, b in itertools.permutations(points, 2):
        assert a[0] < b[0] or a[1] < b[1]


def without_rule(priced, logical):
    rules = tuple(r for r in priced.strategy.rules if r.logical != logical)
    return priced.strategy.model_copy(update={"rules": rules})


def test_counts_add_up_to_the_space():
    chips = small_memory(CHIPS, 150_000)
    one = solver(chips)
    for best in (1, None):
        found = explore(one.space, STRATEGY, chips, best=best)
        watch, grid = found.watch, one.space.candidates(STRATEGY, chips)[0]
        counted = found.enumerated + watch.alike + watch.pruned
        counted += watch.indivisible + watch.too_large
        assert counted == watch.visited * len(grid)
    # No dim of the program is one of a sequence: the residual rule decides nothing.
    brute = different(
        [
            dataclasses.replace(priced, strategy=without_rule(priced, "seq.residual"))
            for priced in OneByOne(STEP, BATCH, STRATEGY).price(chips)
        ]
    )
    assert found.enumerated == len(brute)
    assert found.infeasible == len(brute) - len(fitting(brute, chips))
