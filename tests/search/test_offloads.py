"""Searching with state and activations offloaded, against every candidate alone."""

from __future__ import annotations

import numpy as np
import optax
import pytest
from helpers.equality import abstract_batch, make_step
from helpers.small_programs import instance
from helpers.spaces import OneByOne, floats, small_memory
from helpers.staged import instance as staged_instance
from helpers.staged import one_by_one, scanned_mlp

import autoshard as ash
from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy, plan_from_json, plan_to_json
from autoshard.plan.strategy import Schedule, Storage, Strategy
from autoshard.search.pinning import with_pins
from autoshard.search.solver import Solver

CI, ALL = range(5), range(60)
STAGED_CI, STAGED_ALL = range(3), range(40)
BIG = cluster("h100:8")


def small_host(chips, bytes_):
    """The same cluster with less of the host's memory for each chip."""
    memory = BIG.chip.host.memory_bytes.model_copy(update={"value": float(bytes_)})
    host = BIG.chip.host.model_copy(update={"memory_bytes": memory})
    return chips.model_copy(
        update={"chip": chips.chip.model_copy(update={"host": host})}
    )


def check(step, batch, chips, strategy, every, seed):
    """Search finds the fastest of all candidates that fit, in both of its modes."""
    rng = np.random.default_rng([seed, 5])
    peaks = sorted({p for _, p in every if np.isfinite(p)})
    limit = float(rng.choice(peaks[: 1 + len(peaks) // 2]))
    tight = small_memory(chips, limit / MEMORY_HEADROOM + 1)
    capacity = tight.hbm_bytes * MEMORY_HEADROOM
    fitting = sorted(t for t, p in every if p <= capacity)
    solver = Solver(step, (batch,), tight, strategy)
    for best in (1, 3, None):
        explored = solver.explored(best)
        assert explored.ranked[0][0] == pytest.approx(fitting[0], rel=1e-9)
        assert explored.lower_bound_s == explored.ranked[0][0]
    # Without a bound all candidates are priced, and those that are alike only once.
    mine = np.array([entry[0] for entry in explored.ranked])
    assert all(np.isclose(mine, t, rtol=1e-9, atol=0).any() for t in set(fitting))


def check_random(seed):
    given = instance(seed)
    host = float(np.random.default_rng([seed, 6]).choice([1e3, 1e4, 1e9]))
    chips = small_host(cluster(f"h100:{1 + seed % 8}"), host)
    strategy = with_pins(given.strategy, {"offload": "auto"})
    if strategy.mesh.values() != {"auto"}:  # sizes were drawn for another cluster
        strategy = with_pins(strategy, dict.fromkeys(strategy.mesh, "auto"))
    brute = OneByOne(given.step, given.batch, strategy)
    every = [(p.step_s, p.peak_bytes) for p in brute.price(chips)]
    if not every:
        with pytest.raises(InfeasibleError):
            Solver(given.step, (given.batch,), chips, strategy).explored()
        return
    check(given.step, given.batch, chips, strategy, every, seed)


def check_staged(seed):
    given = staged_instance(seed)
    chips = small_host(cluster("h100:8"), 1e5 if seed % 3 else 3e3)
    strategy = with_pins(given.strategy, {"offload": "auto"})
    given = type(given)(given.step, given.blocks, given.batch, chips, strategy)
    every = [(f.step_s, f.peak_bytes) for f in one_by_one(given)]
    check(given.step, given.batch, chips, strategy, every, seed)


@pytest.mark.parametrize("seed", CI)
def test_search_with_offloading_is_exact(seed):
    check_random(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", ALL[len(CI) :])
def test_search_with_offloading_is_exact_at_length(seed):
    check_random(seed)


@pytest.mark.parametrize("seed", STAGED_CI)
def test_search_with_offloading_and_stages_is_exact(seed):
    check_staged(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", STAGED_ALL[len(STAGED_CI) :])
def test_search_with_offloading_and_stages_is_exact_at_length(seed):
    check_staged(seed)


STEP, BATCH = make_step("llama3-tiny", scan=True), abstract_batch()
CHIPS = cluster("h100:8")


SMALL = Strategy(
    name="small",
    about="",
    mesh={"data": "auto", "fsdp": "auto"},
    rules={"batch": ["data", "fsdp"]},
    storage=Storage(params=("fsdp",), gradients=("fsdp",), optimizer="auto"),
    schedule=Schedule(microbatches="auto", remat="auto", offload="auto"),
)


def pinned(chips=CHIPS, step=STEP, batch=BATCH, **pins):
    return Solver(step, (batch,), chips, with_pins(SMALL, pins))


def test_what_fits_is_not_offloaded():
    [plan] = pinned().plans()
    assert plan.strategy.schedule.offload == ()
    assert plan.predicted.memory.host is None
    assert plan.predicted.host_s == 0


def test_what_does_not_fit_is_offloaded_and_written_down():
    fixed = {
        "data": 8,
        "fsdp": 1,
        "storage.params": "none",
        "storage.optimizer": "none",
    }
    fixed |= {"storage.gradients": "none", "remat": "none", "microbatches": 1}
    [held] = pinned(**fixed, offload="none").plans()
    tight = small_memory(CHIPS, 0.9 * held.predicted.memory.total / MEMORY_HEADROOM)
    with pytest.raises(InfeasibleError, match=r"offload = 'auto' \(.* s a step\)"):
        pinned(tight, **fixed, offload="none").plans()
    [plan] = pinned(tight, **fixed).plans()
    kept = plan.strategy.schedule.offload
    assert kept
    host = plan.predicted.memory.host
    assert host.total == host.params + host.optimizer + host.activations
    kinds = ("params", "optimizer", "activations")
    assert all((getattr(host, kind) > 0) == (kind in kept) for kind in kinds)
    assert plan.predicted.host_s > 0
    assert plan.predicted.step_s > held.predicted.step_s
    assert plan.certificate.gap <= 1e-9
    assert plan_from_json(plan_to_json(plan)) == plan


def test_what_cannot_be_run_is_refused_and_left_out():
    [plan] = pinned(offload="optimizer", data=8, remat="none").plans()
    assert plan.not_executable == ("optimizer in the host's memory",)
    with pytest.raises(InputError, match=r"optimizer in the host's.*--executable"):
        ash.parallelize(STEP, plan)
    only = ash.search(STEP, BATCH, cluster=CHIPS, executable=True)
    assert not only.not_executable
    with pytest.raises(InputError, match=r"offload = \['params'\].*cannot be run yet"):
        ash.search(
            STEP, BATCH, cluster=CHIPS, pins={"offload": "params"}, executable=True
        )


def test_a_chip_without_figures_cannot_offload():
    v5e = cluster("v5e:2x4")
    said = []
    found = Solver(STEP, (BATCH,), v5e, SMALL, log=said.append)
    assert found.plans()[0].strategy.schedule.offload == ()
    assert said.count("offload left out: v5e has no figure host.bytes_per_s") == 1
    with pytest.raises(
        InputError, match=r"\['params'\].*figure host.bytes_per_s of v5e"
    ):
        pinned(v5e, offload="params").plans()


PLAIN = ash.train_step(
    lambda w, x: ((x @ w) ** 2).mean(),
    optax.sgd(0.1),
    model=lambda key: np.ones((16, 8), np.float32),
)


@pytest.mark.parametrize(
    ("step", "batch", "kind", "said"),
    [
        (PLAIN, floats(32, 16), "activations", "no blocks keep any"),
        (PLAIN, floats(32, 16), "optimizer", "no optimizer state"),
    ],
)
def test_what_a_program_does_not_have_is_not_offloaded(step, batch, kind, said):
    with pytest.raises(InputError, match=rf"offload = \['{kind}'\].*{said}"):
        pinned(step=step, batch=batch, offload=kind).plans()


def test_blocks_in_a_loop_can_offload_what_they_keep():
    step, batch = scanned_mlp(4), floats(32, 16)
    [plan] = pinned(step=step, batch=batch, offload="activations", remat="full").plans()
    assert plan.strategy.schedule.offload == ("activations",)
    # Four blocks keep their inputs, of 16 float32 each, whatever the microbatches.
    rows = 32 / 8 / plan.microbatches
    assert plan.predicted.memory.host.activations == 4 * rows * 16 * 4


def test_what_to_offload_is_searched_where_nothing_is_fixed():
    schedule = load_strategy("auto").schedule
    assert (schedule.offload, schedule.context_kind) == ("auto", "auto")
    assert load_strategy("fsdp").schedule.offload == ()
    fixed = with_pins(load_strategy("auto"), {"offload": "none"})
    assert fixed.schedule.offload == ()


def test_a_state_is_named_once():
    with pytest.raises(InputError, match=r"offload = .*names a state twice; keep one"):
        with_pins(SMALL, {"offload": "params+params"})
    assert with_pins(SMALL, {"offload": "params+optimizer"}).schedule.offload == (
        "optimizer",
        "params",
    )


def test_the_host_s_memory_is_a_limit():
    pins = {"offload": "params+optimizer", "data": 8, "storage.optimizer": "none"}
    [plan] = pinned(**pins).plans()
    total = plan.predicted.memory.host.total
    # Nine tenths of the host's memory may be used.
    assert pinned(small_host(CHIPS, total / 0.9 + 2), **pins).plans()
    few = small_host(CHIPS, total / 0.9 * 0.99)
    with pytest.raises(InfeasibleError, match=r"a chip has in the host's memory"):
        pinned(few, **pins).plans()
