"""nano-moe-jax: a Linen mixture of experts with dropout and an auxiliary loss.

The train step is the package's own, `nano_moe.train.train_step`: a jitted function of
a Flax `TrainState` that holds the dropout key.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from nano_moe.config import NanoMoEConfig
from nano_moe.model import NanoMoE
from nano_moe.train import TrainState, train_step

from clients.common import Case, default_optimizer, of_function, tokens


def nano_moe(size: str, optimizer: Any) -> Case:
    """Four layers of four experts, the package's defaults."""
    config = (
        NanoMoEConfig()
        if size == "full"
        else NanoMoEConfig(
            n_layers=2, n_heads=8, d_model=64, d_ff=128, n_experts=4, block_size=32
        )
    )
    model = NanoMoE(config=config)
    update = optimizer or default_optimizer(size)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        return train_step(state, batch["x"], batch["y"], config)

    def make(seed: int) -> tuple[TrainState]:
        params_key, dropout_key, kept = jax.random.split(jax.random.PRNGKey(seed), 3)
        params = model.init(
            {"params": params_key, "dropout": dropout_key},
            jnp.ones((1, config.block_size), jnp.int32),
            deterministic=False,
        )["params"]
        # As the package's create_train_state, with the optimizer a parameter.
        return (
            TrainState.create(
                apply_fn=model.apply, params=params, tx=update, dropout_rng=kept
            ),
        )

    rows = 64 if size == "full" else 8  # the default of 32 is too few for 64 chips
    batch = tokens(rows, config.block_size, "x", "y")
    high = {"x": config.vocab_size, "y": config.vocab_size}
    return of_function(step, make, batch, high=high)


BUILDERS = {"nano-moe": nano_moe}
