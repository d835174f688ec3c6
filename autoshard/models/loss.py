"""The training objective, written so that its dims stay apart.

Batch, sequence and vocabulary are never flattened into each other, and the target's
logit is picked by comparison instead of a gather, so each dim can be sharded without
moving the logits.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


def next_token_loss(
    model: Callable[[jax.Array], jax.Array | tuple[jax.Array, jax.Array]],
    batch: Mapping[str, jax.Array],
) -> jax.Array:
    """Mean cross entropy of the targets, in nats per token.

    Args:
        model: maps int32 tokens ``[b, s]`` to float32 logits ``[b, s, vocab]``, or to
            these and a float32 scalar that is added to the loss.
        batch: ``tokens`` and ``targets``, each int32 ``[b, s]``; the targets are the
            tokens one step later. A target outside ``0 .. vocab - 1`` makes the loss
            NaN.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: an entry is missing, or the two differ in shape.

    >>> tokens = jnp.zeros((2, 3), jnp.int32)
    >>> uniform = lambda tokens: jnp.zeros((*tokens.shape, 256))
    >>> float(next_token_loss(uniform, {"tokens": tokens, "targets": tokens}))
    5.545177
    """
    missing = {"tokens", "targets"} - set(batch)
    if missing:
        raise ValueError(
            f"next_token_loss: batch has {sorted(batch)} and lacks {sorted(missing)}; "
            "pass {'tokens': int32[b, s], 'targets': int32[b, s]}"
        )
    tokens, targets = batch["tokens"], batch["targets"]
    if tokens.shape != targets.shape:
        raise ValueError(
            f"next_token_loss: tokens are {list(tokens.shape)} and targets "
            f"{list(targets.shape)}; both must be [batch, seq], the targets being the "
            "tokens shifted by one"
        )
    made = model(tokens)
    logits, penalty = made if isinstance(made, tuple) else (made, None)
    # The largest logit only guards exp against overflow; it cancels in the gradient.
    top = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    targets = targets.astype(jnp.int32)
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    picked = jnp.sum(jnp.where(token == targets[..., None], logits, 0.0), axis=-1)
    # Without this a stray target would pick nothing and count as a logit of zero.
    known = (targets >= 0) & (targets < logits.shape[-1])
    picked = jnp.where(known, picked, jnp.nan)
    loss = jnp.mean(jnp.log(total) + top - picked)
    return loss if penalty is None else loss + penalty
