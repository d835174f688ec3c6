"""Finding the repeated block of a model, and rematerialising it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from autoshard.ir.blocks import Repeat, find_repeat
from autoshard.ir.checkpointing import checkpoint_blocks
from autoshard.ir.errors import InputError

# -- find_repeat -----------------------------------------------------------------


def repeats(text, start, period, count):
    block = text[start : start + period]
    return text[start : start + period * count] == block * count


def brute_force(text):
    """The most positions that copies back to back cover, the shortest block, first."""
    found = [
        (period * count, -period, -start)
        for start in range(len(text))
        for period in range(1, len(text) // 2 + 1)
        for count in range(2, (len(text) - start) // period + 1)
        if repeats(text, start, period, count)
    ]
    if not found:
        return None
    covered, period, start = max(found)
    return Repeat(-start, -period, covered // -period)


texts = st.one_of(
    st.text("abc", max_size=20),
    # Mostly periodic: a block, some copies, noise on either side.
    st.builds(
        lambda head, block, count, tail: head + block * count + tail,
        st.text("abc", max_size=4),
        st.text("abc", min_size=1, max_size=6),
        st.integers(2, 3),
        st.text("abc", max_size=4),
    ),
)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_it_covers_as_much_as_brute_force(text):
    assert find_repeat(text, [0] * len(text)) == brute_force(text)


@given(st.integers(1, 5), st.integers(2, 4), st.lists(st.integers(0, 9), min_size=22))
@settings(max_examples=100, deadline=None)
def test_it_is_cut_where_the_fewest_bytes_cross(period, count, crossing):
    """Anywhere in the first copy, unless only two would be cut to one."""
    text = "X" + "abcde"[:period] * count + "Y"
    cuts = range(1, 1 + period) if count > 2 else [1]
    start = min(cuts, key=lambda at: crossing[at])
    left = count if start == 1 else count - 1
    assert find_repeat(text, crossing[: len(text)]) == Repeat(start, period, left)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("abc", None),
        ("aa", Repeat(0, 1, 2)),
        ("xabcabcabcy", Repeat(1, 3, 3)),
        # Each equation twice in a block: the nearest equal one is within the block.
        ("aabbaabb", Repeat(0, 4, 2)),
    ],
)
def test_examples(text, expected):
    assert find_repeat(text, [0] * len(text)) == expected


# -- checkpoint_blocks -----------------------------------------------------------

LAYERS, WIDTH, ROWS = 4, 8, 16


def layer(w, x):
    return x + jnp.tanh(jnp.sin(x @ w["up"]) @ w["down"])


def unrolled(ws, x):
    for i in range(LAYERS):
        x = layer(jax.tree.map(lambda w, i=i: w[i], ws), x)
    return (x**2).mean()


def scanned(ws, x):
    return (lax.scan(lambda c, w: (layer(w, c), None), x, ws)[0] ** 2).mean()


def reversed_scan(ws, x):
    def body(c, w):
        c = layer(w, c)
        return c, c.sum()

    x, sums = lax.scan(body, x, ws, reverse=True)
    return (x**2).mean() + (sums * jnp.arange(LAYERS)).sum()


def in_a_jit(ws, x):
    return jax.jit(unrolled)(ws, x)


def with_own_numbers(ws, x):
    """Layers that are alike but for a constant, written in place or as an array."""
    for i in range(LAYERS):
        x = layer(jax.tree.map(lambda w, i=i: w[i], ws), x * (1.5 - i / 4))
        x = x + jnp.full(WIDTH, i % 2) * np.float32(i)
    return (x**2).mean()


FUNCTIONS = [unrolled, scanned, reversed_scan, in_a_jit, with_own_numbers]


def arguments():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    ws = {"up": draw(LAYERS, WIDTH, 2 * WIDTH), "down": draw(LAYERS, 2 * WIDTH, WIDTH)}
    return ws, draw(ROWS, WIDTH)


def residual_bytes(fn):
    """Bytes that the backward pass of `fn` is given, arguments not counted."""
    args = arguments()
    own = {id(leaf) for leaf in jax.tree.leaves(args)}
    kept = jax.tree.leaves(jax.vjp(fn, *args)[1])
    return sum(x.nbytes for x in kept if hasattr(x, "nbytes") and id(x) not in own)


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_value_and_gradient_stay(fn):
    args = arguments()
    want = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(*args)
    got = jax.jit(jax.value_and_grad(checkpoint_blocks(fn), argnums=(0, 1)))(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_less_is_kept_for_the_backward_pass(fn):
    """Per layer only what enters it: [ROWS, WIDTH]; without, [ROWS, 2 WIDTH] too."""
    border = ROWS * WIDTH * 4
    assert residual_bytes(fn) >= LAYERS * 3 * border
    assert residual_bytes(checkpoint_blocks(fn)) <= (LAYERS + 2) * border


def test_each_unrolled_block_is_one_checkpoint():
    jaxpr = jax.make_jaxpr(checkpoint_blocks(unrolled))(*arguments())
    remats = [
        e for e in jaxpr.jaxpr.eqns if e.primitive.name in ("remat2", "checkpoint")
    ]
    assert len(remats) == LAYERS
    # At the border between two layers one value crosses, the residual stream.
    assert all(len(eqn.outvars) == 1 for eqn in remats)


def test_equal_blocks_are_traced_once():
    def fn(ws, x):
        for w in ws:
            x = layer(w, x)
        return (x**2).mean()

    ws, x = arguments()
    apart = [jax.tree.map(lambda w, i=i: w[i], ws) for i in range(LAYERS)]
    jaxpr = jax.make_jaxpr(checkpoint_blocks(fn))(apart, x)
    bodies = [
        e.params["jaxpr"]
        for e in jaxpr.jaxpr.eqns
        if e.primitive.name in ("remat2", "checkpoint")
    ]
    assert len(bodies) == LAYERS
    assert len({id(body) for body in bodies}) == 1


def test_the_structure_of_arguments_and_results_stays():
    def fn(ws, x):
        return {"loss": scanned(ws, x), "kept": (x, None)}

    got = checkpoint_blocks(fn)(*arguments())
    assert jax.tree.structure(got) == jax.tree.structure(fn(*arguments()))


def test_no_block_is_an_error_that_says_what_to_do():
    with pytest.raises(InputError, match=r"no block repeats .* use remat = 'none'"):
        checkpoint_blocks(lambda x: jnp.sin(x).sum())(jnp.ones(3))
