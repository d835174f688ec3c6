"""The decoder against an independent NumPy one, and its program's shape."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from autoshard import models
from autoshard.ir._jaxcompat import scan_counts

SMALL = models.DecoderConfig(
    name="small",
    vocab=32,
    layers=2,
    embed=12,
    heads=6,
    kv_heads=2,
    head_dim=4,
    mlp=20,
    max_seq=16,
    rope_theta=100.0,
    dtype="float32",
)
GPT = {
    "norm": "layer",
    "positions": "learned",
    "activation": "gelu",
    "use_bias": True,
    "tied_head": True,
}
CASES = {
    "llama": SMALL,
    "llama-multi-head": replace(SMALL, kv_heads=6),
    "gpt": replace(SMALL, kv_heads=6, **GPT),
    "gpt-grouped-untied": replace(SMALL, **(GPT | {"tied_head": False})),
    "swiglu-with-bias": replace(SMALL, use_bias=True),
}
EXPERTS = replace(SMALL, experts=models.Experts(count=3, top_k=2))


def pure(model):
    return nnx.to_pure_dict(nnx.state(model))


def with_params(config, params):
    model = models.build(config)
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(model, state)
    return model


def randomised(config, seed=0):
    """A model whose every parameter matters: biases and scales are random as well."""
    model = models.build(config)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(0.0, 0.5, p.shape), jnp.float32), pure(model)
    )
    return with_params(config, params)


def tokens_for(config, batch=2, seq=9, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, config.vocab, (batch, seq)), jnp.int32)


def run(model, tokens):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, tokens)


def numpy_logits(config, params, tokens):
    """The same model written one head, one position at a time, in float64."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    batch = [_numpy_sequence(config, params, row) for row in np.asarray(tokens)]
    return np.stack(batch)


def _numpy_sequence(config, params, row):
    x = params["embedding"][row]
    if config.positions == "learned":
        x = x + params["positions"][: len(row)]
    for layer in range(config.layers):
        block = jax.tree.map(lambda p, layer=layer: p[layer], params["blocks"])
        normed = _numpy_norm(config, block["attention_norm"], x)
        x = x + _numpy_attention(config, block["attention"], normed)
        x = x + _numpy_mlp(block["mlp"], _numpy_norm(config, block["mlp_norm"], x))
    x = _numpy_norm(config, params["final_norm"], x)
    return x @ (params["embedding"].T if config.tied_head else params["head"])


def _numpy_norm(config, p, x):
    rows = []
    for row in x:
        if config.norm == "layer":
            row = row - row.sum() / len(row)
        row = row / np.sqrt((row * row).sum() / len(row) + config.norm_eps)
        rows.append(row * p["scale"] + p.get("bias", 0.0))
    return np.array(rows)


def _numpy_attention(config, p, x):
    out = np.zeros_like(x) + p.get("o_bias", 0.0)
    group = config.heads // config.kv_heads
    none = np.zeros((config.kv_heads, group + 2, config.head_dim))
    bias = p.get("qkv_bias", none)
    for head in range(config.heads):
        kv = head // group
        q = x @ p["q"][:, head] + bias[kv, head % group]
        k = x @ p["k"][:, kv] + bias[kv, -2]
        v = x @ p["v"][:, kv] + bias[kv, -1]
        if config.positions == "rope":
            q, k = _numpy_rope(config, q), _numpy_rope(config, k)
        for s in range(len(x)):
            scores = np.array([q[s] @ k[t] for t in range(s + 1)])
            weights = np.exp(scores / np.sqrt(config.head_dim))
            mixed = (weights / weights.sum()) @ v[: s + 1]
            out[s] += mixed @ p["o"][head]
    return out


def _numpy_rope(config, x):
    """Each pair of features as one complex number, turned by its angle."""
    half = config.head_dim // 2
    pairs = x[:, :half] + 1j * x[:, half:]
    for position in range(len(x)):
        for i in range(half):
            angle = position / config.rope_theta ** (2 * i / config.head_dim)
            pairs[position, i] *= np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag], axis=1)


def _numpy_mlp(p, x):
    up = x @ p["up"] + p.get("up_bias", 0.0)
    if "gate" in p:
        gate = x @ p["gate"] + p.get("gate_bias", 0.0)
        hidden = up * gate / (1 + np.exp(-gate))
    else:
        # Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.
        hidden = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return hidden @ p["down"] + p.get("down_bias", 0.0)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_a_naive_implementation(case):
    model = randomised(CASES[case])
    tokens = tokens_for(CASES[case])
    want = numpy_logits(CASES[case], pure(model), tokens)
    np.testing.assert_allclose(run(model, tokens), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("case", ["llama", "gpt"])
def test_a_token_changes_no_earlier_logits_and_some_later_ones(case):
    model = randomised(CASES[case])
    tokens = tokens_for(CASES[case])
    changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % SMALL.vocab)
    before, after = run(model, tokens), run(model, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).max(axis=-1).min()) > 1e-3


