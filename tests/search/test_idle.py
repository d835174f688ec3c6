"""Axes of one device change neither what a layout costs nor what a candidate does."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.equality import abstract_batch, make_step
from helpers.small_programs import instance
from helpers.spaces import OneByOne, of_mesh, without_idle

from autoshard.cost import Pricer, floors
from autoshard.cost.collectives import Meshes
from autoshard.cost.prices import Prices
from autoshard.ir.errors import InfeasibleError
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.plan.sharded import Layout
from autoshard.propagate import propagate
from autoshard.search import space
from autoshard.search.candidates import Space

OF_STAGES = ("cut", "slowest_share")
# No costs of a candidate: what its kernels sum up to is compared; a bound is none, and
# what it offloads is what was asked.
APART = ("kernels", "least_s", "offload")
PARTS = [
    f.name for f in dataclasses.fields(Prices) if f.name not in (*OF_STAGES, *APART)
]
CI, ALL = range(7), range(60)
ZOO = [
    pytest.param("llama3-tiny", "auto", "h100:8", marks=pytest.mark.slow),
    pytest.param("llama3-tiny", "auto", "v5e:2x4", marks=pytest.mark.slow),
    pytest.param("gpt2-tiny", "auto", "cpu:8", marks=pytest.mark.slow),
    ("gpt2-tiny", "fsdp-tp", "h100:8"),
    ("llama3-tiny", "fsdp-tp-cp", "h100:8"),
    ("llama3-tiny", "megatron-sp", "h100:8"),
]


def kept(dims, idle):
    return [[a for a in dim if a not in idle] for dim in dims]


def decisions(sharded, idle):
    """What a layout says of the axes that are not idle."""
    moves = [
        (m.op, m.slot, m.value, kept([m.unreduced], idle), before, after)
        for m in sharded.reshards
        if (before := kept(m.source, idle)) != (after := kept(m.target, idle))
        or set(m.unreduced) - idle
    ]
    dims = [kept(d, idle) for d in (*sharded.specs, *sharded.factor_axes)]
    exchanges = [(e.op, e.slot, kept([e.axes], idle)) for e in sharded.exchanges]
    return moves, dims, [e for e in exchanges if e[2] != [[]]]


def idle_in(sizes):
    return frozenset(a for a, n in zip(AXES, sizes, strict=True) if n == 1)


def compared(everything, strategy, chips, every=1):
    """How many meshes of structures cost what they do without the idle axes.

    A layout may lie otherwise without them; such are passed over.
    """
    count = passed = 0
    remats = strategy.schedule.remat != "auto"
    rows = sorted(everything.meshes(strategy, chips).tolist())
    rows = [row for row in rows if row[0] == 1]  # one stage: `price` is of these
    for structure in itertools.islice(space.structures(strategy), 0, None, every):
        sketch = everything.sketch(structure.schedule.remat, required=remats)
        if sketch is None:
            continue

        def pricer(one, sketch=sketch):
            left = sketch.shallow
            there = propagate(left.traced, left.classes, Layout.of(one))
            return Pricer(there, left.work)

        whole = pricer(structure)
        for idle, same in itertools.groupby(sorted(rows, key=_pattern), key=idle_in):
            mesh = {a: 1 if a in idle else 2 for a in AXES}
            less = without_idle(structure.model_copy(update={"mesh": mesh}))
            if (less.rules, less.storage) == (structure.rules, structure.storage):
                continue
            alone = pricer(less)
            if decisions(whole.sharded, idle) != decisions(alone.sharded, idle):
                passed += 1
                continue
            sizes = np.array(list(same))
            for cut in (1.0, 2.0):
                cuts = np.full(len(sizes), cut)
                a, b = (p.price(chips, sizes, cuts) for p in (whole, alone))
                for part in PARTS:
                    np.testing.assert_allclose(
                        getattr(a, part),
                        getattr(b, part),
                        rtol=1e-9,
                        atol=1e-15,  # differences of what is nearly equal
                        err_msg=f"{part}, idle {sorted(idle)}: {structure!r}",
                    )
                meshes = Meshes(chips, sizes)
                a, b = (floors.rest_s(p, meshes, cuts) for p in (whole, alone))
                np.testing.assert_allclose(a, b, rtol=1e-9)
            count += 1
    return count, passed


def _pattern(row):
    return tuple(n > 1 for n in row)


def check_prices(seed):
    given = instance(seed)
    everything = Space(given.step, (given.batch,), lambda _: None, given.strategy)
    try:
        return compared(everything, given.strategy, given.cluster)
    except InfeasibleError:
        return 0, 0


def test_a_layout_costs_what_its_active_axes_do():
    counts = np.array([check_prices(seed) for seed in CI])
    # Of random storage more than of what is ever wanted lies otherwise.
    assert counts[:, 0].sum() > 2 * counts[:, 1].sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", ALL[len(CI) :])
def test_a_layout_costs_what_its_active_axes_do_at_length(seed):
    check_prices(seed)


@pytest.mark.parametrize(("model", "strategy", "chips"), ZOO)
def test_a_layout_of_the_zoo_costs_what_its_active_axes_do(model, strategy, chips):
    fixed = load_strategy(strategy)
    step = make_step(model, scan=True)
    everything = Space(step, (abstract_batch(16),), lambda _: None, fixed)
    every = 61 if strategy == "auto" else 1
    count, _ = compared(everything, fixed, cluster(chips), every)
    assert count


def check_candidates(step, batch, strategy, chips):
    """Every candidate is priced as if its axes of one device were not there."""
    brute = OneByOne(step, batch, strategy)
    count = 0
    for group in Space(step, (batch,), lambda _: None, strategy).price(strategy, chips):
        for k in range(len(group.sizes)):
            price = brute.pricer(group.filled(k), sizes=True).price(
                chips, group.sizes[k : k + 1], group.cuts[k : k + 1].astype(np.float64)
            )
            assert group.step_s[k] == pytest.approx(price.step_s[0], rel=1e-9)
            assert group.peak_bytes[k] == pytest.approx(price.peak_bytes[0], rel=1e-9)
            count += 1
    return count


@pytest.mark.parametrize(
    ("rules", "storage"),
    [
        # With one device along `tensor`, parameters are stored along other dims.
        ({"mlp": ("tensor",)}, {"params": ("fsdp",)}),
        ({"mlp": ("tensor",)}, dict.fromkeys(("params", "optimizer"), ("fsdp",))),
        # The gradient is spread further than what it updates.
        ({}, {"params": ("fsdp",), "gradients": ("fsdp", "data")}),
        ({}, {"params": (), "gradients": ("data", "fsdp"), "optimizer": ("fsdp",)}),
    ],
)
def test_a_candidate_is_what_its_active_axes_do(rules, storage):
    given = instance(0)
    strategy = of_mesh(
        "data",
        "fsdp",
        "tensor",
        rules={"batch": ("data", "fsdp"), **rules},
        storage=storage,
        microbatches="auto",
    )
    step, batch = make_step("gpt2-tiny", scan=True), abstract_batch(8)
    assert check_candidates(step, batch, strategy, cluster("h100:4")) > 3
    assert check_candidates(given.step, given.batch, strategy, cluster("cpu:4")) > 3


@pytest.mark.parametrize("strategy", ["fsdp-tp", "megatron-sp", "zero1"])
def test_a_candidate_of_a_strategy_is_what_its_active_axes_do(strategy):
    step, batch = make_step("llama3-tiny", scan=True), abstract_batch(8)
    fixed = load_strategy(strategy)
    assert check_candidates(step, batch, fixed, cluster("v5e:2x4"))
