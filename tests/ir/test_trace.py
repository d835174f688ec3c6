"""What a traced function knows of its arguments and results."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from flax.training.train_state import TrainState

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


def test_arguments_of_every_kind():
    state = {
        "frozen": freeze({"w": jnp.ones((4, 2))}),
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(0), 3),
        "legacy": jax.random.PRNGKey(0),
        "nothing": None,
        "number": 2,
        "rate": 0.5,
        "flag": True,
        "pair": (np.ones(2), [np.float32(1)]),
    }

    def fn(state, batch):
        noise = jax.random.normal(state["key"], (2,))
        more = jax.vmap(lambda k: jax.random.normal(k, (2,)))(state["keys"])
        y = batch["x"] @ state["frozen"]["w"] * state["rate"] + noise + more.sum(0)
        scale = state["number"] * state["pair"][1][0] + batch["weight"]
        return {**state, "key": jax.random.fold_in(state["key"], 1)}, (y * scale).sum()

    batch = {
        "x": shape(8, 4), "key": jax.random.split(jax.random.key(1), 8), "weight": 1.5,
        "none": None,
    }  # fmt: skip
    traced = trace(fn, [state, batch])
    kinds = {i.path: (i.state, i.shape, i.logical) for i in traced.inputs}
    assert kinds["0/frozen/w"] == ("params", (4, 2), (None, None))
    assert kinds["0/key"] == ("other", (), ())
    assert kinds["0/keys"] == ("other", (3,), (None,))
    assert kinds["0/flag"] == kinds["0/number"] == kinds["0/rate"] == ("other", (), ())
    assert kinds["batch/key"] == ("data", (8,), ("batch",))
    assert not [path for path in kinds if "nothing" in path or "none" in path]
    # The state comes back leaf by leaf.
    assert traced.out_source[:-1] == tuple(
        k for k, i in enumerate(traced.inputs) if i.state != "data"
    )


def test_a_train_state_of_flax_with_its_functions():
    def apply(variables, x):
        return x @ variables["params"]["w"]

    state = TrainState.create(
        apply_fn=apply, params={"w": jnp.ones((4, 2))}, tx=optax.adam(1e-3)
    )

    def step(state, x):
        grads = jax.grad(lambda p: (state.apply_fn({"params": p}, x) ** 2).mean())(
            state.params
        )
        return state.apply_gradients(grads=grads)

    traced = trace(step, [state, shape(8, 4)])
    assert {i.path: i.state for i in traced.inputs} == {
        "0/step": "other",
        "0/params/w": "params",
        "0/opt_state/0/count": "other",
        "0/opt_state/0/mu/w": "optimizer",
        "0/opt_state/0/nu/w": "optimizer",
        "batch": "data",
    }
    assert traced.out_source == (0, 1, 2, 3, 4)


def test_a_program_without_annotations_says_so():
    report = trace(mlp(), [shape(6, 4)]).annotations
    assert (report.counts, report.lost, report.unused, report.hints) == ((), (), (), ())
    assert str(report) == "no annotations"


@pytest.mark.parametrize("compute", [jnp.float32, jnp.bfloat16])
def test_a_weight_that_is_cast_before_its_product_is_a_parameter(compute):
    optimizer = optax.adam(1e-3, mu_dtype=jnp.bfloat16)

    def step(params, opt_state, x):
        def loss(params):
            hidden = x.astype(compute) @ params["w"].astype(compute)
            return ((hidden + params["b"].astype(compute)) ** 2).mean()

        grads = jax.grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = {"w": shape(4, 8), "b": shape(8)}
    args = (params, jax.eval_shape(optimizer.init, params), shape(16, 4))
    states = {i.path: i.state for i in trace(step, args).inputs}
    assert states == {
        "0/b": "params",
        "0/w": "params",
        "1/0/count": "other",
        "1/0/mu/b": "optimizer",
        "1/0/mu/w": "optimizer",
        "1/0/nu/b": "optimizer",
        "1/0/nu/w": "optimizer",
        "batch": "data",
    }


def test_a_weight_that_is_only_added_to_every_row_is_a_parameter():
    def step(params, moment, x):
        def loss(params):
            return (jax.lax.square(x + params["at"])).mean()

        moment = jax.tree.map(lambda m, g: 0.9 * m + g, moment, jax.grad(loss)(params))
        return jax.tree.map(lambda p, m: p - 0.1 * m, params, moment), moment

    at = {"at": shape(1, 4, 8)}
    states = {i.path: i.state for i in trace(step, (at, at, shape(16, 4, 8))).inputs}
    assert states == {"0/at": "params", "1/at": "optimizer", "batch": "data"}


@jax.custom_vjp
def backward_only(x):
    return jnp.sin(x)


backward_only.defvjp(
    lambda x: (jnp.sin(x), x), lambda x, cotangent: (cotangent * jnp.cos(x),)
)


def test_a_forward_derivative_that_jax_leaves_unused_is_no_part_of_the_program():
    """In a forward rule of the user's, for an operand that nothing differentiates."""

    @jax.custom_jvp
    def inner(x, y):
        return jnp.sin(x), backward_only(y)

    def rule(primals, tangents):
        return jax.jvp(lambda x, y: (jnp.sin(x), backward_only(y)), primals, tangents)

    inner.defjvp(rule)

    def loss(x, y):
        a, b = inner(x, y)
        return a.sum() + b.sum()

    fn = jax.grad(loss)
    args = (jax.ShapeDtypeStruct((4,), "float32"),) * 2
    assert "custom_lin" in str(jax.make_jaxpr(fn)(*args))
    traced = trace(fn, args)
    assert {op.primitive for op in traced.program.ops} >= {"cos"}
    assert "custom_lin" not in str(traced.jaxpr)


def test_a_forward_derivative_that_a_function_lacks_is_an_error_with_its_line():
    @jax.custom_jvp
    def inner(x):
        return backward_only(x)

    inner.defjvp(lambda p, t: jax.jvp(backward_only, p, t))
    args = (jax.ShapeDtypeStruct((4,), "float32"),) * 2
    fn = lambda x, dx: jax.linearize(inner, x)[1](dx)  # noqa: E731
    with pytest.raises(InputError, match=r"custom_vjp function at .*test_trace\.py"):
        trace(fn, args)
