"""From a case to what it says: a JAX function or a train step, and its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fuzz.describe import Array, Case, floating
from fuzz.ops_structure import loss_of, run_body

import autoshard as ash
from autoshard.plan.strategy import Strategy


@dataclass(frozen=True)
class Built:
    """A case as a function with arguments.

    Attributes:
        fn: A train step or a plain function of state and batch.
        args: Its arguments, as numbers.
        given: What `search` gets: the batch alone for a train step.
    """

    fn: Any
    args: tuple[Any, ...]
    given: tuple[Any, ...]


def numbers(array: Array, rng: np.random.Generator) -> Any:
    """What an input holds."""
    if array.dtype == "key":
        return jax.random.key(int(rng.integers(1 << 16)))
    if array.dtype == "int32":
        return rng.integers(0, array.below, array.shape, np.int32)
    assert floating(array), array
    return rng.uniform(-1.5, 1.5, array.shape).astype(array.dtype)


def build(case: Case) -> Built:
    """The function of a case.

    In a train step the float state is what is trained; integers and keys beside it
    are constants of the loss.
    """
    rng = np.random.default_rng(case.seed)
    held = [numbers(a, rng) for a in case.body.inputs]
    state, batch = held[: case.state], held[case.state :]
    if not case.train:

        def fn(state: list[Any], batch: list[Any]) -> list[Any]:
            return run_body(case.body, [*state, *batch])

        args = (state, batch)
        return Built(fn, args, jax.tree.map(jax.typeof, args))
    data = {f"x{k}": x for k, x in enumerate(batch)}
    floats = {
        f"w{k}": x
        for k, (x, a) in enumerate(zip(state, case.body.inputs, strict=False))
        if floating(a)
    }

    def loss(params: dict[str, Any], batch: dict[str, Any]) -> Any:
        given = [params.get(f"w{k}", x) for k, x in enumerate(state)]
        return loss_of(run_body(case.body, [*given, *batch.values()]))

    step = ash.train_step(
        loss,
        optax.sgd(0.5, momentum=0.9),
        model=lambda key: jax.tree.map(jnp.asarray, floats),
    )
    return Built(step, (step.init(0), data), (jax.tree.map(jax.typeof, data),))


def strategy_of(case: Case) -> Strategy:
    """The strategy of a case; nothing in it is left to search."""
    return Strategy(
        name="random",
        about="A strategy of a random program.",
        mesh=dict(case.mesh),
        rules=dict(case.rules),
        storage=dict(case.storage),
    )
