"""Annotations that cannot be honoured."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers.equality import pinned
from jax.sharding import PartitionSpec as P

from autoshard.ir.annotate import annotate
from autoshard.ir.errors import InfeasibleError, InputError, NameUnknownError
from autoshard.ir.trace import trace
from autoshard.ir.train_step import train_step
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.plan.strategy import Rule
from autoshard.search import search_plans
from autoshard.search.annotations import check_annotations

BATCH = jax.ShapeDtypeStruct((16, 32), jnp.float32)


def step_with(up_names, down_names, hidden=64, seen=None):
    class Mlp(nnx.Module):
        def __init__(self, rngs):
            key = rngs.params()
            self.up = nnx.Param(
                jax.random.normal(key, (32, hidden)), out_sharding=up_names
            )
            self.down = nnx.Param(
                jax.random.normal(key, (hidden, 32)), out_sharding=down_names
            )

        def __call__(self, x):
            if seen is not None:
                x = annotate(x, *seen)
            return jnp.tanh(x @ self.up[...]) @ self.down[...]

    return train_step(
        lambda model, x: (model(x) ** 2).mean(), optax.sgd(0.1), model=Mlp
    )


def search(step, strategy="megatron-tp", chips="cpu:8"):
    if isinstance(strategy, str):
        strategy = load_strategy(strategy)
    return search_plans(step, (BATCH,), cluster(chips), strategy)[0]


def test_good_annotations_are_honoured():
    strategy = pinned("megatron-tp", microbatches=1, remat="none", data=1, tensor=8)
    plan = search(step_with(("embed", "mlp"), ("mlp", "embed")), strategy)
    specs = {t.path: t.compute.dims for t in plan.tensors}
    assert specs["params/up"] == ((), ("tensor",))
    assert specs["params/down"] == (("tensor",), ())


def test_unknown_axis_names_the_parameter_and_the_closest_name():
    with pytest.raises(NameUnknownError) as caught:
        search(step_with(("embd", "mlp"), ("mlp", "embed")))
    assert "parameter params/up of shape (32, 64)" in str(caught.value)
    assert "Did you mean 'embed'?" in str(caught.value)


def test_unknown_axis_of_an_activation_names_the_source_line():
    step = step_with(("embed", "mlp"), ("mlp", "embed"), seen=("batch", "chanel"))
    with pytest.raises(NameUnknownError, match=r"test_annotations\.py:\d+"):
        search(step)


def test_an_axis_of_ones_own_is_fine_once_the_strategy_has_a_rule():
    step = step_with(("channel", "mlp"), ("mlp", "channel"))
    strategy = load_strategy("megatron-tp")
    rules = (*strategy.rules, Rule(logical="channel", axes=()))
    assert search(step, strategy.model_copy(update={"rules": rules}))


def read(up, down=(None, None), hidden=64, **asked):
    """The check's notes for a strategy that fixes tensor = 8."""
    strategy = pinned("megatron-tp", microbatches=1, remat="none", data=1, tensor=8)
    strategy = strategy.model_copy(update=asked)
    traced = trace(step_with(up, down, hidden), [BATCH], aliases=strategy.aliases)
    return check_annotations(traced, strategy)


def test_a_mesh_axis_in_place_of_a_logical_one_is_honoured():
    strategy = pinned("megatron-tp", microbatches=1, remat="none", data=1, tensor=8)
    plan = search(step_with((None, "tp"), ("tp", None)), strategy)
    specs = {t.path: t.compute.dims for t in plan.tensors}
    assert specs["params/up"] == ((), ("tensor",))
    assert specs["params/down"] == (("tensor",), ())


def test_a_mesh_axis_that_stands_for_none():
    step = train_step(
        lambda w, x: (jax.lax.with_sharding_constraint(x @ w, P("rows")) ** 2).mean(),
        optax.sgd(0.1),
        model=lambda key: jnp.ones((32, 8)),
    )
    with pytest.raises(NameUnknownError) as caught:
        search(step)
    message = str(caught.value)
    assert "with_sharding_constraint at " in message
    assert "test_annotations.py:" in message
    assert "unknown mesh axis 'rows'" in message
    assert '[aliases] rows = "data"' in message


def test_a_name_of_a_strategy_for_a_mesh_axis():
    assert read((None, "rows"), aliases={"rows": "tensor"}) == ()


def test_a_mesh_axis_on_two_dims():
    with pytest.raises(InputError) as caught:
        read(P("tensor", "tp"))
    message = str(caught.value)
    assert "nnx out_sharding of params/up asks for [tensor, tp]" in message
    assert "'tensor' (tensor and tp) shards two dims" in message


def test_a_mesh_axis_that_does_not_divide():
    with pytest.raises(InputError) as caught:
        read((None, "tp"), hidden=60)
    message = str(caught.value)
    assert "nnx out_sharding of params/up of shape (32, 60)" in message
    assert "dim 1 of size 60 is not divisible by 8 (tensor = 8" in message


def test_a_mesh_axis_that_the_strategy_does_not_have_is_noted():
    [note] = read((None, "context"))
    assert "params/up asks for mesh axis 'context', which strategy" in note


def test_a_lost_annotation_stops_the_search():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.ones((32, 8)), sharding_metadata=("embed", "mlp"))

    step = train_step(lambda net, x: (x @ net.w[...]).mean(), optax.sgd(0.1), model=Net)
    with pytest.raises(InputError, match=r"sharding_metadata=.* of params/w: flax"):
        search(step)


def test_two_dims_that_want_one_axis():
    with pytest.raises(InputError) as caught:
        search(step_with(("heads", "mlp"), ("mlp", "embed")))
    message = str(caught.value)
    assert "parameter params/up" in message
    assert "'heads' and 'mlp' both shard over mesh axis 'tensor'" in message


def test_a_dim_that_does_not_divide_names_the_parameter():
    strategy = pinned("megatron-tp", microbatches=1, remat="none", data=1, tensor=8)
    with pytest.raises(InfeasibleError) as caught:
        search(step_with(("embed", "mlp"), ("mlp", "embed"), hidden=60), strategy)
    message = str(caught.value)
    assert (
        "60, the size of dim 0 (mlp) of params/down and of dim 1 (mlp) of params/up, "
        "is not divisible by 8 (tensor)"
    ) in message


def test_a_name_per_dim_is_required():
    with pytest.raises(InputError, match="'params/up' names 1 dims"):
        search(step_with(("mlp",), ("mlp", "embed")))
