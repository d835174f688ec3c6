"""What the backward pass recomputes, counted in its program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import autoshard as ash
from autoshard.ir.errors import InputError
from autoshard.ir.remat import check_remat, names_of
from autoshard.ir.trace import trace

BLOCKS, WIDTH = 3, 8
BATCH = jax.ShapeDtypeStruct((4, 2, WIDTH), jnp.float32)


def step(scan):
    """Blocks of a product with a weight and one of activations, with a batch dim."""

    def block(x, w):
        y = jnp.tanh(checkpoint_name(x @ w, "hidden"))
        scores = checkpoint_name(jnp.einsum("bqd,bkd->bqk", y, y), "scores")
        return x + jnp.einsum("bqk,bkd->bqd", jnp.tanh(scores), y)

    def loss(w, x):
        if scan:
            return jax.lax.scan(lambda x, w: (block(x, w), None), x, w)[0].mean()
        for k in range(BLOCKS):
            x = block(x, w[k])
        return x.mean()

    def model(key):
        return 0.3 * jax.random.normal(key, (BLOCKS, WIDTH, WIDTH))

    return ash.train_step(loss, optax.sgd(0.1), model=model)


def of_remat(remat, scan=True):
    return step(scan).with_schedule(microbatches=1, remat=remat)


def recomputed(remat, scan=True):
    """How often the step multiplies with a weight, and otherwise, and takes a tanh."""
    program = trace(of_remat(remat, scan), (BATCH,)).program
    counts = {"weights": 0, "scores": 0, "tanh": 0}
    for op in program.ops:
        runs = program.runs(op.region)
        if op.primitive == "tanh":
            counts["tanh"] += runs
        if op.primitive == "dot_general":
            batched = bool(op.params["dimension_numbers"][1][0])
            counts["scores" if batched else "weights"] += runs
    return {kind: count / BLOCKS for kind, count in counts.items()}


def test_what_is_recomputed():
    # Forward, and two gradients of a product: once with its weight, twice without. The
    # tanh of a block is made forward; two of them.
    none = recomputed("none")
    assert none == {"weights": 3, "scores": 6, "tanh": 2}
    full = recomputed("full")
    # The block's result is not needed, so neither is its last product.
    assert full == {"weights": 4, "scores": 7, "tanh": 4}
    dots = recomputed("dots")
    assert dots == {"weights": 3, "scores": 7, "tanh": 4}
    # What is named is kept, whatever made it.
    assert recomputed("save:hidden") == dots
    assert recomputed("save:scores") == {"weights": 4, "scores": 6, "tanh": 4}
    both = recomputed("save:hidden+scores")
    assert both == {"weights": 3, "scores": 6, "tanh": 4}


def test_unrolled_blocks_recompute_the_same():
    none = recomputed("none", scan=False)
    for remat in ("full", "dots", "save:scores"):
        more = recomputed(remat, scan=False)
        scanned, plain = recomputed(remat), recomputed("none")
        for kind in none:
            assert more[kind] - none[kind] == pytest.approx(
                scanned[kind] - plain[kind]
            ), (remat, kind)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["full", "dots", "save:hidden"])
def test_gradients_are_the_same(remat, scan):
    batch = jax.random.normal(jax.random.key(1), BATCH.shape)
    plain = of_remat("none", scan)
    want, metrics = jax.jit(plain)(plain.init(0), batch)
    again = of_remat(remat, scan)
    got, other = jax.jit(again)(again.init(0), batch)
    np.testing.assert_allclose(got.params, want.params, rtol=1e-6)
    np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-6)


def test_a_name_that_is_nowhere_is_an_error():
    with pytest.raises(InputError, match=r"saves other.*it has hidden"):
        trace(of_remat("save:hidden+other"), (BATCH,))


@pytest.mark.parametrize("text", ["half", "save:", "save:a+", "", "dot"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="'none', 'full', 'dots' or 'save:NAME"):
        check_remat(text)


def test_names_are_read_in_order():
    assert names_of("save:b+a") == ("b", "a")
    assert names_of("dots") is None
