"""A program without annotations is laid out like the annotated one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.equality import abstract_batch, make_step, pinned

from autoshard.ir.train_step import train_step
from autoshard.plan.cluster import cluster
from autoshard.search import search_plans


def without_annotations(step):
    bare = dataclasses.replace(step)
    vars(bare)["logical_axes"] = {}
    return bare


@pytest.mark.parametrize("model", ["llama3-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("scan", [True, False])
def test_roles_find_what_the_zoo_annotates(model, scan):
    strategy = pinned("megatron-sp", microbatches=1, remat="none", data=2, tensor=4)
    step = make_step(model, scan=scan)
    specs = []
    for each in (step, without_annotations(step)):
        [plan] = search_plans(each, (abstract_batch(),), cluster("cpu:8"), strategy)
        specs.append({t.path: t.compute.dims for t in plan.tensors})
    assert any("tensor" in dim for dims in specs[0].values() for dim in dims)
    assert specs[1] == specs[0]


def test_hidden_width_of_a_plain_mlp():
    def loss(params, x):
        return ((x + jnp.tanh(x @ params["a"]) @ params["b"]) ** 2).mean()

    step = train_step(
        loss,
        optax.adam(1e-3),
        model=lambda key: {"a": jnp.ones((32, 64)), "b": jnp.ones((64, 32))},
    )
    strategy = pinned("megatron-tp", microbatches=1, remat="none", data=2, tensor=4)
    batch = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    [plan] = search_plans(step, (batch,), cluster("cpu:8"), strategy)
    specs = {t.path: t.compute.dims for t in plan.tensors}
    assert specs["params/a"] == ((), ("tensor",))
    assert specs["params/b"] == (("tensor",), ())
    forward = [c for c in plan.predicted.collectives if c.address.startswith("jvp")]
    assert [c.kind for c in forward if c.axes == ("tensor",)] == ["all_reduce"]
