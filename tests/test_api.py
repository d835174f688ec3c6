"""The public functions: names, model references, and programs of each kind."""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from helpers.equality import pinned
from jax.experimental import pallas as pl

import autoshard as ash
from autoshard import api
from autoshard.ir.errors import InputError, NameUnknownError

LEARNING_RATE = 1e-2


def model_ref(model, **changes):
    sizes = {"batch": 8, "seq": 16, "optimizer": "adamw", "learning_rate": 1e-3}
    return ash.ModelRef(model=model, **{**sizes, "dtype": "f32", **changes})


# -- names ---------------------------------------------------------------------------


def test_public_names_are_few_and_documented():
    assert len(ash.__all__) == len(set(ash.__all__)) <= 30
    for name in set(ash.__all__) - {"__version__"}:
        doc = inspect.getdoc(getattr(ash, name))
        assert doc, name
        # A dataclass or model without a docstring inherits its signature as one.
        assert not doc.startswith(f"{name}("), name


def test_star_import_gives_exactly_the_public_names():
    space: dict[str, object] = {}
    exec("from autoshard import *", space)
    assert set(space) - {"__builtins__"} == set(ash.__all__)


# -- resolve -------------------------------------------------------------------------

MODULE = """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import autoshard as ash


    class Bigram(nnx.Module):
        def __init__(self, rngs):
            table = 0.1 * jax.random.normal(rngs.params(), (256, 256))
            self.table = nnx.Param(table, out_sharding=("embed", "vocab"))

        def __call__(self, tokens):
            return self.table[...][tokens]


    def with_rngs(rngs):
        return Bigram(rngs)


    def without_rngs():
        return Bigram(nnx.Rngs(7))


    def with_optional_argument(seed=3):
        return Bigram(nnx.Rngs(seed))


    def as_train_step():
        return ash.train_step(
            lambda model, batch: (model(batch["tokens"]) ** 2).mean(),
            optax.sgd(0.5),
            model=Bigram,
        )


    ready = as_train_step()


    def as_number():
        return 7


    not_a_function = 7
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module in the current directory, which is not on the path yet."""
    name = f"own_models_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    return name


def first_loss(resolved):
    """The loss of the first step on zeros, and the state that came out."""
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), resolved.batch)
    state, metrics = jax.jit(resolved.step)(resolved.step.init(0), batch)
    return float(metrics["loss"]), state


def test_resolve_a_name_of_the_zoo():
    found = ash.resolve(model_ref("llama3-tiny", batch=4, seq=32))
    assert {k: (v.shape, v.dtype) for k, v in found.batch.items()} == {
        "tokens": ((4, 32), jnp.int32),
        "targets": ((4, 32), jnp.int32),
    }
    assert found.notes == ()
    params = found.step.abstract_state().params
    assert params["embedding"].shape == (256, 128)


def test_resolve_honours_dtype_and_scan_layers():
    def blocks(**changes):
        found = ash.resolve(model_ref("gpt2-tiny", **changes))
        jaxpr = jax.make_jaxpr(found.step)(found.step.abstract_state(), found.batch)
        return found.step.abstract_state().params["blocks"], str(jaxpr)

    stacked, f32 = blocks(scan_layers=True)
    separate, bf16 = blocks(scan_layers=False, dtype="bf16")
    assert stacked["mlp"]["up"].shape == (4, 64, 256)
    assert separate[0]["mlp"]["up"].shape == (64, 256)
    assert "bf16" in bf16
    assert "bf16" not in f32


def test_resolve_uses_the_optimizer_and_its_learning_rate(own_module):
    def moved(rate):
        ref = model_ref(f"{own_module}:with_rngs", optimizer="sgd", learning_rate=rate)
        found = ash.resolve(ref)
        return first_loss(found)[1].params["table"] - found.step.init(0).params["table"]

    small = moved(1.0)
    assert jnp.abs(small).max() > 1e-4
    np.testing.assert_allclose(moved(2.0), 2 * small, rtol=1e-3, atol=1e-6)


