"""The loss against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoshard.models import next_token_loss


def test_loss_is_the_mean_negative_log_probability():
    rng = np.random.default_rng(0)
    logits = rng.normal(0.0, 3.0, (2, 5, 7))
    targets = rng.integers(0, 7, (2, 5))
    probability = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    picked = [probability[b, s, targets[b, s]] for b in range(2) for s in range(5)]
    got = next_token_loss(
        lambda tokens: jnp.asarray(logits, jnp.float32),
        {"tokens": jnp.zeros((2, 5), jnp.int32), "targets": jnp.asarray(targets)},
    )
    assert got.dtype == jnp.float32
    assert got.shape == ()
    np.testing.assert_allclose(got, -np.log(picked).mean(), rtol=1e-5)


def test_gradient_is_probability_minus_one_hot():
    logits = jnp.asarray([[[1.0, 2.0, 0.5]]])
    one = jnp.asarray([[1]])
    grad = jax.grad(
        lambda x: next_token_loss(lambda tokens: x, {"tokens": one, "targets": one})
    )(logits)
    want = np.exp([1.0, 2.0, 0.5]) / np.exp([1.0, 2.0, 0.5]).sum() - [0, 1, 0]
    np.testing.assert_allclose(grad[0, 0], want, rtol=1e-5)


def test_large_logits_do_not_overflow():
    one = jnp.zeros((1, 1), jnp.int32)
    loss = next_token_loss(
        lambda tokens: jnp.asarray([[[1e4, 1e4]]]), {"tokens": one, "targets": one}
    )
    np.testing.assert_allclose(loss, np.log(2), atol=1e-3)


@pytest.mark.parametrize("stray", [-1, 4])
def test_a_target_outside_the_vocabulary_makes_the_loss_nan(stray):
    tokens = jnp.zeros((1, 2), jnp.int32)
    loss = next_token_loss(
        lambda tokens: jnp.zeros((1, 2, 4)),
        {"tokens": tokens, "targets": tokens.at[0, 1].set(stray)},
    )
    assert bool(jnp.isnan(loss))


def test_small_integer_targets_are_compared_at_full_width():
    tokens = jnp.zeros((1, 1), jnp.int32)
    logits = jnp.zeros((1, 1, 300)).at[0, 0, 256].set(50.0)
    loss = next_token_loss(
        lambda tokens: logits,
        {"tokens": tokens, "targets": tokens.astype(jnp.uint8)},
    )
    np.testing.assert_allclose(loss, 50.0, rtol=1e-5)


def test_missing_and_mismatched_entries_are_named():
    tokens = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"lacks \['targets'\]"):
        next_token_loss(lambda tokens: tokens, {"tokens": tokens})
    with pytest.raises(ValueError, match=r"targets \[1, 1\]"):
        next_token_loss(
            lambda tokens: tokens, {"tokens": tokens, "targets": tokens[:, :1]}
        )
