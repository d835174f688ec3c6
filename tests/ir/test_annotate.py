"""`annotate` is the identity that survives every transformation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoshard.ir.annotate import annotate, mark
from autoshard.ir.errors import InputError

X = jnp.arange(6.0).reshape(2, 3)


def found(fn, *args):
    """Names of every annotation in a function's jaxpr, in order."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    return [
        eqn.params["names"]
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "autoshard_annotate"
    ]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_it_is_the_identity(wrap):
    y = wrap(lambda x: annotate(x, "batch", "embed"))(X)
    np.testing.assert_array_equal(y, X)


def test_nothing_is_left_of_it_in_the_compiled_program():
    plain = jax.jit(lambda x: x * 2).lower(X).as_text()
    named = jax.jit(lambda x: annotate(x * 2, "batch", None)).lower(X).as_text()
    assert named.count("stablehlo") == plain.count("stablehlo")


def test_the_gradient_passes_and_is_annotated_too():
    def fn(x):
        return (annotate(x, "batch", "embed") ** 2).sum()

    np.testing.assert_array_equal(jax.grad(fn)(X), 2 * X)
    assert found(jax.grad(fn), X) == [("batch", "embed")] * 2


def test_forward_and_second_derivatives_pass():
    def fn(x):
        return (annotate(x, "batch", "embed") ** 3).sum()

    ones = jnp.ones_like(X)
    assert jax.jvp(fn, (X,), (ones,))[1] == (3 * X**2).sum()
    np.testing.assert_allclose(
        jax.jvp(jax.grad(fn), (X,), (ones,))[1], 6 * X, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("dim", "names"),
    [(0, (None, "a", "b")), (1, ("a", None, "b")), (2, ("a", "b", None))],
)
def test_vmap_gives_its_own_dim_no_name(dim, names):
    x = jnp.arange(24.0).reshape(2, 3, 4)
    fn = jax.vmap(lambda row: annotate(row, "a", "b"), in_axes=dim, out_axes=dim)
    assert found(fn, x) == [names]
    np.testing.assert_array_equal(fn(x), x)


def test_a_mark_has_no_names_and_batches():
    fn = jax.vmap(lambda g: mark(g, "gradient", "params/w"))
    assert found(fn, X) == [None]
    [eqn] = jax.make_jaxpr(fn)(X).jaxpr.eqns
    assert (eqn.params["role"], eqn.params["path"]) == ("gradient", "params/w")


def test_one_name_per_dim():
    with pytest.raises(InputError, match=r"1 names \('batch',\) .*\(2, 3\); give one"):
        annotate(X, "batch")


def test_no_name_twice():
    with pytest.raises(InputError, match="names two dims"):
        annotate(X, "embed", "embed")


def test_no_name_may_be_given_twice():
    np.testing.assert_array_equal(annotate(X, None, None), X)
