"""The search against brute force, and its answers to what cannot be."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.equality import abstract_batch, make_step, pinned
from helpers.spaces import active, floats, mlp_step, small_memory, written_out

from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.ir.train_step import train_step
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.plan.schema import Certificate
from autoshard.search import search_plans
from autoshard.search.candidates import Space
from autoshard.search.finish import draft
from autoshard.search.pinning import with_pins

NO_CERTIFICATE = Certificate(
    lower_bound_s=1e9, gap=0, enumerated=0, indivisible=0, infeasible=0, complete=True
)


@functools.cache
def all_priced():
    """Seconds and bytes of every plan of the auto strategy, each written and priced."""
    step, batch, strategy = mlp_step(layers=2), floats(4, 32), load_strategy("auto")
    chips = cluster("cpu:4")
    space = Space(step, (batch,), lambda _: None, strategy)
    found, seen = [], set()
    for filled in written_out(
        strategy, chips, batch.shape[0], ("none", "dots", "full")
    ):
        # Only the residual rule and those of the MLP find anything in this program.
        rules = [r for r in filled.rules if r.logical in ("mlp", "seq.residual")]
        key = active(filled.model_copy(update={"rules": tuple(rules)}))
        ways = filled.mesh["data"] * filled.mesh["fsdp"]
        if key in seen or batch.shape[0] % (filled.schedule.microbatches * ways):
            continue
        seen.add(key)
        plan = draft(space, chips, filled, NO_CERTIFICATE).spelled_out()
        found.append((plan.predicted.step_s, plan.predicted.memory.total))
    return found


@pytest.mark.parametrize("memory", [None, 80_000, 60_000])
def test_search_equals_brute_force(memory):
    step = mlp_step(layers=2)
    batch, auto = floats(4, 32), load_strategy("auto")
    chips = cluster("cpu:4")
    if memory is not None:
        chips = small_memory(chips, memory)
    [plan] = search_plans(step, (batch,), chips, auto)
    capacity = plan.predicted.memory.capacity
    expected = min(time for time, bytes_ in all_priced() if bytes_ <= capacity)
    # The search prices accumulation from the program without it; what it chooses is
    # then priced exactly, as every candidate of the brute force is.
    assert plan.predicted.step_s == pytest.approx(expected, rel=1e-2)
    assert plan.predicted.memory.total <= plan.predicted.memory.capacity


def test_the_same_input_gives_the_same_plan():
    step, chips = make_step("llama3-tiny", scan=True), cluster("cpu:8")
    plans = [
        search_plans(step, (abstract_batch(),), chips, load_strategy("auto"))[0]
        for _ in range(2)
    ]
    assert plans[0] == plans[1]


def test_top_plans_differ_and_are_sorted():
    step, chips = make_step("llama3-tiny", scan=True), cluster("cpu:8")
    plans = search_plans(step, (abstract_batch(),), chips, load_strategy("auto"), top=4)
    times = [p.certificate.lower_bound_s for p in plans]
    assert len(plans) == 4
    assert all(t <= p.predicted.step_s for t, p in zip(times, plans, strict=True))
    keys = [
        (p.axes, p.strategy.storage, p.strategy.schedule, p.strategy.rules)
        for p in plans
    ]
    assert len({str(k) for k in keys}) == 4


def test_no_plan_of_auto_is_slower_than_a_fixed_strategy():
    step, chips = make_step("gpt2-tiny", scan=True), cluster("h100:8")
    found = {
        name: search_plans(step, (abstract_batch(),), chips, load_strategy(name))[0]
        for name in ("auto", "dp", "zero2", "fsdp", "megatron-sp", "fsdp-tp")
    }
    best = found["auto"].predicted.step_s
    for name, plan in found.items():
        assert best <= plan.predicted.step_s * 1.0001, name


def test_batch_that_does_not_divide():
    step = mlp_step()
    batch = jax.ShapeDtypeStruct((6, 32), jnp.float32)
    with pytest.raises(InfeasibleError, match=r"batch of 6 .* by 4 \(data\)"):
        search_plans(step, (batch,), cluster("cpu:4"), load_strategy("dp"))


def test_a_model_that_does_not_fit_says_how_much_and_what_would():
    step = mlp_step()
    batch = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    chips = small_memory(cluster("cpu:4"), 100_000)
    with pytest.raises(InfeasibleError) as caught:
        search_plans(step, (batch,), chips, load_strategy("dp"))
    message = str(caught.value)
    assert "are missing" in message
    assert "--strategy auto on the same chips" in message


def test_a_field_in_conflict_is_named_with_its_line_and_what_would_fit():
    step, batch, dp = mlp_step(), floats(8, 32), load_strategy("dp")
    chips = small_memory(cluster("cpu:4"), 170_000)
    with pytest.raises(InfeasibleError) as caught:
        search_plans(step, (batch,), chips, dp)
    message = str(caught.value)
    # dp keeps the optimizer's state whole: the last of its fields that may be a hole.
    said = re.search(
        r"In conflict: storage\.optimizer = \[\]( \(dp\.toml:\d+\))?\.", message
    )
    assert said is not None, message
    # The oracle of a change that is named: it fits, and takes as long as was said.
    said = re.search(
        r"What would fit: ([\w.]+) = 'auto' \(([\d.e-]+) s a step", message
    )
    assert said is not None, message
    opened = with_pins(dp, {said[1]: "auto"})
    [plan] = search_plans(step, (batch,), chips, opened)
    assert plan.predicted.step_s == pytest.approx(float(said[2]), rel=1e-2)


def test_more_chips_are_named_when_only_they_help():
    step = mlp_step()
    batch = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    chips = small_memory(cluster("cpu:4"), 60_000)
    with pytest.raises(InfeasibleError) as caught:
        search_plans(step, (batch,), chips, load_strategy("auto"))
    message = str(caught.value)
    named = next(n for n in (8, 16, 32) if f"{n} chips (cpu:{n})" in message)
    # The oracle for the remedy: it fits there, and not with half as many.
    there = small_memory(cluster(f"cpu:{named}"), 60_000)
    assert search_plans(step, (batch,), there, load_strategy("auto"))


def test_fixed_mesh_that_cannot_be_completed():
    strategy = pinned("fsdp", microbatches="auto", remat="auto", data=3)
    with pytest.raises(InfeasibleError, match=r"data.*3.*cannot be completed"):
        search_plans(
            mlp_step(),
            (jax.ShapeDtypeStruct((8, 32), jnp.float32),),
            cluster("cpu:8"),
            strategy,
        )


def test_plain_function_cannot_be_cut_or_rematerialised():
    def step(w, x):
        return jax.grad(lambda w: ((x @ w) ** 2).mean())(w)

    args = (
        jax.ShapeDtypeStruct((32, 16), jnp.float32),
        jax.ShapeDtypeStruct((8, 32), jnp.float32),
    )
    chips = cluster("cpu:4")
    with pytest.raises(InputError, match=r"train_step\(loss_fn"):
        search_plans(step, args, chips, pinned("dp", microbatches=2, remat="none"))
    with pytest.raises(InputError, match=r"train_step\(loss_fn"):
        search_plans(step, args, chips, pinned("dp", microbatches=1, remat="full"))
    [plan] = search_plans(step, args, chips, load_strategy("dp"))
    assert plan.microbatches == 1


def test_remat_is_left_out_when_no_block_repeats():
    def loss(w, x):
        return ((x @ w) ** 2).mean()

    step = train_step(
        loss, optax.sgd(0.1), model=lambda key: jax.random.normal(key, (32, 16))
    )
    batch = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    said = []
    [plan] = search_plans(
        step, (batch,), cluster("cpu:4"), load_strategy("dp"), log=said.append
    )
    assert plan.remat == "none"
    assert any("no block repeats" in line for line in said)
    assert np.isfinite(plan.predicted.step_s)


def test_a_larger_batch_is_named_when_chips_alone_do_not_help():
    # An odd hidden width, and no axis for sequences, leave only the batch and the
    # storage to shard.
    auto = load_strategy("auto")
    mesh = {axis: size for axis, size in auto.mesh.items() if axis != "context"}
    auto = auto.model_copy(update={"mesh": mesh})
    step, chips = mlp_step(hidden=63), small_memory(cluster("cpu:1"), 60_000)
    with pytest.raises(InfeasibleError) as caught:
        search_plans(step, (floats(2, 32),), chips, auto)
    found = re.search(r"(\d+) chips \(cpu:\1\) and a batch of (\d+)", str(caught.value))
    assert found is not None, caught.value
    there = small_memory(cluster(f"cpu:{found[1]}"), 60_000)
    assert search_plans(step, (floats(int(found[2]), 32),), there, auto)