def test_resolve_a_hugging_face_config(tmp_path):
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    params = ash.resolve(model_ref(str(path))).step.abstract_state().params
    assert params["embedding"].shape == (96, 32)
    assert params["blocks"]["mlp"]["up"].shape == (2, 32, 80)


@pytest.mark.parametrize(
    "function", ["with_rngs", "without_rngs", "with_optional_argument"]
)
def test_resolve_a_function_that_returns_a_model(own_module, function):
    found = ash.resolve(model_ref(f"{own_module}:{function}"))
    loss, state = first_loss(found)
    assert found.step.variables["params/table"].get_metadata()["out_sharding"] == (
        "embed",
        "vocab",
    )
    # Logits of 0.1 x normal are nearly uniform over 256 bytes.
    assert loss == pytest.approx(np.log(256), rel=0.1)
    assert int(state.step) == 1


@pytest.mark.parametrize("function", ["as_train_step", "ready"])
def test_resolve_a_train_step_keeps_its_own_loss_and_optimizer(own_module, function):
    found = ash.resolve(model_ref(f"{own_module}:{function}", optimizer="adamw"))
    loss, state = first_loss(found)
    assert loss == pytest.approx(0.01, rel=0.2)  # the mean square of 0.1 x normal
    assert not any(jnp.ndim(x) for x in jax.tree.leaves(state.opt_state)), "not sgd"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "lama3-tiny"}, NameUnknownError, "Did you mean 'llama3-tiny'"),
        ({"dtype": "f16"}, NameUnknownError, "unknown dtype 'f16'; known: bf16, f32"),
        ({"optimizer": "adamww"}, NameUnknownError, "Did you mean 'adamw'"),
        ({"learning_rate": 0.0}, InputError, "learning rate must be positive; got 0"),
        ({"learning_rate": float("nan")}, InputError, "must be positive; got nan"),
        ({"batch": 0}, InputError, "--batch must be 1 or more; got 0"),
        ({"seq": -1}, InputError, "--seq must be 1 or more; got -1"),
        ({"seq": 10**6}, InputError, "--seq 1000000 is longer than model"),
        ({"model": "absent/config.json"}, InputError, "absent/config.json"),
        ({"model": "no_such_module:build"}, InputError, "cannot import"),
    ],
)
def test_resolve_refuses(changes, error, words):
    with pytest.raises(error, match=re.escape(words)):
        ash.resolve(model_ref(**{"model": "llama3-tiny", **changes}))


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        ("with_rng", NameUnknownError, "Did you mean 'with_rngs'"),
        ("not_a_function", NameUnknownError, "has no function 'not_a_function'"),
        ("as_number", InputError, "returned int; it must return an"),
        ("", NameUnknownError, "has no function ''"),
    ],
)
def test_resolve_refuses_functions(own_module, function, error, words):
    with pytest.raises(error, match=re.escape(words)):
        ash.resolve(model_ref(f"{own_module}:{function}"))


def test_resolve_says_which_module_is_missing_in_the_users_module(tmp_path, own_module):
    (tmp_path / "broken_models.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(InputError, match="nowhere_to_be_found"):
        ash.resolve(model_ref("broken_models:build"))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "mamba"}'])
def test_resolve_refuses_configs_it_cannot_build(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(str(path))):
        ash.resolve(model_ref(str(path)))


def test_every_optimizer_makes_a_step():
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    grads = jax.tree.map(jnp.ones_like, params)
    for name in api.OPTIMIZERS:
        made = api.optimizer(name, 0.1)
        updates, _ = made.update(grads, made.init(params), params)
        assert all(bool((u < 0).all()) for u in jax.tree.leaves(updates)), name


# -- search --------------------------------------------------------------------------


def test_search_refuses_top_below_one():
    with pytest.raises(InputError, match=re.escape("top must be 1 or more; got 0")):
        ash.search(plain_step, *plain_args(), cluster="cpu:8", top=0)


