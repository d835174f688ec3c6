"""What the backward pass recomputes, counted in its program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import autoshard as ash
from autoshard.ir.blocks import count_blocks
from autoshard.ir.checkpointing import checkpoint_blocks
from autoshard.ir.errors import InputError
from autoshard.ir.remat import check_remat, names_of, parts_of
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
def test_the_blocks_of_a_mix_recompute_what_their_policies_do(scan):
    # As many blocks as it says recompute what they all do with one policy.
    alone = {remat: recomputed(remat, scan) for remat in ("none", "full", "dots")}
    for mix, counts in (
        ("full=1,none=2", {"full": 1, "none": 2}),
        ("none=2,dots=1", {"none": 2, "dots": 1}),
        ("none=1,full=1,dots=1", {"none": 1, "full": 1, "dots": 1}),
    ):
        found = recomputed(mix, scan)
        for kind, count in found.items():
            whole = sum(n * alone[remat][kind] for remat, n in counts.items())
            assert count == pytest.approx(whole / BLOCKS), (mix, kind)


def test_a_mix_goes_in_the_order_in_which_blocks_run():
    def fn(w, x, reverse):
        def block(x, w):
            y = jnp.sin(x * w)
            return y, y.sum()

        return jax.lax.scan(block, x, w, reverse=reverse)

    w, x = 1 + jnp.arange(3.0), jnp.full((4,), 0.5)
    for reverse in (False, True):
        mixed = checkpoint_blocks(lambda *a, r=reverse: fn(*a, r), "full=1,none=2")

        def total(run, *args):
            carry, stacked = run(*args)
            # Each block's result has a weight of its own, so that none is mistaken.
            return (carry**2).sum() + (stacked * jnp.array([1.0, 10.0, 100.0])).sum()

        plain = jax.value_and_grad(lambda *a, r=reverse: total(fn, *a, r), (0, 1))
        other = jax.value_and_grad(lambda *a, m=mixed: total(m, *a), (0, 1))
        want, got = plain(w, x), other(w, x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-6), want, got
        )
        # The first to run recompute; a loop that keeps its cosines stacks them.
        jaxpr = jax.make_jaxpr(lambda *a, m=mixed: jax.vjp(m, *a)[0])(w, x)
        loops = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
        assert [e.params["length"] for e in loops] == [1, 2]


@pytest.mark.parametrize(
    ("scan", "remat"), [(True, "full=1,none=3"), (False, "dots=1,full=1")]
)
def test_the_counts_of_a_mix_come_to_the_number_of_blocks(scan, remat):
    with pytest.raises(InputError, match=rf"{remat}' is for . blocks, and .* has 3"):
        trace(of_remat(remat, scan), (BATCH,))


def test_blocks_are_counted():
    for scan in (True, False):
        assert step(scan).blocks(BATCH) == BLOCKS
    assert count_blocks(jnp.sin, jnp.ones(3)) == 0


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    "remat", ["full", "dots", "save:hidden", "full=2,none=1", "none=1,save:hidden=2"]
)
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("full=8,none", "'none': each part of a mix is a policy and how many"),
        ("full=0,none=2", "'full=0': each part"),
        ("full=1,full=2", "write full=3"),
        ("full=1,half=2", "'half' is not a way"),
        ("full=3", "'full=3' is not a way"),
    ],
)
def test_mixes_that_cannot_be_read_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        check_remat(text)


def test_a_mix_is_read_in_order():
    mix = "save:a+b=2,full=1,none=12"
    assert check_remat(mix) == mix
    assert parts_of(mix) == (("save:a+b", 2), ("full", 1), ("none", 12))
    assert parts_of("save:a=b") == ()  # a name may have any other sign
