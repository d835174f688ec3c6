"""What a search knows of its candidates holds, and a later one finds what it would."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from helpers.equality import abstract_batch, make_step
from helpers.spaces import floats, mlp_step, of_mesh

from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.search.explore import explore
from autoshard.search.known import Known, as_priced
from autoshard.search.pinning import with_pins
from autoshard.search.solver import Solver
from autoshard.search.space import structures

STEP, BATCH = mlp_step(layers=2), floats(16, 32)
STRATEGY = of_mesh(
    "stage", "data", "fsdp", "tensor",
    rules={"batch": "auto", "mlp": "auto", "vocab": "auto"},
    storage={"params": "auto", "gradients": "auto", "optimizer": "auto"},
    microbatches="auto", remat="auto", pipeline="auto", order="auto",
)  # fmt: skip


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


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
        # A dense program has no axis for experts, and so no rule.
        [{"rules.expert": "none"}],
        [{"offload": "auto"}, {"offload": "optimizer"}],
        [{"data": 8}, {"data": 2}],
    ],
)
def test_fixing_fields_one_after_the_other_finds_what_fixing_all_does(solved, chain):
    check(solved, chain)


@pytest.mark.parametrize(
    ("chips", "chain"),
    [
        # In these the network tells orders of axes apart.
        ("v5e:2x4", [{"order": "tensor+data+fsdp"}]),
        slow("h100:4x2", [{"order": "tensor+data+fsdp"}, {"tensor": 2}]),
        ("h100:8", [{"context_kind": "ring"}]),
        slow("h100:8", [{"context": 2}, {"context_kind": "ulysses"}]),
        ("h100:8", [{"remat": "full"}]),
        slow("h100:8", [{"remat": "none"}, {"remat": "mix"}, {"tensor": 2}]),
    ],
)
def test_so_it_is_with_orders_attention_and_mixes(chips, chain):
    opened = {"context_kind": "auto"} if "context_kind" in chain[-1] else {}
    if chain == [{"remat": "full"}]:
        opened = {"remat": "mix"}
    strategy = with_pins(load_strategy("auto"), {**opened, "expert": 1, "stage": 1})
    step = make_step("llama3-tiny", scan=True)
    solver = Solver(step, (abstract_batch(),), cluster(chips), strategy)
    solver.plans()
    check(solver, chain)


def check(solver, chain):
    start, strategy = solver, solver._asked
    for pins in chain:
        solver, strategy = solver.pinned(pins), with_pins(strategy, pins)
        alone = Solver(start.fn, start.args, start.cluster, strategy, space=start.space)
        found, expected = solver.plans(2), alone.plans(2)
        assert apart_from_counts(found) == apart_from_counts(expected)


def known_of(fewer, group, known, space):
    """What is taken over of the candidates of a group."""
    own = [(group.sizes, group.cuts)]
    taken = Known(fewer, space.pipelines(fewer), own, known)
    found = taken.floor_s(group.strategy, group.offloads, 0)
    return np.zeros(len(group.sizes)) if found is None else found


@pytest.mark.parametrize("chips", ["h100:8", "h100:4x2", "v5e:2x4", "cpu:8"])
@pytest.mark.parametrize(
    "pins",
    [{}, {"stage": 1}, {"pipeline": "zb-h1"}, {"order": "tensor+data"}, {"fsdp": 2}],
)
def test_no_candidate_is_below_what_is_known_of_it(chips, pins):
    there = cluster(chips)
    space = Solver(STEP, (BATCH,), there, STRATEGY).space
    known = explore(space, STRATEGY, there, best=2).known
    fewer, room = with_pins(STRATEGY, pins), there.hbm_bytes * MEMORY_HEADROOM
    above = 0
    for group in space.price(fewer, there):
        floor_s = known_of(fewer, group, known, space)
        fits = group.peak_bytes <= room
        assert (floor_s[fits] <= group.step_s[fits]).all()
        above += int((floor_s > 0).sum())
    assert above


@pytest.mark.parametrize(
    "wider", [{"order": "data+fsdp"}, {"pipeline": "1f1b"}, {"pipeline": "none"}]
)
def test_what_holds_of_fewer_ways_is_not_taken_over(wider):
    there = cluster("v5e:2x4")
    space = Solver(STEP, (BATCH,), there, STRATEGY).space
    narrow = with_pins(STRATEGY, {"pipeline": "1f1b", "order": "tensor+data"})
    known = explore(space, narrow, there, best=1).known
    strategy = with_pins(STRATEGY, wider)
    for group in space.price(strategy, there):
        assert not known_of(strategy, group, known, space).any()


def test_a_chain_of_searches_takes_over_from_all(solved):
    [first] = [e for best, e in solved._explored.items() if best]
    other = solved.pinned({"tensor": 2})
    other.plans()
    [second] = [e for best, e in other._explored.items() if best]
    fixed = other.pinned({"remat": "full"})
    space, strategy = solved.space, fixed.strategy
    rounds = space.rounds(strategy, solved.cluster)
    ways, own = space.pipelines(strategy), []
    for known in (first.known, second.known):
        taken = Known(strategy, ways, rounds, known)
        each = [taken.floor_s(s, ((),), 0) for s in structures(strategy)]
        own.append(np.array(each))
    assert (own[1] >= own[0] * (1 - 1e-12)).all()
    assert (own[1] > own[0]).any()


def test_a_search_cut_short_says_what_is_left(solved):
    """Of a time limit nothing is guessed: the first structure is priced."""
    limited = Solver(
        solved.fn,
        solved.args,
        solved.cluster,
        solved.strategy,
        space=solved.space,
        time_limit_s=0,
    )
    limited.plans()
    pinned = limited.pinned({"tensor": 2})
    [plan] = pinned.plans()
    assert not plan.certificate.complete
    assert plan.certificate.lower_bound_s <= plan.predicted.step_s


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


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_what_was_found_under_a_guess_outlives_an_interruption(share, monkeypatch):
    there = cluster("cpu:8")
    space = Solver(STEP, (BATCH,), there, STRATEGY).space
    best_s = explore(space, STRATEGY, there, best=4).ranked[0][0]
    own, passes = space.priced, []

    def interrupted(*args, **options):
        passes.append(1)
        if len(passes) > 1:
            raise KeyboardInterrupt
        return own(*args, **options)

    monkeypatch.setattr(space, "priced", interrupted)
    guess_s = share * best_s * (1 + 1e-9)
    if not share:  # nothing was found by then
        with pytest.raises(KeyboardInterrupt):
            explore(space, STRATEGY, there, best=10_000, guess_s=guess_s)
        return
    found = explore(space, STRATEGY, there, best=10_000, guess_s=guess_s)
    assert len(passes) == 2
    assert (found.why, found.left > 0) == ("interrupted", True)
    assert found.ranked[0][0] == pytest.approx(best_s, rel=1e-12)
    assert found.lower_bound_s <= best_s


def test_what_was_kept_above_the_limit_is_not_all_there_is():
    """Another way to run it may be above the limit, too, and faster."""
    sizes, cuts = np.ones((3, len(AXES)), dtype=np.int64), np.arange(3)
    found = SimpleNamespace(
        sizes=sizes, cuts=cuts, step_s=np.array([2.0, 5.0, 1.0]),
        peak_bytes=np.array([1.0, 1.0, 9.0]),
    )  # fmt: skip
    floor_s = as_priced(found, sizes, cuts, limit_s=3.0, room=4.0)
    assert floor_s[0] == 2.0
    assert (floor_s[1:] == np.nextafter(3.0, 4.0)).all()
