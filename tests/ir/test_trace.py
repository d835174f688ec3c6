"""What a traced function knows of its arguments and results."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoshard.ir.errors import InputError
from autoshard.ir.trace import abstract, trace
from autoshard.ir.train_step import train_step


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def mlp():
    return train_step(
        lambda w, x: ((x @ w["up"]) ** 2).mean(),
        optax.adam(1e-3),
        model=lambda key: {"up": jnp.ones((4, 8))},
    )


def test_a_train_step_needs_the_batch_alone():
    step = mlp()
    alone = trace(step, [shape(6, 4)])
    both = trace(step, [step.abstract_state(), shape(6, 4)])
    assert alone.program.fingerprint == both.program.fingerprint
    assert alone.inputs == both.inputs


def test_arguments_of_a_train_step():
    traced = trace(mlp(), [shape(6, 4)])
    assert {i.path: (i.state, i.shape) for i in traced.inputs} == {
        "step": ("other", ()),
        "params/up": ("params", (4, 8)),
        "opt_state/0/count": ("optimizer", ()),
        "opt_state/0/mu/up": ("optimizer", (4, 8)),
        "opt_state/0/nu/up": ("optimizer", (4, 8)),
        "batch": ("data", (6, 4)),
    }
    # Every leaf of the new state replaces its own; the metrics replace nothing.
    assert traced.out_source == (0, 1, 2, 3, 4, -1, -1)


def test_a_plain_function_tells_parameters_from_moments():
    def step(params, moment, x):
        gradient = jax.grad(lambda w: ((x @ w) ** 2).mean())(params["w"])
        moment = 0.9 * moment["w"] + gradient
        return {"w": params["w"] - moment}, {"w": moment}, gradient.sum()

    w = shape(4, 8)
    traced = trace(step, [{"w": w}, {"w": w}, shape(6, 4)])
    assert [(i.path, i.state) for i in traced.inputs] == [
        ("0/w", "params"),
        ("1/w", "optimizer"),
        ("batch", "data"),
    ]
    assert traced.out_source == (0, 1, -1)


def test_data_dims_are_named_by_role():
    tokens = {"tokens": shape(8, 16, dtype=jnp.int32), "image": shape(8, 32, 32, 3)}
    traced = trace(
        lambda w, b: (b["image"] * w).sum() + b["tokens"].sum(), [2.0, tokens]
    )
    assert {i.path: i.logical for i in traced.inputs} == {
        "0": (),
        "batch/image": ("batch", None, None, None),
        "batch/tokens": ("batch", "seq"),
    }


def test_abstract_keeps_shapes_only():
    got = abstract({"a": np.ones((2, 3), np.int32), "b": 1.5})
    assert got["a"] == shape(2, 3, dtype=jnp.int32)
    assert got["b"] == shape()


def test_abstract_takes_wide_numbers_as_jax_does():
    got = abstract({"a": np.ones(3), "b": np.float64(1), "c": 2, "d": jnp.ones(2)})
    assert got == {
        "a": shape(3),
        "b": shape(),
        "c": shape(dtype=jnp.int32),
        "d": shape(2),
    }


def test_no_arguments():
    with pytest.raises(InputError, match="the batch last; got none"):
        trace(lambda: 1.0, [])


def test_too_many_arguments():
    step = mlp()
    with pytest.raises(InputError, match="got 3 arguments"):
        trace(step, [step.abstract_state(), shape(6, 4), shape(6, 4)])
