"""Sharded against single-device: loss, gradients and updated state, leaf by leaf."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autoshard import models
from autoshard.ir.train_step import path_string, train_step
from autoshard.lower import parallelize
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy, plan_from_json, plan_to_json
from autoshard.plan.strategy import Strategy
from autoshard.search import search_plans
from autoshard.search.space import executable

BATCH, SEQ, STEPS = 16, 32, 3


def adamw():
    """AdamW whose epsilon is above the rounding noise of a gradient.

    GPT-2's key biases have a gradient of exactly zero in exact arithmetic: what is
    left is rounding, which the default epsilon of 1e-8 turns into a full-size update
    in either direction, on one device or on many.
    """
    return optax.adamw(1e-3, eps=1e-4)


def make_step(name: str, *, scan: bool):
    config = dataclasses.replace(
        models.get(name), scan_layers=scan, dtype="float32", param_dtype="float32"
    )
    return train_step(
        models.next_token_loss, adamw(), model=lambda rngs: models.build(config, rngs)
    )


def abstract_batch(size=BATCH):
    leaf = jax.ShapeDtypeStruct((size, SEQ), jnp.int32)
    return {"tokens": leaf, "targets": leaf}


@functools.lru_cache
def batches():
    rng = np.random.default_rng(0)
    return tuple(
        {
            key: rng.integers(0, 256, (BATCH, SEQ)).astype(np.int32)
            for key in ("tokens", "targets")
        }
        for _ in range(STEPS)
    )


def _keeping_gradients() -> optax.GradientTransformation:
    """AdamW whose state also holds the gradients it was last given.

    So the comparison covers what was accumulated and reduced, leaf by leaf, and not
    only how far a parameter moved.
    """
    inner = adamw()

    def init(params: Any) -> Any:
        return (inner.init(params), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        updates, new = inner.update(grads, state[0], params)
        return updates, (new, grads)

    return optax.GradientTransformation(init, update)


def with_gradients(step):
    """The same step whose optimizer state also holds the last gradients."""
    return dataclasses.replace(step, optimizer=_keeping_gradients())


@functools.lru_cache
def reference(name: str, scan: bool):
    """Initial state and the state and metrics after each step, on one device."""
    step = with_gradients(make_step(name, scan=scan))
    run = jax.jit(step)
    state = step.init(0)
    results = []
    for batch in batches():
        state, metrics = run(state, batch)
        results.append(jax.tree.map(np.asarray, (state, metrics)))
    return step, results


def relative(a: Any, b: Any) -> float:
    """Norm of the difference over the norm of the reference."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    difference = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
    return difference if math.isfinite(difference) else math.inf  # max() skips a NaN


def run_and_compare(
    name: str, scan: bool, strategy: Strategy, *, chips: str = "cpu:8"
) -> dict[str, Any]:
    """Searches, saves, loads, runs; returns the worst relative difference by kind."""
    step, expected = reference(name, scan)
    only = executable(strategy)
    [plan] = search_plans(step, (abstract_batch(),), cluster(chips), only)
    text = plan_to_json(plan)
    loaded = plan_from_json(text)
    parallel = parallelize(step, loaded)
    state = parallel.init(0)
    worst = {"loss": 0.0, "gradients": 0.0, "params": 0.0, "optimizer": 0.0}
    where = dict.fromkeys(worst, "")
    for batch, (want, want_metrics) in zip(batches(), expected, strict=True):
        state, metrics = parallel(state, batch)
        worst["loss"] = max(
            worst["loss"], relative(metrics["loss"], want_metrics["loss"])
        )
        got_leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        for (path, got), leaf in zip(got_leaves, jax.tree.leaves(want), strict=True):
            key = path_string(path)
            kind = (
                "params"
                if key.startswith("params")
                else "gradients"
                if key.startswith("opt_state/1")
                else "optimizer"
            )
            difference = relative(got, leaf)
            if difference > worst[kind]:
                worst[kind], where[kind] = difference, key
    return {
        "mesh": {a.axis: a.size for a in plan.axes if a.size > 1},
        "microbatches": plan.microbatches,
        "remat": plan.remat,
        "round_trip": plan_to_json(loaded) == text,
        "worst": worst,
        "where": where,
    }


def pinned(name: str, *, microbatches: int | str, remat: str, **mesh: int) -> Strategy:
    """A shipped strategy with its schedule and some mesh sizes fixed."""
    strategy = load_strategy(name)
    return strategy.model_copy(
        update={
            "mesh": {**strategy.mesh, **mesh},
            "schedule": strategy.schedule.model_copy(
                update={"microbatches": microbatches, "remat": remat}
            ),
        }
    )
