"""What functions pass on to `solver` is typed, and shown, as `solver` takes it."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import autoshard as ash
from autoshard.api.inputs import Asked, Wishes


def keywords(function):
    found = inspect.signature(function).parameters.values()
    return {p.name: p for p in found if p.kind is p.KEYWORD_ONLY}


def test_the_types_are_those_of_solver():
    typed = {
        name: given.__forward_arg__ for name, given in Asked.__annotations__.items()
    }
    taken = keywords(ash.solver)
    needed = {name for name, p in taken.items() if p.default is p.empty}
    assert typed == {
        name: f"Required[{p.annotation}]" if name in needed else p.annotation
        for name, p in taken.items()
    }


@pytest.mark.parametrize(
    ("function", "kind", "own"),
    [
        (ash.search, Asked, {"top"}),
        (ash.size, Wishes, {"cluster", "target_tokens_per_s", "budget_gib", "log"}),
    ],
)
def test_what_is_passed_on_is_shown_with_its_default(function, kind, own):
    shown, taken = keywords(function), keywords(ash.solver)
    assert shown.keys() == own | kind.__annotations__.keys()
    for name in kind.__annotations__.keys() - own:
        assert shown[name] == taken[name]


@pytest.mark.parametrize("function", [ash.search, ash.size])
def test_a_keyword_that_nobody_takes_is_refused(function):
    step = ash.train_step(
        lambda w, x: ((x @ w) ** 2).mean(), optax.sgd(0.1), model=jax.random.normal
    )
    batch = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    extra = {"budget_gib": 1} if function is ash.size else {}
    cluster = "cpu" if function is ash.size else "cpu:2"
    with pytest.raises(TypeError, match="unexpected keyword argument 'wish'"):
        function(step, batch, cluster=cluster, wish="dp", **extra)


def test_size_obeys_pins():
    step = ash.train_step(
        lambda w, x: ((x @ w) ** 2).mean(),
        optax.adamw(0.1),
        model=lambda key: jax.random.normal(key, (64, 32)),
    )
    batch = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    found = ash.size(step, batch, cluster="cpu", budget_gib=1, pins={"fsdp": 2})
    assert found.plan.cluster.num_chips == found.plan.sizes["fsdp"] == 2
