"""A small model whose layers are given one by one, in the order in which they run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from autoshard.ir.train_step import train_step

WIDTH, HIDDEN, ROWS = 16, 32, 8
BATCH = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


def block(layer, x):
    y = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"]
    return x + jnp.tanh(y @ layer["up"]) @ layer["down"]


def layer_of(width=HIDDEN):
    return {
        "scale": jnp.ones(WIDTH),
        "up": jnp.ones((WIDTH, width)),
        "down": jnp.ones((width, WIDTH)),
    }


def step_of(layers, run=block, optimizer=None, loss=None):
    """A train step.

    Args:
        layers: Parameters of each layer, by a name that a pytree sorts by.
        run: `(parameters of a layer, x)` to the next x.
        optimizer: Of the step; by default AdamW.
        loss: In place of one that runs all layers.
    """

    def model(key):
        return {"blocks": layers, "head": jnp.ones((WIDTH, 4))}

    def usual(params, x):
        for name in layers:
            x = run(params["blocks"][name], x)
        return ((x @ params["head"]) ** 2).mean()

    return train_step(loss or usual, optimizer or optax.adamw(1e-3), model=model)
