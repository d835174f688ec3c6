"""The mixture of experts against one that goes token by token, and its penalty."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from autoshard import models
from autoshard.models.layers import ParamFactory
from autoshard.models.mixture import Mixture, route

SMALL = models.DecoderConfig(
    name="small",
    vocab=32,
    layers=2,
    embed=12,
    heads=2,
    kv_heads=2,
    head_dim=4,
    mlp=20,
    max_seq=16,
    dtype="float32",
    experts=models.Experts(count=4, top_k=2, group=8),
)


def with_experts(**fields):
    return replace(SMALL, experts=replace(SMALL.experts, **fields))


def layer(config, seed=0):
    """A mixture whose experts and choices all matter, and its parameters."""
    rng = np.random.default_rng(seed)
    make = ParamFactory(rngs=nnx.Rngs(0), dtype=jnp.float32)
    module = Mixture(config, make)
    graph, state = nnx.split(module)
    params = jax.tree.map(
        lambda p: rng.normal(0.0, 0.5, p.shape), nnx.to_pure_dict(state)
    )
    nnx.replace_by_pure_dict(
        state, jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    )
    return nnx.merge(graph, state), params


def stream(batch, seq, seed=1):
    return np.random.default_rng(seed).normal(0.5, 1.0, (batch, seq, SMALL.embed))


def by_token(config, params, x):
    """The same layer in float64, a token and a choice at a time.

    Returns:
        The result, the penalty, and how many choices found no slot.
    """
    experts = config.experts
    group = min(experts.group, x.shape[1])
    slots = -(-group * experts.top_k * experts.capacity // experts.count)
    y, penalties, dropped = np.zeros_like(x), [], 0
    for sequence in range(x.shape[0]):
        for start in range(0, x.shape[1], group):
            tokens = range(start, start + group)
            probabilities, ranked = {}, {}
            for t in tokens:
                logits = x[sequence, t] @ params["router"]
                odds = np.exp(logits - logits.max())
                probabilities[t] = odds / odds.sum()
                ranked[t] = sorted(
                    range(experts.count), key=lambda e, t=t: -probabilities[t][e]
                )[: experts.top_k]
            used = [0] * experts.count
            for choice in range(experts.top_k):
                for t in tokens:
                    expert = ranked[t][choice]
                    if used[expert] == slots:
                        dropped += 1
                        continue
                    used[expert] += 1
                    chosen = probabilities[t][ranked[t]]
                    weight = probabilities[t][expert] / chosen.sum()
                    y[sequence, t] += weight * feed_forward(
                        params["experts"], expert, x[sequence, t]
                    )
            uneven = 0.0
            for expert in range(experts.count):
                sent = sum(expert in ranked[t] for t in tokens)
                share = sent / (group * experts.top_k)
                mean = sum(probabilities[t][expert] for t in tokens) / group
                uneven += share * mean
            penalties.append(experts.balance * experts.count * uneven)
    return y, sum(penalties) / len(penalties), dropped


def feed_forward(p, expert, x):
    up, gate = x @ p["up"][expert], x @ p["gate"][expert]
    return (up * gate / (1 + np.exp(-gate))) @ p["down"][expert]


@pytest.mark.parametrize(
    ("fields", "seq", "drops"),
    [
        ({}, 16, True),
        ({"capacity": 0.5}, 16, True),
        ({"capacity": 4.0}, 16, False),
        ({"top_k": 1}, 16, True),
        ({"top_k": 4, "capacity": 1.0}, 8, False),
        ({"group": 16}, 16, True),
        ({"group": 64}, 6, True),  # a sequence shorter than a group is one
    ],
    ids=repr,
)
def test_layer_equals_one_that_goes_token_by_token(fields, seq, drops):
    config = with_experts(**fields)
    module, params = layer(config)
    x = stream(3, seq)
    want, penalty, dropped = by_token(config, params, x)
    assert bool(dropped) == drops
    y, got = module(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(got, penalty, rtol=1e-5)


def test_with_room_for_all_it_is_the_mixture_of_the_best():
    """With a slot for every token no order of tokens matters: the plain formula."""
    config = with_experts(capacity=4.0)
    module, params = layer(config, seed=2)
    x = stream(2, 16)
    want = np.zeros_like(x)
    odds = np.exp(x @ params["router"])
    worst_two = np.sort(odds, axis=-1)[..., :2]
    odds[odds <= worst_two[..., 1:]] = 0.0  # of four, two are left
    for expert in range(4):
        weight = odds[..., expert] / odds.sum(axis=-1)
        want += weight[..., None] * feed_forward(params["experts"], expert, x)
    got, _ = module(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_gradient_is_that_of_small_changes():
    config = with_experts(capacity=1.0)
    module, params = layer(config)
    x = stream(1, 8)
    graph, state = nnx.split(module)

    def loss(router):
        changed = jax.tree.map(lambda p: p, state)
        changed["router"] = changed["router"].replace(router)
        y, penalty = nnx.merge(graph, changed)(jnp.asarray(x, jnp.float32))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))) + penalty

    got = jax.grad(loss)(jnp.asarray(params["router"], jnp.float32))
    weights = np.cos(np.arange(x.size).reshape(x.shape))
    for at in [(0, 0), (3, 1), (11, 3)]:
        sides = []
        for step in (1e-6, -1e-6):
            moved = {**params, "router": params["router"].copy()}
            moved["router"][at] += step
            y, penalty, _ = by_token(config, moved, x)
            sides.append((y * weights).sum() + penalty)
        np.testing.assert_allclose(got[at], (sides[0] - sides[1]) / 2e-6, rtol=1e-3)


def test_penalty_is_least_where_all_is_even():
    experts = models.Experts(count=4, top_k=1, balance=0.25)
    # Four tokens, each sure of an expert: shares and means are 1/4 each, and
    # 0.25 * 4 * 4 * (1/4 * 1/4) = 0.25. All of one expert: 0.25 * 4 * 1 = 1.
    even, one = jnp.eye(4)[None, None], jnp.eye(4)[None, None, [0, 0, 0, 0]]
    assert float(route(even, experts)[1]) == pytest.approx(0.25)
    assert float(route(one, experts)[1]) == pytest.approx(1.0)


def test_first_choices_have_slots_before_second_ones():
    # Both tokens want both experts, one slot each (2 tokens x 2 choices x 0.5 / 2).
    # The second token's first choice is expert 0, as is the first token's.
    gates = jnp.array([[[[0.7, 0.3], [0.6, 0.4]]]])
    weights, _ = route(gates, models.Experts(count=2, top_k=2, capacity=0.5))
    # Expert 0 takes the first token's first choice; expert 1 its second choice, which
    # stands before the second token's.
    np.testing.assert_allclose(weights[0, 0, :, :, 0], [[0.7, 0.3], [0.0, 0.0]])
    gates = jnp.array([[[[0.7, 0.3], [0.4, 0.6]]]])
    weights, _ = route(gates, models.Experts(count=2, top_k=2, capacity=0.5))
    # Here each is the first choice of one token: second choices are dropped.
    np.testing.assert_allclose(weights[0, 0, :, :, 0], [[0.7, 0.0], [0.0, 0.6]])


def test_model_adds_the_penalties_of_all_blocks_to_the_loss():
    config = with_experts(balance=0.5)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 16)), jnp.int32)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, axis=1)}
    losses = {}
    for balance in (0.0, 0.5):
        model = models.build(
            replace(config, experts=replace(config.experts, balance=balance))
        )
        losses[balance] = models.next_token_loss(model, batch)
    _, penalty = model(tokens)
    # A fresh router is almost even: 0.5 from each of the two blocks.
    assert float(penalty) == pytest.approx(1.0, rel=0.01)
    np.testing.assert_allclose(losses[0.5] - losses[0.0], penalty, rtol=1e-4)


def test_a_sequence_that_does_not_divide_into_groups_is_refused():
    module, _ = layer(SMALL)
    with pytest.raises(ValueError, match="12 tokens do not divide into groups of 8"):
        module(jnp.zeros((1, 12, 12)))
