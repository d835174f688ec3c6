"""Published config files, and what is refused or noted in others."""

import json
from dataclasses import replace

import pytest

from autoshard import models

LLAMA_31_405B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "hidden_size": 16384,
    "initializer_range": 0.02,
    "intermediate_size": 53248,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "vocab_size": 50257,
}


def read(base, **change):
    return models.from_hf_config(base | change)


def without(base, *fields):
    return {key: value for key, value in base.items() if key not in fields}


def test_llama_file_is_the_preset():
    config, notes = read(LLAMA_31_405B)
    assert config == replace(models.get("llama3-405b"), name="llama")
    assert notes == ()


def test_gpt2_file_is_the_preset_and_its_dropout_is_noted():
    config, notes = read(GPT2)
    assert config == replace(models.get("gpt2-124m"), name="gpt2")
    assert [note.split("=")[0] for note in notes] == [
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
    ]
    assert all("dropout is left out" in note for note in notes)


def test_file_and_folder_are_read_alike(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2))
    assert models.from_hf_config(path) == models.from_hf_config(GPT2)
    assert models.from_hf_config(str(tmp_path)) == models.from_hf_config(GPT2)


def test_absent_fields_mean_what_the_format_says():
    bare = without(
        LLAMA_31_405B,
        "num_key_value_heads",
        "rope_theta",
        "rope_scaling",
        "rms_norm_eps",
        "tie_word_embeddings",
        "hidden_act",
    )
    config, _ = models.from_hf_config(bare)
    assert config.kv_heads == 128
    assert config.head_dim == 128
    assert config.rope_theta == 10_000.0
    assert config.rope_scaling is None
    assert config.norm_eps == 1e-6
    assert not config.tied_head


def test_explicit_fields_win_over_derived_ones():
    config, _ = read(LLAMA_31_405B, head_dim=64, tie_word_embeddings=True)
    assert (config.head_dim, config.tied_head) == (64, True)
    config, _ = read(GPT2, n_inner=1000, tie_word_embeddings=False)
    assert (config.mlp, config.tied_head) == (1000, False)
    assert read(GPT2, n_inner=None).config.mlp == 4 * 768


def test_newer_rope_spelling_means_the_same():
    rope = LLAMA_31_405B["rope_scaling"] | {"rope_theta": 500000.0}
    newer = without(LLAMA_31_405B, "rope_scaling", "rope_theta")
    assert read(newer, rope_parameters=rope) == read(LLAMA_31_405B)
    plain = {"rope_theta": 7000.0, "rope_type": "default"}
    config, _ = read(newer, rope_parameters=plain)
    assert (config.rope_theta, config.rope_scaling) == (7000.0, None)


def test_unknown_fields_and_heads_are_noted_not_dropped():
    _, notes = read(
        LLAMA_31_405B, sparkle=3, architectures=["LlamaForSequenceClassification"]
    )
    assert len(notes) == 2
    assert "read as LlamaForCausalLM" in notes[0]
    assert notes[1].startswith("sparkle=3: this field is not known")


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (GPT2, {"model_type": "bert"}, "model_type='bert' is not known.*gpt2, llama"),
        (GPT2, {"n_embd": None}, "field 'n_embd' is missing"),
        (GPT2, {"n_embd": "768"}, "n_embd='768' must be a positive int"),
        (GPT2, {"n_head": 7}, "a width of 768 does not split over 7 heads"),
        (GPT2, {"activation_function": "relu"}, "activation_function='relu'"),
        (GPT2, {"scale_attn_weights": False}, "without scaling"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scaled by layer"),
        (GPT2, {"add_cross_attention": True}, "asks for cross-attention"),
        (LLAMA_31_405B, {"attention_bias": True}, "biases in attention only"),
        (LLAMA_31_405B, {"mlp_bias": True}, "biases in the feed-forward part"),
        (LLAMA_31_405B, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA_31_405B, {"quantization_config": {"bits": 4}}, "quantised weights"),
        (
            LLAMA_31_405B,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope scaling 'linear' with fields .'factor'. is not modelled",
        ),
        (
            LLAMA_31_405B,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "is not modelled; only null and 'llama3' with",
        ),
    ],
)
def test_what_cannot_be_modelled_is_refused(base, change, message):
    with pytest.raises(ValueError, match=message):
        read(base, **change)


def test_model_type_is_required():
    with pytest.raises(ValueError, match="field 'model_type' is missing"):
        models.from_hf_config({})


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not valid JSON"), ("[]", "holds a JSON list")]
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        models.from_hf_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json: cannot be read"):
        models.from_hf_config(tmp_path / "absent.json")
