"""Layouts that differ in storage alone share what is decided, and nothing else.

The oracle is each layout propagated by itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.equality import abstract_batch, make_step
from helpers.small_programs import instance
from jax.sharding import PartitionSpec
from propagate.programs import ACTIVATIONS, MLP_WEIGHTS, mlp_step, stacked_step

from autoshard import annotate, train_step
from autoshard.ir.trace import trace
from autoshard.plan.sharded import Layout, ShardedProgram
from autoshard.propagate import UnderRules, find_classes, propagate

STORED = [(), ("data",), ("fsdp",), ("data", "fsdp"), ("tensor", "fsdp")]
RULES = [
    {},
    {"batch": ("data", "fsdp"), "mlp": ("tensor",), "vocab": ("tensor",)},
    {"batch": ("data", "expert"), "expert": ("expert",), "heads": ("tensor",)},
    {"batch": ("fsdp",), "seq.residual": ("tensor",), "mlp": ("tensor",)},
]
SIZES = [{}, {"data": 2, "fsdp": 4, "tensor": 2, "expert": 2}, {"data": 3, "fsdp": 5}]


def without_marks(weights, moments, x):
    """No `TrainStep`: that gradients are such is seen by the state they meet."""
    error = x @ weights["up"] @ weights["down"] - x
    up = x.reshape(-1, x.shape[-1]).T @ (error @ weights["down"].T).reshape(
        -1, weights["up"].shape[-1]
    )
    moment = 0.9 * moments["up"] + up
    return {**weights, "up": weights["up"] - moment}, {**moments, "up": moment}


def of_a_step(step, batch):
    return trace(step, (step.abstract_state(), batch))


def of_the_zoo(name, *, scan):
    return of_a_step(make_step(name, scan=scan), abstract_batch())


def of_an_instance(seed):
    given = instance(seed)
    return of_a_step(given.step, given.batch)


PROGRAMS = {
    "one layer": lambda: of_a_step(mlp_step(), ACTIVATIONS),
    "stacked": lambda: of_a_step(stacked_step(), ACTIVATIONS),
    "no marks": lambda: trace(without_marks, (MLP_WEIGHTS, MLP_WEIGHTS, ACTIVATIONS)),
    "llama": lambda: of_the_zoo("llama3-tiny", scan=True),
    "gpt2 unrolled": lambda: of_the_zoo("gpt2-tiny", scan=False),
    "experts": lambda: of_the_zoo("mixtral-tiny", scan=True),
    **{f"random {seed}": lambda seed=seed: of_an_instance(seed) for seed in range(6)},
}


def layouts(rules, sizes, seed):
    """Several ways to store the state, in any order."""
    stored = list(itertools.product(STORED, repeat=3))
    for params, gradients, optimizer in random.Random(seed).sample(stored, 5):
        yield Layout(
            rules=tuple(rules.items()),
            params=params,
            gradients=gradients,
            optimizer=optimizer,
            sizes=sizes,
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_shared_is_what_each_decides_by_itself(name):
    traced = PROGRAMS[name]()
    classes = find_classes(traced)
    for seed, (rules, sizes) in enumerate(itertools.product(RULES, SIZES)):
        under = None
        for layout in layouts(rules, sizes, seed):
            under = under or UnderRules(traced, classes, layout)
            found = propagate(traced, classes, layout, under)
            alone = propagate(traced, classes, layout)
            for field in dataclasses.fields(ShardedProgram):
                part = field.name
                assert getattr(found, part) == getattr(alone, part), (part, layout)


def test_ops_that_meet_no_storage_are_decided_once():
    traced = of_the_zoo("llama3-tiny", scan=True)
    classes = find_classes(traced)
    rules = tuple(RULES[1].items())
    first, other = (Layout(rules=rules, params=axes) for axes in [(), ("fsdp",)])
    under = UnderRules(traced, classes, first)
    propagate(traced, classes, first, under)
    known = len(under.outcomes)
    propagate(traced, classes, first, under)
    assert len(under.outcomes) == known
    propagate(traced, classes, other, under)
    assert known < len(under.outcomes) < 2 * known


def test_what_the_user_fixed_is_shared_too():
    def fn(weights, x):
        hidden = jax.lax.with_sharding_constraint(
            x @ weights["up"], PartitionSpec("data", None, "tensor")
        )
        return hidden @ weights["down"]

    traced = trace(fn, (MLP_WEIGHTS, ACTIVATIONS))
    classes = find_classes(traced)
    for seed, sizes in enumerate(SIZES):
        under = None
        for layout in layouts(RULES[1], sizes, seed):
            under = under or UnderRules(traced, classes, layout)
            assert propagate(traced, classes, layout, under) == propagate(
                traced, classes, layout
            )


def test_other_rules_are_refused():
    traced = of_a_step(mlp_step(), ACTIVATIONS)
    classes = find_classes(traced)
    under = UnderRules(traced, classes, Layout(rules=()))
    with pytest.raises(AssertionError):
        propagate(traced, classes, Layout(rules=(("mlp", ("tensor",)),)), under)


SQUARE = (64, 64)


def skips_bad_steps(state, x):
    """No `TrainStep`; scalars made of the data meet stored state."""
    x = annotate(x, "batch", None)
    loss, found = jax.value_and_grad(lambda w: ((x @ w) ** 2).mean())(state["w"])
    found = found * jnp.minimum(1.0, jax.lax.rsqrt((found**2).sum()))
    moment = 0.9 * state["m"] + found
    new = {"w": state["w"] - moment, "m": moment}
    good = jnp.isfinite(loss)
    return jax.tree.map(lambda own, old: jnp.where(good, own, old), new, state)


def weight_norm_step(microbatches=1):
    """The gradient of the product is used twice before it is one of a parameter."""

    def loss(p, x):
        w = p["w"] * jax.lax.rsqrt((p["w"] ** 2).sum(0)) * p["g"]
        return ((annotate(x, "batch", None) @ w) ** 2).mean()

    def init(key):
        return {"w": jax.random.normal(key, SQUARE), "g": jnp.ones(SQUARE[1:])}

    return train_step(loss, optax.adam(1e-3), model=init).with_schedule(
        microbatches=microbatches, remat="none"
    )


@pytest.mark.parametrize("name", ["scalars", "weight norm", "behind barriers"])
def test_stored_state_is_gathered_for_products_alone(name):
    x = jax.ShapeDtypeStruct((32, *SQUARE[:1]), jnp.float32)
    if name == "scalars":
        w = jax.ShapeDtypeStruct(SQUARE, jnp.float32)
        traced = trace(skips_bad_steps, ({"w": w, "m": w}, x))
    else:
        # Microbatches meet parameters behind barriers.
        traced = of_a_step(weight_norm_step(1 if name == "weight norm" else 2), x)
    stored = dict.fromkeys(("params", "gradients", "optimizer"), ("fsdp",))
    layout = Layout(rules=(("batch", ("data", "fsdp")),), **stored)
    found = propagate(traced, find_classes(traced), layout)
    ops = traced.program.ops
    moved = [
        (ops[move.op].primitive, move.target)
        for move in found.reshards
        if traced.program.values[move.value].shape == SQUARE
    ]
    assert moved
    gathered = {kind for kind, target in moved if not any(target)}
    assert gathered == {"dot_general"}
    # Gradients are scattered where they are made, not summed everywhere.
    scattered = [m for m in found.reshards if m.unreduced and any(m.target)]
    assert scattered
    assert not [
        m
        for m in found.reshards
        if m.unreduced
        and not any(m.target)
        and traced.program.values[m.value].shape == SQUARE
    ]
