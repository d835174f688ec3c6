"""Plans that belong to something else are refused, and the difference is named."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.equality import abstract_batch, make_step, pinned

from autoshard import models
from autoshard.ir.errors import InputError, PlanMismatchError
from autoshard.ir.train_step import train_step
from autoshard.lower import parallelize
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.plan.schema import Constraint
from autoshard.search import search_plans


@pytest.fixture(scope="module")
def plan():
    strategy = pinned("dp", microbatches=1, remat="none")
    [plan] = search_plans(
        make_step("llama3-tiny", scan=True),
        (abstract_batch(),),
        cluster("cpu:8"),
        strategy,
    )
    return plan


def test_another_model_names_the_first_tensor_that_differs(plan):
    with pytest.raises(PlanMismatchError) as caught:
        parallelize(make_step("gpt2-tiny", scan=True), plan)
    assert "params/" in str(caught.value)
    assert "float32[" in str(caught.value)


def test_another_optimizer(plan):
    step = dataclasses.replace(
        make_step("llama3-tiny", scan=True), optimizer=optax.sgd(0.1)
    )
    with pytest.raises(PlanMismatchError, match=r"opt_state/.* absent in|in the model"):
        parallelize(step, plan)


def test_another_loss_with_the_same_tensors(plan):
    step = dataclasses.replace(
        make_step("llama3-tiny", scan=True),
        loss_fn=lambda m, b: models.next_token_loss(m, b) * 2 + 1,
    )
    with pytest.raises(PlanMismatchError, match="fingerprint"):
        parallelize(step, plan)


def test_fewer_devices_than_the_plan_needs(plan):
    step = make_step("llama3-tiny", scan=True)
    with pytest.raises(PlanMismatchError, match=r"for 8 chips .* there are 4 devices"):
        parallelize(step, plan, devices=jax.devices()[:4])


def test_a_pin_on_a_value_that_is_not_there(plan):
    pin = Constraint(address="no/such#0", slot="out0", spec=plan.constraints[0].spec)
    edited = plan.model_copy(update={"constraints": (*plan.constraints, pin)})
    with pytest.raises(PlanMismatchError, match="no/such#0"):
        parallelize(make_step("llama3-tiny", scan=True), edited)


def test_a_plain_function_needs_its_arguments():
    def double(w, x):
        return x @ w * 2

    args = (
        jax.ShapeDtypeStruct((16, 16), jnp.float32),
        jax.ShapeDtypeStruct((8, 16), jnp.float32),
    )
    [plan] = search_plans(double, args, cluster("cpu:8"), load_strategy("dp"))
    with pytest.raises(InputError, match="abstract arguments"):
        parallelize(double, plan)
    run = parallelize(double, plan, *args)
    w, x = jnp.eye(16), jnp.arange(128.0).reshape(8, 16)
    assert jnp.array_equal(run(w, x), 2 * x)


def test_a_leaf_that_no_storage_dim_divides_stays_whole_and_is_noted():
    step = train_step(
        lambda p, x: ((x @ p["w"] + p["b"]) ** 2).mean(),
        optax.sgd(0.1, momentum=0.9),
        model=lambda key: {"w": jnp.ones((64, 30)), "b": jnp.ones(30)},
    )
    batch = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    strategy = pinned("fsdp", microbatches=1, remat="none", data=1, fsdp=8)
    [plan] = search_plans(step, (batch,), cluster("cpu:8"), strategy)
    storage = {t.path: t.storage.dims for t in plan.tensors}
    assert storage["params/w"] == (("fsdp",), ())
    assert storage["params/b"] == ((),)
    assert any("params/b (30,) is not sharded over fsdp" in n for n in plan.notes)
