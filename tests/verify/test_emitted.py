"""Compiled programs whose collectives are known by hand."""

from __future__ import annotations

import os
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from autoshard.ir.errors import InputError
from autoshard.verify.emitted import captured_stderr, compile_and_read

SIZES = {"data": 2, "tensor": 4}
ROWS, INNER, COLUMNS = 16, 32, 64


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Auto,) * 2
    )


def lowered(mesh, fn, *specs_and_shapes, out):
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec, shape in specs_and_shapes
    ]
    return jax.jit(fn, out_shardings=NamedSharding(mesh, out)).lower(*args)


def seen(collectives):
    return [(c.kind, c.axes, c.bytes_, c.count) for c in collectives]


def product(mesh, out):
    """`x @ w`, contracted over "tensor": partial sums [rows / 2, columns]."""
    return lowered(
        mesh,
        jnp.matmul,
        (P("data", "tensor"), (ROWS, INNER)),
        (P("tensor"), (INNER, COLUMNS)),
        out=out,
    )


def test_partial_sums_are_summed(mesh):
    found = compile_and_read(product(mesh, P("data")), SIZES)
    expected = [("all_reduce", ("tensor",), ROWS // 2 * COLUMNS * 4, 1)]
    assert seen(found.partitioned) == expected
    assert seen(found.optimized) == expected
    assert not found.partitioned[0].sliced
    assert found.partitioned[0].op_name.endswith("dot_general")
    assert found.rematerialized == ()


def test_partial_sums_are_scattered(mesh):
    found = compile_and_read(product(mesh, P("data", "tensor")), SIZES)
    for stage in (found.partitioned, found.optimized):
        assert seen(stage) == [("all_reduce", ("tensor",), ROWS // 2 * COLUMNS * 4, 1)]
        assert stage[0].sliced


def test_the_source_is_the_line_that_made_it(mesh):
    def loss(x):
        return x.sum()  # the collective's line

    line = loss.__code__.co_firstlineno + 1
    low = lowered(mesh, loss, (P("data"), (ROWS,)), out=P())
    [found] = compile_and_read(low, SIZES).partitioned
    assert (found.bytes_, found.axes) == (4, ("data",))
    assert found.source == f"{__file__}:{line}"


def test_runs_in_a_loop(mesh):
    weights = NamedSharding(mesh, P(None))

    def fn(x, ws):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, weights)
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, ws)[0]

    low = lowered(
        mesh,
        fn,
        (P("data"), (ROWS, INNER)),
        (P(None, "tensor"), (3, INNER, INNER)),
        out=P("data"),
    )
    found = compile_and_read(low, SIZES)
    expected = [("all_gather", ("tensor",), INNER * INNER * 4, 3)]
    assert seen(found.partitioned) == expected
    assert all(c.bounded for c in found.partitioned)


def test_one_device_has_no_collectives():
    low = jax.jit(jnp.sin).lower(jnp.ones(4))
    assert compile_and_read(low, {"data": 1}).partitioned == ()


def test_what_was_never_partitioned_is_refused():
    low = jax.jit(jnp.sin).lower(jnp.ones(4))
    with pytest.raises(InputError, match="dumped 0 modules after partitioning"):
        compile_and_read(low, SIZES)


def test_hidden_warnings_are_refused(mesh, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    with pytest.raises(InputError, match="TF_CPP_MIN_LOG_LEVEL"):
        compile_and_read(product(mesh, P("data")), SIZES)


def test_warnings_written_below_python_are_seen_and_passed_on(capfd):
    with captured_stderr() as messages:
        os.write(2, b"from C++\n")
        sys.stderr.write("from Python\n")
        sys.stderr.flush()
    assert "from C++\n" in messages[0]
    assert "from C++\n" in capfd.readouterr().err


def test_full_rematerialization_is_reported(mesh):
    before = NamedSharding(mesh, P(None, ("data", "tensor"), None))
    after = P("tensor", None, "data")

    def fn(x):
        return jnp.cos(jax.lax.with_sharding_constraint(jnp.sin(x), before))

    low = lowered(mesh, fn, (before.spec, (8, 8, 8)), out=after)
    found = compile_and_read(low, SIZES)
    # The whole array on every device: 8 * 8 * 8 float32.
    assert seen(found.partitioned) == [("all_gather", ("data", "tensor"), 2048, 1)]
    [line] = found.rematerialized
    assert "The compiler cannot go from sharding" in line