def test_search_returns_as_many_different_plans_as_asked_fastest_first():
    plans = ash.search(plain_step, *plain_args(), cluster="cpu:8", top=3)
    times = [p.predicted.step_s for p in plans]
    assert len(plans) == 3
    assert times == sorted(times)
    assert len({p.model_dump_json() for p in plans}) == 3
    best = ash.search(plain_step, *plain_args(), cluster="cpu:8")
    # How many candidates a bound rules out depends on how many plans are wanted.
    same = {"certificate": plans[0].certificate}
    assert best.model_copy(update=same) == plans[0]
    assert best.certificate.lower_bound_s == plans[0].certificate.lower_bound_s


def test_search_takes_names_and_objects_alike():
    by_name = ash.search(
        plain_step, *plain_args(), cluster="cpu:8", strategy="fsdp", top=None
    )
    by_value = ash.search(
        plain_step,
        *plain_args(),
        cluster=ash.cluster("cpu:8"),
        strategy=ash.load_strategy("fsdp"),
    )
    assert by_name == by_value


def test_search_reports_progress_and_records_the_model():
    lines: list[str] = []
    ref = model_ref("gpt2-tiny")
    found = ash.resolve(ref)
    plan = ash.search(
        found.step,
        found.batch,
        cluster="cpu:8",
        strategy="dp",
        model_ref=ref,
        log=lines.append,
    )
    assert plan.program.model == ref
    assert any("candidates priced" in line for line in lines)


# -- programs of other kinds, sharded against single-device ----------------------------

ADAM = optax.adam(LEARNING_RATE, eps=1e-4)  # above the rounding noise of a gradient


def mlp_loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["up"] + params["bias"])
    return ((hidden @ params["down"] - batch["y"]) ** 2).mean()


def mlp_params(key):
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (32, 64)) / 32**0.5,
        "bias": jnp.zeros(64),
        "down": jax.random.normal(down, (64, 16)) / 8,
    }


def mlp_batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        x = rng.standard_normal((16, 32), dtype=np.float32)
        yield {"x": x, "y": np.sin(x[:, :16])}


def plain_step(params, opt_state, batch):
    """A step as people write it, known to no library of ours."""
    loss, grads = jax.value_and_grad(mlp_loss)(params, batch)
    updates, opt_state = ADAM.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss


def plain_args():
    params = mlp_params(jax.random.key(0))
    return params, ADAM.init(params), next(mlp_batches(1))


def assert_close(got, want):
    """Norm of the difference within 1e-5 of the norm of the reference, leaf by leaf."""
    got, want = jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
    for (path, a), b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        difference = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        assert difference < 1e-5, (jax.tree_util.keystr(path), difference)


@pytest.mark.parametrize("strategy", ["dp", "fsdp"])
def test_a_plain_function_equals_single_device(strategy):
    args = plain_args()
    plan = ash.search(plain_step, *args, cluster="cpu:8", strategy=strategy)
    parallel = ash.parallelize(plain_step, plan, *args)
    single, want = jax.jit(plain_step), args[:2]
    got = want
    for batch in mlp_batches(3):
        *want, want_loss = single(*want, batch)
        *got, got_loss = parallel(*got, batch)
        assert_close((got, got_loss), (want, want_loss))
    up = got[0]["up"].sharding.spec
    moment = got[1][0].mu["up"].sharding.spec
    sharded = any(dim is not None for dim in up)
    assert sharded == (strategy == "fsdp"), up
    assert moment == up


def test_a_plain_function_needs_its_arguments_to_run():
    plan = ash.search(plain_step, *plain_args(), cluster="cpu:8", strategy="dp")
    with pytest.raises(InputError, match=re.escape("parallelize(fn, plan, *abstract")):
        ash.parallelize(plain_step, plan)


def test_a_plain_function_cannot_be_rematerialised():
    strategy = ash.load_strategy("dp")
    full = strategy.schedule.model_copy(update={"remat": "full"})
    with pytest.raises(InputError, match="train_step"):
        ash.search(
            plain_step,
            *plain_args(),
            cluster="cpu:8",
            strategy=strategy.model_copy(update={"schedule": full}),
        )


