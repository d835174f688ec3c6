"""What XLA gets wrong or stops at when it is left to itself is told to it otherwise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autoshard as ash
from autoshard.plan.strategy import Strategy


def both(fn, *args, mesh, **rules):
    """The plan, and the largest difference between sharded and plain results."""
    cluster = f"cpu:{int(np.prod([*mesh.values()]))}"
    strategy = Strategy(name="test", about="", mesh=mesh, rules=rules)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    plan = ash.search(fn, *shapes, cluster=cluster, strategy=strategy)
    found = ash.parallelize(fn, plan, *shapes)(*args)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, fn(*args))
    return plan, max(jax.tree.leaves(difference))


def normal(*dims):
    return np.random.default_rng(sum(dims)).normal(size=dims).astype("float32")


@pytest.mark.parametrize("made", [lambda w: jax.lax.rev(w, (1,)), jnp.cos])
def test_a_convolution_over_parts_smaller_than_its_window(made):
    # Each device has one position, and needs one of either neighbour. Reversed is the
    # kernel of the gradient by the input.
    def fn(kernel, x):
        x = ash.annotate(x, None, None, "length")
        numbers = jax.lax.ConvDimensionNumbers((1, 0, 2), (2, 0, 1), (0, 2, 1))
        y = jax.lax.conv_general_dilated(
            x, made(kernel), (1,), [(1, 1)], dimension_numbers=numbers
        )
        return ash.annotate(y, None, "length", None)

    mesh = {"data": 4, "tensor": 2}
    args = normal(1, 3, 1), normal(1, 2, 2)
    plan, difference = both(fn, *args, mesh=mesh, length=["tensor"])
    assert difference < 1e-5
    assert [c.kind for c in plan.predicted.collectives] == ["permute"] * 2


def test_a_convolution_over_two_parts_and_its_output_channels():
    def fn(kernel, x):
        kernel = ash.annotate(jnp.cos(kernel), None, None, "channels")
        x = ash.annotate(x, "batch", "length", None)
        y = jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )
        return ash.annotate(y, "batch", "length", "channels")

    mesh = {"data": 1, "expert": 2, "tensor": 2}
    rules = {"batch": ["data"], "channels": ["expert"], "length": ["tensor"]}
    _, difference = both(fn, normal(3, 4, 4), normal(4, 16, 4), mesh=mesh, **rules)
    assert difference < 1e-5


def odd(x):
    """Rows of zeros before, between and after: 33 for 16, in two parts of 17."""
    return ash.annotate(jax.lax.pad(x, 0.0, [(1, 1, 1), (0, 0, 0)]), "rows", None)


def test_top_k_of_rows_that_do_not_divide():
    def fn(x):
        return jax.lax.top_k(odd(x), 3)[0].sum(axis=0)

    _, difference = both(fn, normal(16, 8), mesh={"data": 2}, rows=["data"])
    assert difference < 1e-5


def test_a_scatter_of_rows_that_do_not_divide():
    def fn(x, y):
        to = jnp.arange(33) % 3
        return jax.ops.segment_sum(jnp.cos(odd(x)).min(axis=1), to, 3) + y

    mesh = {"data": 2, "expert": 2}
    args = normal(16, 2), np.zeros((2, 3), "float32")
    _, difference = both(fn, *args, mesh=mesh, rows=["data"])
    assert difference < 1e-5
