"""Calls that the partitioner cannot look into run on each device's part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import autoshard as ash
from autoshard.ir.errors import InputError, RuleMissingError
from autoshard.plan.strategy import Strategy

ROWS, WIDTH = 16, 8


def _double(x_ref, w_ref, out_ref):
    out_ref[...] = 2.0 * x_ref[...] * w_ref[...][None, :]


def _row_sums(x_ref, out_ref):
    out_ref[...] = x_ref[...].sum(axis=0)


def scale_rows(x, w):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = pl.pallas_call(_double, out_shape=shape, interpret=True, name="scale_rows")
    return call(x, w)


def sum_rows(x):
    shape = jax.ShapeDtypeStruct((x.shape[1],), x.dtype)
    call = pl.pallas_call(_row_sums, out_shape=shape, interpret=True, name="sum_rows")
    return call(x)


def scaled(w, x):
    return jnp.tanh(scale_rows(x, w))


def summed(w, x):
    return sum_rows(x) * w


def strategy(**rules):
    return Strategy(name="test", about="", mesh={"data": 2, "tensor": 4}, rules=rules)


W, X = (
    jax.ShapeDtypeStruct((WIDTH,), "float32"),
    jax.ShapeDtypeStruct((ROWS, WIDTH), "float32"),
)


def run(fn, plan):
    rng = np.random.default_rng(0)
    args = [rng.normal(size=s.shape).astype("float32") for s in (W, X)]
    parallel = ash.parallelize(fn, plan, W, X)
    return parallel, parallel(*args), fn(*args)


def test_a_kernel_with_a_rule_runs_on_each_devices_rows():
    ash.register_rule("scale_rows", "i j, j -> i j", call=scale_rows)
    plan = ash.search(scaled, W, X, cluster="cpu:8", strategy=strategy(batch=["data"]))
    assert plan.predicted.collectives == ()
    parallel, found, expected = run(scaled, plan)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # The kernel sees 8 of the 16 rows.
    text = parallel.jitted.lower(W, X).as_text()
    assert "tensor<8x8xf32>" in text


def test_partial_sums_of_a_kernel_are_added_up():
    ash.register_rule("sum_rows", "i j -> j; reduce i", call=sum_rows)
    plan = ash.search(summed, W, X, cluster="cpu:8", strategy=strategy(batch=["data"]))
    assert [(c.kind, c.axes) for c in plan.predicted.collectives] == [
        ("all_reduce", ("data",))
    ]
    _, found, expected = run(summed, plan)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_kernel_that_cannot_be_called_on_parts_is_an_error_in_words():
    ash.register_rule("scale_rows", "i j, j -> i j")
    with pytest.raises(InputError, match=r"'scale_rows' at .*test_foreign.py.* call="):
        ash.search(scaled, W, X, cluster="cpu:8", strategy=strategy(batch=["data"]))
    # Nothing is sharded that it has: it runs as it is.
    ash.register_rule("scale_rows", "i j, j -> i j; blocked i j")
    plan = ash.search(scaled, W, X, cluster="cpu:8", strategy=strategy(batch=["data"]))
    assert [c.kind for c in plan.predicted.collectives] == ["all_gather"]
    _, found, expected = run(scaled, plan)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_kernel_without_a_rule_names_both_ways_out_and_takes_the_second():
    def fn(w, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        call = pl.pallas_call(_double, out_shape=shape, interpret=True, name="nobody")
        return call(x, w)

    given = {"cluster": "cpu:8", "strategy": strategy(batch=["data"])}
    with pytest.raises(RuleMissingError, match=r"'nobody', at .*test_foreign.py:\d+"):
        ash.search(fn, W, X, **given)
    plan = ash.search(fn, W, X, **given, replicate=["nobody"])
    (use,) = plan.replicated
    assert (use.primitive, "test_foreign.py" in use.source) == ("pallas_call", True)
    _, found, expected = run(fn, plan)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
