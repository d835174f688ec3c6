"""What all clients share: a case and its parts, optimizers, losses, random batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autoshard.ir.train_step import TrainStep

KEY = "dropout_rng"
"""Name of the batch leaf that holds a PRNG key."""


class KeptGradients(NamedTuple):
    """Optimizer state that also holds the gradients it was last given."""

    inner: Any
    gradients: Any


def keeping_gradients() -> optax.GradientTransformation:
    """AdamW whose state shows the gradients, so that two runs can be compared by them.

    Its epsilon is of the size of a gradient. An update is g / (|g| + epsilon), so that
    the rounding of a sum grows by |g| / epsilon on its way into a parameter: with the
    default of 1e-8 a gradient that is zero in exact arithmetic becomes a full update
    whose direction depends on the order of a sum.
    """
    inner = optax.adamw(1e-3, eps=1e-2)

    def init(params: Any) -> KeptGradients:
        return KeptGradients(inner.init(params), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: KeptGradients, params: Any = None) -> Any:
        updates, new = inner.update(grads, state.inner, params)
        return updates, KeptGradients(new, grads)

    return optax.GradientTransformation(init, update)


def default_optimizer(size: str) -> optax.GradientTransformation:
    """AdamW for the full size, AdamW that keeps its gradients for the small one."""
    return optax.adamw(1e-4) if size == "full" else keeping_gradients()


@dataclass(frozen=True)
class Case:
    """One client in one size.

    Attributes:
        step: What `autoshard.search` and `autoshard.parallelize` take: a `TrainStep`,
            or a plain function `(*state, batch) -> (*state, metrics)`.
        abstract_args: What follows it there: `(batch,)` for a `TrainStep`, else
            `(*state, batch)`.
        init: `(seed) -> (*state,)`, concrete; one element for a `TrainStep`.
        high: Upper bound of each integer leaf of the batch, by its name.
        noise: Regular expressions of parameter paths whose gradient is zero in exact
            arithmetic, so that only rounding is left of it.
    """

    step: Any
    abstract_args: tuple[Any, ...]
    init: Callable[[int], tuple[Any, ...]]
    high: dict[str, int] = field(default_factory=dict)
    noise: tuple[str, ...] = ()

    def batch(self, number: int) -> Any:
        """Random data of the right shapes, the same for the same number."""
        rng = np.random.default_rng(number)

        def leaf(path: Any, x: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.random.key(number)
            if jnp.issubdtype(x.dtype, jnp.integer):
                return rng.integers(0, self.high[name], x.shape).astype(x.dtype)
            return rng.standard_normal(x.shape).astype(x.dtype)

        return jax.tree_util.tree_map_with_path(leaf, self.abstract_args[-1])

    def in_float64(self) -> Case:
        """The same case with its state and data in float64 instead of float32."""

        def wide(x: Any) -> Any:
            if getattr(x, "dtype", None) != jnp.float32:
                return x
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(x.shape, jnp.float64)
            return x.astype(jnp.float64)

        return replace(
            self,
            abstract_args=jax.tree.map(wide, self.abstract_args),
            init=lambda seed: jax.tree.map(wide, self.init(seed)),
        )

    def run(self, state: tuple[Any, ...], batch: Any) -> tuple[tuple[Any, ...], Any]:
        """One step on one device, not jitted: the new state and the metrics."""
        *new, metrics = self.step(*state, batch)
        return tuple(new), metrics


def tokens(batch: int, seq: int, *names: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract int32 leaves [batch, seq]."""
    return {name: jax.ShapeDtypeStruct((batch, seq), jnp.int32) for name in names}


def abstract_key() -> jax.ShapeDtypeStruct:
    """An abstract typed PRNG key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Mean over all labels, computed in float32 or better.

    Args:
        logits: float[..., classes].
        labels: int32[...].
    """
    per_label = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), labels
    )
    return per_label.mean()


def of_train_step(step: TrainStep, batch: Any, **more: Any) -> Case:
    """The case of an `autoshard.train_step`."""
    return Case(step, (batch,), lambda seed: (step.init(seed),), **more)


def of_function(
    step: Callable[..., Any],
    make: Callable[[int], tuple[Any, ...]],
    batch: Any,
    **more: Any,
) -> Case:
    """The case of a plain step function.

    Args:
        step: `(*state, batch) -> (*state, metrics)`.
        make: `(seed) -> (*state,)`; traceable.
        batch: The abstract batch.
        **more: Further fields of the case.
    """
    return Case(step, (*jax.eval_shape(lambda: make(0)), batch), make, **more)