@pytest.mark.parametrize(
    "config", [CASES["llama"], CASES["gpt"], EXPERTS], ids=["llama", "gpt", "experts"]
)
def test_scanned_and_unrolled_agree_in_value_and_gradient(config):
    flat = randomised(replace(config, scan_layers=False))
    scanned = with_params(config, models.stack_layers(pure(flat)))
    tokens = tokens_for(config)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, axis=1)}
    grad = nnx.jit(nnx.value_and_grad(models.next_token_loss))
    (want, want_grad), (got, got_grad) = grad(flat, batch), grad(scanned, batch)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    want_grad = models.stack_layers(nnx.to_pure_dict(want_grad))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        nnx.to_pure_dict(got_grad),
        want_grad,
    )


def test_stack_layers_refuses_params_that_are_stacked_already():
    with pytest.raises(ValueError, match="scan_layers=False"):
        models.stack_layers(pure(models.build(SMALL)))


def loss_jaxpr(config, *, grad=False, batch=2, seq=8):
    graph, state = nnx.split(models.build_abstract(config))
    ids = jax.ShapeDtypeStruct((batch, seq), jnp.int32)

    def loss(state, batch):
        return models.next_token_loss(nnx.merge(graph, state), batch)

    fn = jax.value_and_grad(loss) if grad else loss
    return jax.make_jaxpr(fn)(state, {"tokens": ids, "targets": ids})


def test_loss_is_one_scan_over_stacked_blocks_with_no_constants():
    jaxpr = loss_jaxpr(SMALL)
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 1
    consts, carry = scan_counts(scans[0].params)
    assert (scans[0].params["length"], carry) == (SMALL.layers, 1)
    stacked = scans[0].invars[consts + carry :]
    block = jax.tree.leaves(nnx.state(models.build_abstract(SMALL).blocks))
    assert sorted(v.aval.shape for v in stacked) == sorted(p.shape for p in block)
    assert not jaxpr.consts


def test_backward_scan_holds_no_constant_as_large_as_the_scores():
    batch, seq = 3, 8
    jaxpr = loss_jaxpr(SMALL, grad=True, batch=batch, seq=seq)
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 2
    for eqn in scans:
        for var in eqn.invars[: scan_counts(eqn.params)[0]]:
            assert var.aval.size <= seq * seq, var.aval


def test_every_parameter_names_all_its_dims():
    state = nnx.state(
        models.build_abstract(replace(SMALL, **(GPT | {"tied_head": False})))
    )
    seen = set()
    for path, param in nnx.to_flat_state(state):
        names = param.get_metadata("out_sharding")
        assert len(names) == len(param.shape), path
        assert len(set(names)) == len(names), path
        assert (names[0] == "layers") == (path[0] == "blocks"), path
        seen |= set(names)
    assert seen == {
        "embed",
        "head_dim",
        "heads",
        "kv_heads",
        "layers",
        "mlp",
        "position",
        "qkv",
        "vocab",
    }


def test_parameters_are_cast_at_use_and_logits_stay_float32():
    model = models.build(replace(SMALL, dtype="bfloat16"))
    assert model(tokens_for(SMALL)).dtype == jnp.float32
    assert model.blocks.mlp.up.dtype == jnp.float32
    scan = next(
        eqn for eqn in loss_jaxpr(model.config).eqns if eqn.primitive.name == "scan"
    )
    stacked = scan.invars[sum(scan_counts(scan.params)) :]
    assert {str(v.aval.dtype) for v in stacked} == {"float32"}
    assert str(scan.outvars[0].aval.dtype) == "bfloat16"


def test_traces_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        loss_jaxpr(replace(SMALL, dtype="bfloat16"), grad=True)
        loss_jaxpr(replace(SMALL, dtype="bfloat16", **GPT), grad=True)


def test_fresh_weights_have_the_stated_spread_in_every_layer():
    config = models.get("llama3-tiny")
    block = models.build(config).blocks
    up, down = np.asarray(block.mlp.up[...]), np.asarray(block.mlp.down[...])
    np.testing.assert_allclose(up.std(axis=(1, 2)), 0.02, rtol=0.03)
    residual = 0.02 / np.sqrt(2 * config.layers)
    np.testing.assert_allclose(down.std(axis=(1, 2)), residual, rtol=0.03)
    assert np.abs(up[0] - up[1]).max() > 0.02


@pytest.mark.parametrize("stray", [-1, 32])
def test_a_token_outside_the_vocabulary_is_not_taken_for_another(stray):
    tokens = tokens_for(SMALL).at[0, 4].set(stray)
    logits = run(models.build(SMALL), tokens)
    assert bool(jnp.isnan(logits[0, 4]).all())
    assert not bool(jnp.isnan(logits[1]).any())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (jnp.zeros((2, 3), jnp.float32), r"float32\[2, 3\]; pass integer ids"),
        (jnp.zeros(3, jnp.int32), r"int32\[3\]"),
        (jnp.zeros((1, 17), jnp.int32), "17 tokens exceed max_seq=16"),
    ],
)
def test_tokens_of_the_wrong_form_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        models.build(SMALL)(tokens)
