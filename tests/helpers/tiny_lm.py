"""A language model so small that the whole command line can be tried on it.

`helpers.tiny_lm:build` names it there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from autoshard.ir.train_step import TrainStep, train_step

MODEL = "helpers.tiny_lm:build"
VOCAB, WIDTH, HIDDEN, LAYERS = 64, 32, 64, 2


def build() -> TrainStep:
    """A step of two residual MLPs between an embedding and its transpose."""

    def loss(params: Any, batch: Any) -> jax.Array:
        x = params["embed"][batch["tokens"]]
        for up, down in zip(params["up"], params["down"], strict=True):
            x = x + jnp.tanh(x @ up) @ down
        logits = x @ params["embed"].T
        targets = batch["targets"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def model(key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        return {
            "embed": jax.random.normal(keys[0], (VOCAB, WIDTH)),
            "up": list(jax.random.normal(keys[1], (LAYERS, WIDTH, HIDDEN))),
            "down": list(jax.random.normal(keys[2], (LAYERS, HIDDEN, WIDTH))),
        }

    return train_step(loss, optax.adamw(1e-3), model=model)
