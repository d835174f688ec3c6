"""The single-device train step: accumulation, remat, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from autoshard.ir.errors import InputError
from autoshard.ir.program import build
from autoshard.ir.train_step import UPDATE_SCOPE, TrainStep, train_step

ROWS, WIDTH = 12, 4


class Net(nnx.Module):
    """Two layers and a batch norm, so that there is state beside the parameters."""

    def __init__(self, rngs):
        kernel = nnx.with_partitioning(
            nnx.initializers.lecun_normal(), ("embed", "mlp")
        )
        self.up = nnx.Linear(WIDTH, 8, rngs=rngs, kernel_init=kernel)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.down = nnx.Linear(8, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.norm(self.up(x))))


def functional():
    def loss(params, batch):
        for w in params["layers"]:
            batch = batch + jnp.tanh(batch @ w)
        return (batch**2).mean()

    def model(key):
        keys = jax.random.split(key, 3)
        return {"layers": [jax.random.normal(k, (WIDTH, WIDTH)) for k in keys]}

    return train_step(loss, optax.adam(1e-2), model=model)


def with_state():
    return train_step(
        lambda net, x: ((net(x) - x) ** 2).mean(), optax.sgd(0.1), model=Net
    )


def batch(rows=ROWS):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(rows, WIDTH)), jnp.float32)


def close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **{"rtol": 1e-5, "atol": 1e-6} | tolerance)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("microbatches", [1, 3, 12])
def test_accumulated_gradients_equal_those_of_the_whole_batch(microbatches, remat):
    step = functional()
    state = step.init(0)
    want = jax.value_and_grad(step.loss_fn)(state.params, batch())
    cut = step.with_schedule(microbatches=microbatches, remat=remat)
    loss, gradients, rest = jax.jit(cut.loss_and_gradients)(state, batch())
    close((loss, gradients), want)
    assert rest == {}


def test_a_step_is_the_loss_its_gradients_and_the_optimizer():
    step = functional()
    state = step.init(0)
    loss, gradients = jax.value_and_grad(step.loss_fn)(state.params, batch())
    updates, opt_state = step.optimizer.update(gradients, state.opt_state, state.params)
    new, metrics = jax.jit(step)(state, batch())
    close(new.params, optax.apply_updates(state.params, updates))
    close(new.opt_state, opt_state)
    close(metrics, {"loss": loss, "grad_norm": optax.tree.norm(gradients)})
    assert (int(state.step), int(new.step)) == (0, 1)


def test_a_step_lowers_the_loss():
    step = functional()
    run = jax.jit(step)
    state, first = run(step.init(0), batch())
    for _ in range(20):
        state, last = run(state, batch())
    assert float(last["loss"]) < 0.9 * float(first["loss"])


def test_other_variables_of_a_model_go_from_piece_to_piece():
    step = with_state()
    state = step.init(0)
    new, _ = jax.jit(step.with_schedule(microbatches=3, remat="none"))(state, batch())
    assert sorted(state.params) == ["down", "norm", "up"]
    assert sorted(state.rest) == ["norm"]
    # The running mean after three pieces, each of them every third row.
    hidden = batch() @ state.params["up"]["kernel"] + state.params["up"]["bias"]
    mean = jnp.zeros(8)
    for piece in range(3):
        mean = 0.5 * mean + 0.5 * hidden[piece::3].mean(0)
    np.testing.assert_allclose(new.rest["norm"]["mean"], mean, rtol=1e-5, atol=1e-6)


def test_names_of_parameters_come_from_their_metadata():
    found = with_state().variables
    assert sorted(found) == [
        "params/down/bias", "params/down/kernel", "params/norm/bias",
        "params/norm/scale", "params/up/bias", "params/up/kernel", "rest/norm/mean",
        "rest/norm/var",
    ]  # fmt: skip
    names = found["params/up/kernel"].get_metadata()["out_sharding"]
    assert names == ("embed", "mlp")
    assert functional().variables == {}


def test_the_abstract_state_is_the_state():
    for step in (functional(), with_state()):
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), step.abstract_state())
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), step.init(0))


def test_seeds_differ_and_repeat():
    step = functional()
    first, again, other = (step.init(s).params["layers"][0] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_only_the_update_is_in_the_update_scope():
    step = functional().with_schedule(microbatches=3, remat="none")
    jaxpr = jax.make_jaxpr(step)(step.abstract_state(), batch())
    ops = build(jaxpr, []).ops
    update = {op.primitive for op in ops if UPDATE_SCOPE in op.scope}
    assert {"sqrt", "div", "mul"} <= update
    for op in ops:
        if op.primitive in ("dot_general", "tanh") or op.region > 0:
            assert UPDATE_SCOPE not in op.scope, op


def test_every_gradient_is_marked_with_its_path():
    step = with_state()
    jaxpr = jax.make_jaxpr(step)(step.abstract_state(), batch())
    marks = [
        eqn.params["path"]
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "autoshard_annotate" and eqn.params["role"]
    ]
    assert sorted(marks) == [
        f"params/{name}"
        for name in (
            "down/bias", "down/kernel", "norm/bias", "norm/scale", "up/bias",
            "up/kernel",
        )
    ]  # fmt: skip


# -- what it refuses -------------------------------------------------------------


def test_a_batch_that_cannot_be_cut():
    step = functional().with_schedule(microbatches=5, remat="none")
    with pytest.raises(InputError, match=r"\(12, 4\) cannot be cut into 5 .* by 5"):
        step(step.init(0), batch())


def test_a_batch_leaf_without_dims_is_the_same_for_every_microbatch():
    step = train_step(
        lambda w, b: (b["x"] @ w).mean() * b["scale"],
        optax.sgd(0.1),
        model=lambda key: jnp.ones((WIDTH, 2)),
    )
    inputs = {"x": batch(), "scale": jnp.full((), 3.0)}
    state = step.init(0)
    want = step.loss_and_gradients(state, inputs)
    cut = step.with_schedule(microbatches=2, remat="none")
    close(cut.loss_and_gradients(state, inputs), want)


def test_each_microbatch_has_a_random_key_of_its_own():
    def loss(w, b):
        kept = jax.random.bernoulli(b["key"], 0.5, b["x"].shape)
        return jnp.where(kept, b["x"], 0.0).sum() * w

    step = train_step(loss, optax.sgd(0.1), model=lambda key: jnp.ones(()))
    key, rows = jax.random.key(7), jnp.ones((12, 4))
    inputs = {"x": rows, "key": key}
    cut = step.with_schedule(microbatches=2, remat="none")
    total, _, _ = cut.loss_and_gradients(step.init(0), inputs)
    masks = [
        jax.random.bernoulli(jax.random.fold_in(key, k), 0.5, (6, 4)) for k in (0, 1)
    ]
    assert not jnp.array_equal(*masks)
    assert float(total) == pytest.approx(sum(float(m.sum()) for m in masks) / 2)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_loss_per_row(microbatches):
    step = train_step(
        lambda w, x: (x @ w).sum(1),
        optax.sgd(0.1),
        model=lambda key: jnp.ones((WIDTH, 2)),
    ).with_schedule(microbatches=microbatches, remat="none")
    rows = ROWS // microbatches
    with pytest.raises(InputError, match=rf"array of shape \({rows},\); .* scalar"):
        step(step.init(0), batch())


def test_remat_without_a_block():
    step = train_step(
        lambda w, x: (x @ w).mean(), optax.sgd(0.1), model=lambda key: jnp.ones(WIDTH)
    ).with_schedule(microbatches=1, remat="full")
    with pytest.raises(InputError, match="no block repeats"):
        step(step.init(0), batch())


@pytest.mark.parametrize("optimizer", [optax.adam, None, "adam"])
def test_an_optimizer_that_is_none(optimizer):
    with pytest.raises(InputError, match=r"needs an optax optimizer such as .* got"):
        train_step(lambda w, x: 0.0, optimizer, model=lambda key: {})


@pytest.mark.parametrize(("loss", "model"), [(None, Net), (jnp.mean, {"w": 1})])
def test_what_must_be_callable(loss, model):
    with pytest.raises(InputError, match="train_step needs loss_fn="):
        train_step(loss, optax.sgd(0.1), model=model)


def test_a_schedule_leaves_the_rest_alone():
    step = functional()
    cut = step.with_schedule(microbatches=4, remat="full")
    assert isinstance(cut, TrainStep)
    assert (cut.microbatches, cut.remat, cut.loss_fn) == (4, "full", step.loss_fn)


def test_an_optimizer_may_compute_with_the_parameters_it_is_given():
    def init(params):
        return jax.tree.map(lambda x: x.astype(jnp.float32) * 2, params)

    doubled = optax.GradientTransformation(init, lambda g, s, params=None: (g, s))

    def loss(model, batch):
        return (model(batch) ** 2).mean()

    step = train_step(loss, doubled, model=lambda rngs: nnx.Linear(4, 2, rngs=rngs))
    shapes = jax.tree.map(lambda x: x.shape, step.abstract_state().opt_state)
    assert shapes == jax.tree.map(lambda x: x.shape, step.abstract_state().params)
