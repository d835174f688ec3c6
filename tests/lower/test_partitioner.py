"""What XLA gets wrong or stops at when it is left to itself is told to it otherwise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import autoshard as ash
from autoshard.plan.schema import Strategy


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


def test_a_convolution_with_a_reversed_kernel():
    # The gradient by the input of a convolution; each device has one position, and
    # needs one of either neighbour. XLA alone is wrong where a mesh axis does nothing.
    def fn(kernel, cotangent):
        cotangent = ash.annotate(cotangent, None, None, "length")
        numbers = jax.lax.ConvDimensionNumbers((1, 0, 2), (2, 0, 1), (0, 2, 1))
        given = jax.lax.conv_general_dilated(
            cotangent, jax.lax.rev(kernel, (1,)), (1,), [(1, 1)], None, None, numbers
        )
        return ash.annotate(given, None, "length", None)

    mesh = {"data": 2, "tensor": 2}
    args = normal(4, 3, 3), normal(4, 2, 2)
    plan, difference = both(fn, *args, mesh=mesh, length=["tensor"])
    assert difference < 1e-5
    assert [c.kind for c in plan.predicted.collectives] == ["permute"] * 2


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
