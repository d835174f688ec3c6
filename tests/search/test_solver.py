"""The solver against exhaustive pricing and against brute force, one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.equality import abstract_batch, make_step
from helpers.small_programs import instance, with_experts, with_made_weights
from helpers.spaces import OneByOne, fitting, small_memory

from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import InfeasibleError
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.search.solver import Solver

ALL = range(200)
# Of the first 30 and 10, without some that take long.
CI = sorted({*range(30)} - {6, 13})
EXPERTS = (0, 1, 3, 5, 6, 7, 129)


def first_different(solver, best, count):
    """Seconds of the first candidates that are truly different plans."""
    explored = solver.explored(best)
    entries = itertools.islice(solver._different(explored), count)
    return [entry[0] for entry in entries]


def check_exact(seed, given):
    """Bounded and exhaustive search and brute force agree; returns the verdict."""
    solver = Solver(given.step, (given.batch,), given.cluster, given.strategy)
    brute = OneByOne(given.step, given.batch, given.strategy)
    try:
        priced = brute.price(given.cluster)
    except InfeasibleError:
        priced = []
    if not priced:
        for best in (1, None):
            with pytest.raises(InfeasibleError):
                solver.explored(best)
        return "nothing divides"
    # Memory at which all, some or none of the candidates fit.
    rng = np.random.default_rng([seed, 1])
    peaks = sorted(p.peak_bytes for p in priced)
    limits = [None, peaks[0] * 0.99, peaks[0], float(rng.choice(peaks))]
    limit = limits[int(rng.choice(4, p=[0.2, 0.15, 0.15, 0.5]))]
    chips = given.cluster
    if limit is not None:
        chips = small_memory(chips, limit * 1.0001 / MEMORY_HEADROOM)
    there = solver.on(chips)
    times = sorted(p.step_s for p in fitting(priced, chips))
    for best in (1, None):
        found = there.explored(best).ranked
        assert bool(found) == bool(times), given.about
        if times:
            assert found[0][0] == pytest.approx(times[0], rel=1e-9), given.about
            assert there.explored(best).lower_bound_s == found[0][0]
    if not times:
        return "nothing fits"
    # What is priced among others may be rounded otherwise.
    best, every = (first_different(there, some, 3) for some in (3, None))
    assert best == pytest.approx(every, rel=1e-12), given.about
    return "all fit" if len(times) == len(priced) else "some fit"


@pytest.mark.parametrize("seed", CI)
def test_bounded_search_is_exact(seed):
    check_exact(seed, instance(seed))


@pytest.mark.parametrize("seed", EXPERTS)
def test_bounded_search_is_exact_with_made_weights(seed):
    check_exact(seed, with_made_weights(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", sorted({*ALL} - {*EXPERTS}))
def test_bounded_search_is_exact_with_made_weights_at_length(seed):
    check_exact(seed, with_made_weights(seed))


@pytest.mark.parametrize("seed", EXPERTS)
def test_bounded_search_is_exact_with_experts(seed):
    check_exact(seed, with_experts(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", sorted({*ALL} - {*CI}))
def test_bounded_search_is_exact_at_length(seed):
    check_exact(seed, instance(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", sorted({*ALL} - {*EXPERTS}))
def test_bounded_search_is_exact_with_experts_at_length(seed):
    check_exact(seed, with_experts(seed))


def test_what_is_fixed_later_is_not_traced_again():
    step, batch = make_step("llama3-tiny", scan=True), abstract_batch()
    solver = Solver(step, (batch,), cluster("h100:8"), load_strategy("auto"))
    assert solver.pinned({"tensor": 2}).space is solver.space
    assert solver.pinned({"tensor": 2}).pinned({"remat": "full"}).space is solver.space
    # Path maps and names decide how a program is read.
    assert solver.pinned({"specs.embedding": "tensor,none"}).space is not solver.space
    assert solver.pinned({"rules.other": "data"}).space is not solver.space


def test_an_axis_may_be_fixed_that_the_strategy_lacks():
    step, batch = make_step("llama3-tiny", scan=True), abstract_batch()
    solver = Solver(step, (batch,), cluster("cpu:8"), load_strategy("fsdp"))
    solver.plans()
    other = solver.pinned({"stage": 1, "storage.optimizer": "none"})
    assert other.space is solver.space
    [plan] = other.plans()
    assert {t.storage == t.compute for t in plan.tensors} == {True, False}
