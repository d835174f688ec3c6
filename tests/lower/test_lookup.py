"""A gather that fills is evaluated in two parts; together they are what it was."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoshard.lower.special import _lookup


def whole(fn, *args):
    """The function with its one gather evaluated in two parts."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    [eqn] = [e for e in jaxpr.eqns if e.primitive.name == "gather"]
    env = dict(zip(jaxpr.jaxpr.invars, args, strict=True))
    values = [env[v] for v in eqn.invars]
    assert jaxpr.jaxpr.outvars == eqn.outvars
    [out] = _lookup("gather#0", {}, None, eqn, values)
    return out


# Within, below and above a table of six rows.
ROWS = np.array([[0, 5, 6], [-1, 3, 1000]])
TABLE = np.arange(24).reshape(6, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("fill", [None, 3])
def test_every_filler(dtype, fill):
    table = jnp.asarray(TABLE, dtype)
    ids = jnp.asarray(ROWS)[..., None]

    def fn(table, ids):
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0,)
        )
        return jax.lax.gather(table, ids, numbers, (1, 4), mode="fill", fill_value=fill)

    expected = fn(table, ids)
    assert expected[0, 0].tolist() != expected[0, 2].tolist()  # something is filled
    found = whole(fn, table, ids)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.astype(float), expected.astype(float))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_indices_of_every_width(dtype):
    table = jnp.asarray(np.arange(600.0).reshape(300, 2), jnp.float32)
    ids = jnp.asarray([[0], [7], [100]], dtype)

    def fn(table, ids):
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,)
        )
        return jax.lax.gather(table, ids, numbers, (1, 2), mode="fill")

    np.testing.assert_array_equal(whole(fn, table, ids), fn(table, ids))


def test_windows_and_several_indexed_dims():
    """Windows of 2 x 3 from a table of 6 x 4: the last that fits starts at [4, 1]."""
    table = jnp.asarray(TABLE, jnp.float32)
    ids = jnp.asarray([[4, 1], [5, 1], [4, 2], [0, -1]])

    def fn(table, ids):
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0, 1)
        )
        return jax.lax.gather(table, ids, numbers, (2, 3), mode="fill")

    out = whole(fn, table, ids)
    np.testing.assert_array_equal(out, fn(table, ids))
    assert np.isnan(out).all(axis=(1, 2)).tolist() == [False, True, True, True]


def test_batched_tables():
    tables = jnp.asarray(np.arange(24.0).reshape(3, 4, 2), jnp.float32)
    ids = jnp.asarray([[[0], [4]], [[3], [-1]], [[9], [1]]])

    def fn(tables, ids):
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=(2,),
            collapsed_slice_dims=(1,),
            start_index_map=(1,),
            operand_batching_dims=(0,),
            start_indices_batching_dims=(0,),
        )
        return jax.lax.gather(tables, ids, numbers, (1, 1, 2), mode="fill")

    np.testing.assert_array_equal(whole(fn, tables, ids), fn(tables, ids))