def equals_single_device(step, strategy):
    """Runs a train step both ways; the plan, and the state the sharded run ended in."""
    batches = list(mlp_batches(3))
    plan = ash.search(step, batches[0], cluster="cpu:8", strategy=strategy)
    parallel = ash.parallelize(step, plan)
    single = jax.jit(step)
    want, got = step.init(0), parallel.init(0)
    for batch in batches:
        want, want_metrics = single(want, batch)
        got, got_metrics = parallel(got, batch)
        assert_close((got, got_metrics), (want, want_metrics))
    assert int(got.step) == len(batches)
    return plan, got


@pytest.mark.parametrize("strategy", ["zero1", "fsdp", "auto"])
def test_a_raw_pytree_of_parameters_equals_single_device(strategy):
    step = ash.train_step(mlp_loss, ADAM, model=mlp_params)
    plan, state = equals_single_device(step, strategy)
    assert {t.path for t in plan.tensors if t.state == "params"} == {
        "params/up",
        "params/bias",
        "params/down",
    }
    assert state.rest == {}


class LinenMlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(16)(linen.LayerNorm()(jnp.tanh(linen.Dense(64)(x))))


def test_a_linen_model_equals_single_device():
    module = LinenMlp()

    def loss(params, batch):
        return ((module.apply(params, batch["x"]) - batch["y"]) ** 2).mean()

    step = ash.train_step(
        loss, ADAM, model=lambda key: module.init(key, jnp.zeros((1, 32)))
    )
    plan, state = equals_single_device(step, "fsdp")
    kernel = state.params["params"]["Dense_0"]["kernel"]
    assert plan.sizes["fsdp"] > 1
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.down = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x):
        hidden = self.norm(jnp.tanh(self.up(x)))
        return self.down(ash.annotate(hidden, "batch", "mlp"))


@pytest.mark.parametrize(
    ("strategy", "mesh", "compute"),
    [
        ("fsdp", {"data": 2, "fsdp": 4}, ((), ())),
        ("megatron-tp", {"data": 2, "tensor": 4}, ((), ("tensor",))),
    ],
)
def test_flax_layers_without_names_equal_single_device(strategy, mesh, compute):
    def loss(model, batch):
        return ((model(batch["x"]) - batch["y"]) ** 2).mean()

    step = ash.train_step(loss, ADAM, model=NnxMlp)
    policy = pinned(strategy, microbatches=1, remat="none", **mesh)
    plan, state = equals_single_device(step, policy)
    [up] = [t for t in plan.tensors if t.path == "params/up/kernel"]
    assert (up.shape, up.compute.dims) == ((32, 64), compute)
    kernel = state.params["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    # Biases and scales are small: gathered where they are used. Were activations moved
    # to meet their storage specs instead, there would be all-to-alls.
    assert "all_to_all" not in {c.kind for c in plan.predicted.collectives}


# -- rules ---------------------------------------------------------------------------


def test_rules_of_a_function_are_held_against_what_it_computes():
    w, x = jnp.ones((4, 6)), jnp.ones((8, 4))

    def layer(w, x):
        return jax.nn.softmax(jnp.sort(x @ w, axis=1)).sum(0)

    assert ash.check_rules(layer, w, x) == ()
    assert ash.check_rules(lambda k: jax.random.normal(k, (4,)), jax.random.key(0))


def test_a_wrong_rule_of_a_users_kernel_is_found(monkeypatch):
    def running_sum(x):
        def kernel(x_ref, out_ref):
            out_ref[:] = jnp.cumsum(x_ref[:], axis=1)

        return pl.pallas_call(
            kernel, jax.typeof(x), interpret=True, name="api_running_sum"
        )(x)

    module = sys.modules["autoshard.rules.foreign"]  # the package has a function so
    monkeypatch.setattr(module, "_PATTERNS", {})
    monkeypatch.setattr(module, "_CALLS", {})
    x = jnp.ones((4, 8))
    ash.register_rule("api_running_sum", "b s -> b s; blocked s", call=running_sum)
    assert ash.check_rules(running_sum, x) == ()
    ash.register_rule("api_running_sum", "b s -> b s", call=running_sum)
    with pytest.raises(InputError, match=r"'api_running_sum' at .*test_api\.py.*wrong"):
        ash.check_rules(running_sum, x)
