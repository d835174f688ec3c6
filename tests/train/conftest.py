"""A lowered step small enough to run many times: SGD of a byte bigram model."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from autoshard.ir.train_step import TrainState

VOCAB, WIDTH = 256, 16
MODEL_FLOPS = 1e6


class FakePlan:
    def __init__(self, shape, fingerprint="f00d"):
        self.shape = shape
        self.program = SimpleNamespace(fingerprint=fingerprint, model=None)
        self.predicted = SimpleNamespace(model_flops=MODEL_FLOPS)

    def model_dump(self, mode):
        assert mode == "json"
        return {"axes": list(self.shape)}


class FakeStep:
    """Has the surface of what `parallelize` returns. `on_step(k)` may interfere."""

    def __init__(self, shape=(4, 2), fingerprint="f00d", learning_rate=0.5):
        self.plan = FakePlan(shape, fingerprint)
        self.mesh = jax.make_mesh(
            shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
        )
        self.calls = 0
        self.on_step = lambda index: None
        self.spoil = lambda index, metrics: metrics
        by = partial(NamedSharding, self.mesh)
        self.batch_shardings = {"tokens": by(P("data")), "targets": by(P("data"))}
        weights = {"embed": by(P("tensor", None)), "out": by(P(None, "tensor"))}
        self.state_shardings = TrainState(
            step=by(P()),
            params=weights,
            opt_state=(dict(weights), None),
            rest={"key": by(P())},
        )
        self._init = jax.jit(self._make, out_shardings=self.state_shardings)
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(self._make, 0),
            self.state_shardings,
        )
        self._jitted = jax.jit(
            partial(_sgd, learning_rate=learning_rate),
            donate_argnums=0,
            out_shardings=(self.state_shardings, None),
        )

    @staticmethod
    def _make(seed):
        embed, out, rest = jax.random.split(jax.random.key(seed), 3)
        params = {
            "embed": jax.random.normal(embed, (VOCAB, WIDTH)),
            "out": jax.random.normal(out, (WIDTH, VOCAB)),
        }
        trace = jax.tree.map(jnp.zeros_like, params)
        return TrainState(
            jnp.zeros((), jnp.int32), params, (trace, None), {"key": rest}
        )

    def init(self, seed):
        return self._init(seed)

    def __call__(self, state, batch):
        index, self.calls = self.calls, self.calls + 1
        self.on_step(index)
        state, metrics = self._jitted(state, batch)
        return state, self.spoil(index, metrics)


def _sgd(state, batch, *, learning_rate):
    key, drop = jax.random.split(state.rest["key"])

    def loss_fn(params):
        hidden = params["embed"][batch["tokens"]]
        kept = jax.random.bernoulli(drop, 0.9, (WIDTH,))
        hidden = jnp.where(kept, hidden, jnp.float32(0))
        logits = jax.nn.log_softmax(hidden @ params["out"])
        picked = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)
        return -picked.mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    trace = jax.tree.map(lambda t, g: 0.9 * t + g, state.opt_state[0], grads)
    params = jax.tree.map(lambda p, t: p - learning_rate * t, state.params, trace)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    new = TrainState(state.step + 1, params, (trace, None), {"key": key})
    return new, {"loss": loss, "grad_norm": norm}


@pytest.fixture
def make_step():
    return FakeStep


@pytest.fixture
def flip_data():
    """Changes one bit of a checkpoint's arrays."""

    def flip(directory, step, at=0.5):
        files = [f for f in (directory / str(step) / "state").rglob("*") if f.is_file()]
        largest_bytes = max(f.stat().st_size for f in files)
        # There may be two copies of which only one is read.
        for path in files:
            if path.stat().st_size == largest_bytes:
                content = bytearray(path.read_bytes())
                content[int(len(content) * at)] ^= 0x10
                path.write_bytes(content)

    return flip
