"""dm-haiku's ResNet-50: parameters and batch statistics as plain nested dicts."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from clients.common import Case, cross_entropy, default_optimizer, of_function


def resnet50(size: str, optimizer: Any) -> Case:
    """ResNet-50 v1 on ImageNet (He et al. 2015, arXiv:1512.03385)."""
    rows, side, labels = (512, 224, 1000) if size == "full" else (16, 32, 16)

    def forward(images: Any) -> Any:
        if size == "full":
            model: Any = hk.nets.ResNet50(labels)
        else:
            model = hk.nets.ResNet(
                blocks_per_group=(1, 1, 1, 1),
                num_classes=labels,
                channels_per_group=(16, 32, 32, 64),
                logits_config={"w_init": None},  # zeros would stop every gradient
            )
        return model(images, is_training=True)

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    update = optimizer or default_optimizer(size)
    images = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32)

    def step(params: Any, stats: Any, opt_state: Any, batch: Any) -> Any:
        def loss_of(params: Any) -> Any:
            logits, after = net.apply(params, stats, batch["images"])
            return cross_entropy(logits, batch["labels"]), after

        (loss, after), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = update.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), after, opt_state, {"loss": loss}

    def make(seed: int) -> tuple[Any, Any, Any]:
        params, stats = net.init(
            jax.random.PRNGKey(seed), jnp.zeros((1, side, side, 3), jnp.float32)
        )
        return params, stats, update.init(params)

    batch = {"images": images, "labels": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    return of_function(step, make, batch, high={"labels": labels})


BUILDERS = {"haiku-resnet50": resnet50}
