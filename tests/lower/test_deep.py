"""A plan found with few copies of a block runs the step that has all of them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers.equality import relative
from helpers.unrolled import ROWS, WIDTH, layer_of, step_of

import autoshard as ash
from autoshard.ir.errors import PlanMismatchError
from autoshard.ir.few import Few, few_of

LAYERS = 18


def layers():
    """Of other values each, so that no copy can be taken for another one."""
    rng = np.random.default_rng(0)

    def drawn(x):
        return rng.normal(0, 0.3, x.shape).astype(np.float32)

    return {k: jax.tree.map(drawn, layer_of()) for k in range(LAYERS)}


@pytest.mark.parametrize(
    ("strategy", "pins"),
    [
        ("fsdp-tp", {"fsdp": 4, "rules.mlp": "tensor", "microbatches": 1}),
        pytest.param(
            "fsdp-tp",
            {"fsdp": 2, "remat": "full", "microbatches": 2},
            marks=pytest.mark.one_jax,
        ),
        pytest.param("zero1", {"microbatches": 1}, marks=pytest.mark.one_jax),
    ],
)
def test_a_deep_plan_is_equal_to_one_device(strategy, pins):
    step = step_of(layers())
    x = np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)
    few = few_of(step.with_schedule(microbatches=1, remat="none"), x)
    assert isinstance(few, Few), few
    plan = ash.search(step, x, cluster="cpu:8", strategy=strategy, pins=pins)
    assert sum(t.path.startswith("params/blocks/") for t in plan.tensors) == 3 * LAYERS
    parallel = ash.parallelize(step, plan)
    single, several = step.init(0), parallel.init(0)
    run = jax.jit(step)
    for _ in range(2):
        single, want = run(single, x)
        several, got = parallel(several, x)
        assert relative(got["loss"], want["loss"]) < 1e-5
        for a, b in zip(jax.tree.leaves(several), jax.tree.leaves(single), strict=True):
            assert relative(a, b) < 1e-4


def test_the_step_of_a_deep_plan_must_be_the_same():
    x = np.ones((ROWS, WIDTH), np.float32)
    plan = ash.search(step_of(layers()), x, cluster="cpu:8", strategy="dp")
    other = step_of({k: layer_of() for k in range(LAYERS + 1)})
    with pytest.raises(PlanMismatchError):
        ash.parallelize(other, plan, x)
