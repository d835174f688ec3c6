"""Counts against the published ones, and what a config refuses."""

from dataclasses import replace

import jax
import pytest
from flax import nnx

from autoshard import models

# Parameter counts of the released checkpoints. GPT-3 was never released: its count is
# summed by hand from the sizes in arXiv:2005.14165, table 2.1, which prints 175.0B.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-1.5b": 1_557_611_200,
    "llama3-8b": 8_030_261_248,
    "mixtral-8x7b": 46_702_792_704,  # arXiv:2401.04088, abstract: 47B
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "gpt3-175b": (
        50257 * 12288  # token table, also the head
        + 2048 * 12288  # position table
        + 96 * 4 * (12288 * 12288 + 12288)  # query, key, value, output
        + 96 * (12288 * 49152 + 49152 + 49152 * 12288 + 12288)  # feed-forward
        + (96 * 2 + 1) * 2 * 12288  # layer norms
    ),
}


def count(config):
    state = nnx.state(models.build_abstract(config))
    return sum(leaf.size for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_closed_form_count_is_the_published_one(name):
    assert models.num_params(models.get(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", models.names())
def test_model_has_as_many_parameters_as_its_config_says(name):
    config = models.get(name)
    assert count(config) == models.num_params(config)


@pytest.mark.parametrize(
    "change",
    [
        {"use_bias": True},
        {"norm": "layer"},
        {"norm": "layer", "use_bias": True},
        {"positions": "learned"},
        {"activation": "gelu"},
        {"tied_head": True},
        {"scan_layers": False},
        {"head_dim": 12, "kv_heads": 2},
        {"experts": models.Experts(count=3, top_k=1)},
    ],
    ids=repr,
)
def test_count_follows_every_choice(change):
    config = replace(models.get("llama3-tiny"), **change)
    assert count(config) == models.num_params(config)


@pytest.mark.parametrize("name", [n for n in models.names() if n.endswith("-tiny")])
def test_tiny_models_divide_over_eight_devices(name):
    config = models.get(name)
    for size in (config.heads, config.kv_heads, config.mlp, config.vocab, config.embed):
        assert size % 8 == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers=0 must be a positive int"),
        ({"embed": 64.0}, r"embed=64\.0 must be a positive int"),
        ({"mlp": True}, "mlp=True must be a positive int"),
        ({"kv_heads": 3}, "heads=16 is not a multiple of kv_heads=3"),
        ({"norm": "batch"}, "norm='batch' is not known; choose one of 'rms', 'layer'"),
        ({"positions": "alibi"}, "'rope', 'learned'"),
        ({"activation": "relu"}, "'swiglu', 'gelu'"),
        ({"dtype": "int8"}, "dtype='int8' is not known"),
        ({"param_dtype": "float64"}, "param_dtype='float64' is not known"),
        ({"use_bias": 1}, "use_bias=1 must be True or False"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must exceed 1"),
        (
            {
                "positions": "learned",
                "rope_scaling": models.RopeScaling(factor=8.0, original_max_seq=64),
            },
            "has no rotations to scale",
        ),
    ],
)
def test_impossible_config_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        replace(models.get("llama3-tiny"), **change)
    assert "llama3-tiny" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0.5}, "would shorten the context"),
        ({"low_freq_factor": 4.0}, "must be positive and below high_freq_factor=4.0"),
        ({"original_max_seq": 0}, "original_max_seq=0 must be a positive int"),
    ],
)
def test_impossible_rope_scaling_is_refused(change, message):
    fields = {"factor": 8.0, "original_max_seq": 8192} | change
    with pytest.raises(ValueError, match=message):
        models.RopeScaling(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count=0 must be a positive int"),
        ({"top_k": 9}, "top_k=9 exceeds count=8"),
        ({"capacity": 0.0}, r"capacity=0\.0 must be positive"),
        ({"group": 2.0}, r"group=2\.0 must be a positive int"),
        ({"balance": -1.0}, r"balance=-1\.0 must not be negative"),
    ],
)
def test_impossible_experts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        models.Experts(**({"count": 8, "top_k": 2} | change))


def test_experts_with_biases_are_refused():
    with pytest.raises(ValueError, match=r"use_bias=True and experts=Experts\("):
        replace(models.get("mixtral-tiny"), use_bias=True)


def test_unknown_name_gets_the_closest_one_and_the_list():
    with pytest.raises(KeyError, match="Did you mean 'llama3-8b'") as caught:
        models.get("Llama-3-8B")
    assert all(name in str(caught.value) for name in models.names())


def test_presets_are_filed_under_their_own_names():
    assert all(name == config.name for name, config in models.PRESETS.items())
