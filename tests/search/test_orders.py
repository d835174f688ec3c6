"""Orders of mesh axes in the search, against every order priced by itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import small_programs, staged
from helpers.spaces import OneByOne, fitting, floats, mlp_step, of_mesh, small_memory

import autoshard as ash
from autoshard.cost import floors
from autoshard.cost.collectives import Meshes
from autoshard.cost.placement import Placements
from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import cluster
from autoshard.plan.files import plan_from_json, plan_to_json
from autoshard.plan.strategy import Schedule
from autoshard.search import batch
from autoshard.search.candidates import Space
from autoshard.search.pinning import with_pins
from autoshard.search.solver import Solver

CI, ALL = range(7), range(120)

CLUSTERS = ("h100:4x2", "h100:2x4", "h100:3x2", "v5e:2x4", "v5p:2x2x2")
"""Several levels of links, over few chips."""


@pytest.fixture(params=[2**12, 1], ids=["at once", "bounded"])
def together(request, monkeypatch):
    """How many orders are priced before bounds are looked at."""
    monkeypatch.setattr(batch, "_TOGETHER", request.param)


def check_exact(seed):
    given = small_programs.instance(seed)
    rng = np.random.default_rng([seed, 5])
    chips = cluster(str(rng.choice(CLUSTERS)))
    mesh = dict.fromkeys(given.strategy.mesh, "auto")
    schedule = Schedule(microbatches=1, remat="none")
    strategy = given.strategy.model_copy(
        update={"order": "auto", "mesh": mesh, "schedule": schedule}
    )
    priced = OneByOne(given.step, given.batch, strategy).price(chips)
    solver = Solver(given.step, (given.batch,), chips, strategy)
    if not priced:
        with pytest.raises(InfeasibleError):
            solver.explored(1)
        return
    limit = float(rng.choice([p.peak_bytes for p in priced])) * 1.0001 + 1
    chips = small_memory(chips, limit / MEMORY_HEADROOM)
    there = solver.on(chips)
    brute = sorted((p.step_s, p.peak_bytes) for p in fitting(priced, chips))
    for best in (1, 3, None):
        explored = there.explored(best)
        assert explored.ranked[0][0] == pytest.approx(brute[0][0], rel=1e-9)
        assert explored.lower_bound_s == explored.ranked[0][0]
        watch = explored.watch
        # The best is what it says it is.
        _, _, number, k = explored.ranked[0]
        one = explored.groups[number].filled(k)
        same = [p.step_s for p in priced if p.strategy.order == _active(one)]
        assert any(np.isclose(explored.ranked[0][0], t, rtol=1e-9) for t in same)
        assert watch.alike >= 0 <= watch.pruned
    front = []
    for step_s, peak in brute:
        if not front or peak < front[-1][1] * (1 - 1e-9):
            front.append((step_s, peak))
    found = [(e[0], e[1]) for e in there.explored().front()]
    for step_s, peak in front:  # of times that are rounding apart either may come first
        assert any(
            t <= step_s * (1 + 1e-9) and p <= peak * (1 + 1e-9) for t, p in found
        )


def _active(strategy):
    return tuple(a for a in strategy.order if strategy.mesh[a] != 1)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("seed", CI)
def test_search_over_orders_is_exact(seed):
    check_exact(seed)


@pytest.mark.slow
@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("seed", ALL[len(CI) :])
def test_search_over_orders_is_exact_at_length(seed):
    check_exact(seed)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("seed", range(4))
def test_search_over_orders_of_stages_is_exact(seed):
    given = staged.instance(seed)
    chips = ("h100:4x2", "v5e:2x4")[seed % 2]
    given = dataclasses.replace(
        given,
        cluster=cluster(chips),
        strategy=given.strategy.model_copy(
            update={
                "order": "auto",
                "schedule": given.strategy.schedule.model_copy(
                    update={"microbatches": 2, "remat": "none"}
                ),
            }
        ),
    )
    every = staged.one_by_one(given)
    limit = sorted(f.peak_bytes for f in every)[len(every) // 2] * 1.0001 + 1
    chips = small_memory(given.cluster, limit / MEMORY_HEADROOM)
    capacity = chips.hbm_bytes * MEMORY_HEADROOM
    best = min(f.step_s for f in every if f.peak_bytes <= capacity)
    solver = Solver(given.step, (given.batch,), chips, given.strategy)
    for count in (1, 3, None):
        explored = solver.explored(count)
        assert explored.ranked[0][0] == pytest.approx(best, rel=1e-9)


# -- bounds --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("chips", CLUSTERS)
def test_no_order_is_faster_than_its_bound(seed, chips):
    given = small_programs.instance(seed)
    there = cluster(chips)
    space = Space(given.step, (given.batch,), lambda _: None, given.strategy)
    strategy = given.strategy.model_copy(
        update={"mesh": dict.fromkeys(given.strategy.mesh, "auto")}
    )
    sizes, cuts = space.candidates(strategy, there)
    structure = next(iter(space.price(strategy, there)))
    places = Placements(there, sizes)
    pieces = cuts.astype(float)
    bound = structure.pricer.price(there, sizes, pieces, anywhere=places).least_s
    free = Meshes(there, sizes, anywhere=places)
    whole_s, rest_s, *_ = floors.rest_s(structure.pricer, free, pieces)
    moved = floors.moved_s(structure.pricer, free, pieces)
    stored_s, _ = floors.stored_s(structure.pricer, free, moved, rest_s)
    rng = np.random.default_rng(seed)
    for _ in range(30):
        orders = rng.permuted(np.tile(np.arange(len(AXES)), (len(sizes), 1)), axis=1)
        times = structure.pricer.price(there, sizes, pieces, orders=orders).step_s
        assert (bound <= times * (1 + 1e-12)).all()
        for floor_s in (whole_s, stored_s):
            assert (floor_s <= times * (1 + 1e-12)).all()


def test_a_bound_is_the_best_place_of_each_collective():
    """16 devices in nodes of 2: two by two at most are in one, whichever comes last.

    Over `data` alone the fastest order is that with `data` last.
    """
    chips = cluster("h100:8x2")
    sizes = np.array([[1, 4, 2, 1, 1, 2]])
    places = Placements(chips, sizes)
    for axes in (["data"], ["fsdp"], ["tensor"], ["data", "tensor"]):
        last = [AXES.index(a) for a in axes]
        order = [k for k in range(len(AXES)) if k not in last] + last
        alone = Meshes(chips, sizes, np.array([order]))
        free = Meshes(chips, sizes, anywhere=places)
        for kind in ("all_gather", "all_reduce"):
            want = alone.time_s(kind, frozenset(axes), 1e9)
            got = free.time_s(kind, frozenset(axes), 1e9)
            assert got == pytest.approx(want, rel=1e-12)


# -- what is chosen ------------------------------------------------------------------

# Weights are large beside the batch: gathers over `fsdp` dominate.
WIDE, ROWS = mlp_step(256, 1024), floats(32, 256)
MESH = {"data": 4, "fsdp": 2, "microbatches": 1, "remat": "none"}


def wide(**pins):
    strategy = of_mesh(
        "fsdp", "data", "tensor",
        storage=dict.fromkeys(("params", "gradients", "optimizer"), ("fsdp",)),
        order="auto",
    )  # fmt: skip
    there = cluster("h100:4x2")
    return Solver(WIDE, (ROWS,), there, with_pins(strategy, {**MESH, **pins}))


def test_the_axis_that_moves_more_is_put_inside():
    """`data` sums the shards of gradients, `fsdp` gathers whole weights twice."""
    times = {}
    for order in ("data+fsdp", "fsdp+data", "auto"):
        [plan] = wide(order=order).plans()
        times[order] = plan.predicted.step_s
        laid = [a.axis for a in plan.axes if a.size > 1]
        assert laid == (["fsdp", "data"] if order == "fsdp+data" else ["data", "fsdp"])
        assert plan_from_json(plan_to_json(plan)) == plan
    assert times["auto"] == times["data+fsdp"] < times["fsdp+data"]


def test_another_order_is_chosen_where_it_is_faster():
    """No rule uses `tensor`: it leaves no room in nodes of two chips for `fsdp`."""
    found = {}
    for order in ("data+fsdp+tensor", "data+tensor+fsdp", "tensor+data+fsdp", "auto"):
        pins = {"data": 2, "fsdp": 2, "tensor": 2, "order": order}
        [plan] = wide(**pins).plans()
        found[order] = plan.predicted.step_s
    assert found["auto"] == pytest.approx(
        min(found["data+tensor+fsdp"], found["tensor+data+fsdp"])
    )
    assert found["auto"] < found["data+fsdp+tensor"]


@pytest.mark.parametrize("chips", ["h100:8", "cpu:8"])
def test_where_all_links_are_alike_the_order_is_the_canonical_one(chips):
    strategy = of_mesh("data", "fsdp", order="auto", microbatches=1, remat="none")
    there = cluster(chips)
    solver = Solver(WIDE, (ROWS,), there, with_pins(strategy, {"data": 4}))
    explored = solver.explored(1)
    # One candidate; the other order of its two axes is what it is.
    assert (explored.enumerated, explored.watch.alike) == (1, 1)
    [plan] = solver.plans()
    assert [a.axis for a in plan.axes] == ["data", "fsdp"]
    assert plan.strategy.order == ("data", "fsdp")


def test_an_order_of_some_axes_leaves_the_others_where_they_are():
    pins = {"data": 2, "fsdp": 2, "tensor": 2, "order": "tensor+data"}
    plan = ash.search(WIDE, ROWS, cluster="cpu:8", strategy="fsdp-tp", pins=pins)
    assert [a.axis for a in plan.axes if a.size > 1] == ["tensor", "fsdp", "data"]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (
            "batch+data",
            r"^order = 'batch\+data' cannot be set: order: unknown mesh axis",
        ),
        ("tensor+data", r"order uses mesh axis 'tensor', which \[mesh\] does not name"),
        ("data+data", r"order = \['data', 'data'\] names an axis twice"),
        (3, r"order = 3 cannot be set: this is a list of names, or text such as"),
    ],
)
def test_orders_that_cannot_be(order, said):
    with pytest.raises(InputError, match=said):
        with_pins(of_mesh("data", "fsdp"), {"order": order})
