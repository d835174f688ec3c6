"""Hugging Face's Flax models, from `transformers` 4.

The models are Linen modules behind `FlaxPreTrainedModel`, without annotations; dropout
is on. A train step is written for them as in Hugging Face's own Flax examples: a loss
of the model's logits, the dropout key beside the data or in the train state.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
import transformers
from flax import linen as nn
from flax.training import train_state

import autoshard as ash
from clients.common import (
    KEY,
    Case,
    abstract_key,
    cross_entropy,
    default_optimizer,
    of_function,
    of_train_step,
    tokens,
)

KEY_BIASES = (r"(key|k_proj)/bias$",)
"""Attention does not change when every key moves by the same vector."""


class TrainState(train_state.TrainState):
    """The state of Hugging Face's Flax examples: Flax's, and a dropout key."""

    dropout_rng: Any


class ImageState(train_state.TrainState):
    """The state of Flax's ImageNet example: Flax's, and the batch statistics."""

    batch_stats: Any


def _model(cls: Any, config: Any, size: str, **more: Any) -> Any:
    wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    dtype = jnp.bfloat16 if size == "full" else wide
    return cls(config, _do_init=False, dtype=dtype, **more)


def _step(
    model: Any,
    loss: Any,
    batch: Any,
    shape: Any,
    size: str,
    optimizer: Any,
    **more: Any,
) -> Case:
    """An `autoshard.train_step` of `loss(params, batch)`."""
    step = ash.train_step(
        loss,
        optimizer or default_optimizer(size),
        model=lambda key: model.init_weights(key, shape),
    )
    return of_train_step(step, {**batch, KEY: abstract_key()}, **more)


def _causal(
    cls: Any, config: Any, seq: int, size: str, optimizer: Any, **more: Any
) -> Case:
    """A decoder that is trained on the next token."""
    model = _model(cls, config, size)

    def loss(params: Any, batch: Any) -> Any:
        logits = model(
            batch["tokens"], params=params, dropout_rng=batch[KEY], train=True
        ).logits
        return cross_entropy(logits, batch["targets"])

    rows = 64 if size == "full" else 8
    batch = tokens(rows, seq, "tokens", "targets")
    high = {"tokens": config.vocab_size, "targets": config.vocab_size}
    return _step(model, loss, batch, (1, seq), size, optimizer, high=high, **more)


def _causal_state(
    cls: Any, config: Any, seq: int, size: str, optimizer: Any, **more: Any
) -> Case:
    """The same, as a plain function of a Flax `TrainState`."""
    model = _model(cls, config, size)
    # OPT's Flax model says deterministic=False where the others say train=True.
    training = (
        {"deterministic": False}
        if cls is transformers.FlaxOPTForCausalLM
        else {"train": True}
    )

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        key, after = jax.random.split(state.dropout_rng)

        def loss_of(params: Any) -> Any:
            logits = state.apply_fn(
                batch["tokens"], params=params, dropout_rng=key, **training
            ).logits
            return cross_entropy(logits, batch["targets"])

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        new = state.apply_gradients(grads=grads, dropout_rng=after)
        return new, {"loss": loss}

    # One object: two transformations are two structures of the state.
    update = optimizer or default_optimizer(size)

    def make(seed: int) -> tuple[TrainState]:
        key, dropout = jax.random.split(jax.random.PRNGKey(seed))
        return (
            TrainState.create(
                apply_fn=model.__call__,
                params=model.init_weights(key, (1, seq)),
                tx=update,
                dropout_rng=dropout,
            ),
        )

    rows = 64 if size == "full" else 8
    batch = tokens(rows, seq, "tokens", "targets")
    high = {"tokens": config.vocab_size, "targets": config.vocab_size}
    return of_function(step, make, batch, high=high, **more)


def gpt2(size: str, optimizer: Any) -> Case:
    """GPT-2 XL (Radford et al. 2019)."""
    config = transformers.GPT2Config(
        **(
            {"n_embd": 1600, "n_layer": 48, "n_head": 25}
            if size == "full"
            else {
                "vocab_size": 512,
                "n_positions": 32,
                "n_embd": 64,
                "n_layer": 2,
                "n_head": 8,
            }
        )
    )
    seq = config.n_positions
    return _causal(transformers.FlaxGPT2LMHeadModel, config, seq, size, optimizer)


def llama(size: str, optimizer: Any) -> Case:
    """Llama 2 7B (Touvron et al. 2023, arXiv:2307.09288); the small one has GQA."""
    config = transformers.LlamaConfig(
        **(
            {
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "max_position_embeddings": 4096,
            }
            if size == "full"
            else _SMALL_LLAMA
        )
    )
    seq = config.max_position_embeddings
    return _causal(transformers.FlaxLlamaForCausalLM, config, seq, size, optimizer)


_SMALL_LLAMA: dict[str, Any] = {
    "attention_dropout": 0.1,  # published as 0, but the models have it
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
}


def mistral(size: str, optimizer: Any) -> Case:
    """Mistral 7B v0.1 (Jiang et al. 2023, arXiv:2310.06825)."""
    # The defaults are Mistral 7B's; sequences of the length of its sliding window.
    config = transformers.MistralConfig(
        # No dropout: the Flax model draws no key for it.
        **(
            {}
            if size == "full"
            else {**_SMALL_LLAMA, "sliding_window": 16, "attention_dropout": 0.0}
        )
    )
    return _causal_state(
        transformers.FlaxMistralForCausalLM,
        config,
        4096 if size == "full" else 32,
        size,
        optimizer,
    )


def gemma(size: str, optimizer: Any) -> Case:
    """Gemma 7B (Gemma Team 2024, arXiv:2403.08295)."""
    config = transformers.GemmaConfig(
        **(
            {}  # the defaults are Gemma 7B's
            if size == "full"
            else {**_SMALL_LLAMA, "head_dim": 16, "num_key_value_heads": 8}
        )
    )
    seq = config.max_position_embeddings
    return _causal(transformers.FlaxGemmaForCausalLM, config, seq, size, optimizer)


def opt(size: str, optimizer: Any) -> Case:
    """OPT 6.7B (Zhang et al. 2022, arXiv:2205.01068)."""
    config = transformers.OPTConfig(
        **(
            {
                "hidden_size": 4096,
                "ffn_dim": 16384,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "word_embed_proj_dim": 4096,
            }
            if size == "full"
            else {
                "vocab_size": 512,
                "hidden_size": 64,
                "ffn_dim": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "word_embed_proj_dim": 32,  # as in OPT 350M: projected in and out
                "max_position_embeddings": 32,
            }
        )
    )
    return _causal_state(
        transformers.FlaxOPTForCausalLM,
        config,
        config.max_position_embeddings,
        size,
        optimizer,
        noise=KEY_BIASES,
    )


def bert(size: str, optimizer: Any) -> Case:
    """BERT large, masked tokens (Devlin et al. 2018, arXiv:1810.04805)."""
    config = transformers.BertConfig(
        **(
            {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
            }
            if size == "full"
            else {
                "vocab_size": 512,
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "intermediate_size": 128,
                "max_position_embeddings": 32,
            }
        )
    )
    model = _model(transformers.FlaxBertForMaskedLM, config, size)

    def loss(params: Any, batch: Any) -> Any:
        logits = model(
            batch["tokens"],
            attention_mask=batch["attention_mask"],
            token_type_ids=batch["token_type_ids"],
            params=params,
            dropout_rng=batch[KEY],
            train=True,
        ).logits
        labels = batch["labels"]
        masked = (labels > 0).astype(jnp.float32)
        per_token = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), labels
        )
        return (per_token * masked).sum() / masked.sum()

    rows, seq = (256, 512) if size == "full" else (8, 32)
    names = ("tokens", "labels", "attention_mask", "token_type_ids")
    high = dict(zip(names, (config.vocab_size, config.vocab_size, 2, 2), strict=True))
    batch = tokens(rows, seq, *names)
    return _step(
        model, loss, batch, (1, seq), size, optimizer, high=high, noise=KEY_BIASES
    )


def _with_a_max(module: ModuleType) -> None:
    """Lets a module that calls `jnp.clip(x, a_max=...)` run on a JAX without `a_max`.

    JAX renamed the argument to `max` and has removed the old name since the last
    release of the Flax models. Only the module's own name for `jax.numpy` changes.
    """
    if isinstance(module.jnp, ModuleType):
        shim = ModuleType("jnp")
        shim.__dict__.update(jnp.__dict__)

        @functools.wraps(jnp.clip)
        def clip(x: Any, *bounds: Any, a_max: Any = None, **more: Any) -> Any:
            if a_max is not None:
                more["max"] = a_max
            return jnp.clip(x, *bounds, **more)

        shim.__dict__["clip"] = clip
        module.jnp = shim


def t5(size: str, optimizer: Any) -> Case:
    """T5 large (Raffel et al. 2019, arXiv:1910.10683)."""
    from transformers.models.t5 import modeling_flax_t5

    _with_a_max(modeling_flax_t5)
    config = transformers.T5Config(
        **(
            {
                "d_model": 1024,
                "d_ff": 4096,
                "num_layers": 24,
                "num_heads": 16,
                "d_kv": 64,
            }
            if size == "full"
            else {
                "vocab_size": 512,
                "d_model": 64,
                "d_ff": 128,
                "num_layers": 2,
                "num_heads": 8,
                "d_kv": 8,
            }
        ),
        decoder_start_token_id=0,
    )
    rows, seq = (128, 512) if size == "full" else (8, 32)
    return _to_sequence(
        transformers.FlaxT5ForConditionalGeneration, config, rows, seq, size, optimizer
    )


def bart(size: str, optimizer: Any) -> Case:
    """BART large (Lewis et al. 2019, arXiv:1910.13461)."""
    config = transformers.BartConfig(
        **(
            {}  # the defaults are BART large's
            if size == "full"
            else {
                "vocab_size": 512,
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 8,
                "decoder_attention_heads": 8,
                "encoder_ffn_dim": 128,
                "decoder_ffn_dim": 128,
                "max_position_embeddings": 32,
            }
        )
    )
    rows, seq = (64, 1024) if size == "full" else (8, 32)
    return _to_sequence(
        transformers.FlaxBartForConditionalGeneration,
        config,
        rows,
        seq,
        size,
        optimizer,
        noise=KEY_BIASES,
    )


def _to_sequence(
    cls: Any,
    config: Any,
    rows: int,
    seq: int,
    size: str,
    optimizer: Any,
    noise: tuple[str, ...] = (),
) -> Case:
    """An encoder and a decoder, the target half as long as the source."""
    model = _model(cls, config, size)

    def loss(params: Any, batch: Any) -> Any:
        logits = model(
            batch["tokens"],
            decoder_input_ids=batch["decoder_tokens"],
            params=params,
            dropout_rng=batch[KEY],
            train=True,
        ).logits
        return cross_entropy(logits, batch["labels"])

    batch = {
        **tokens(rows, seq, "tokens"),
        **tokens(rows, seq // 2, "decoder_tokens", "labels"),
    }
    high = dict.fromkeys(batch, config.vocab_size)
    return _step(model, loss, batch, (1, seq), size, optimizer, high=high, noise=noise)


def vit(size: str, optimizer: Any) -> Case:
    """ViT-L/16 on ImageNet (Dosovitskiy et al. 2020, arXiv:2010.11929)."""
    config = transformers.ViTConfig(
        **(
            {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
                "num_labels": 1000,
            }
            if size == "full"
            else {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "intermediate_size": 128,
                "image_size": 32,
                "patch_size": 8,
                "num_labels": 16,
            }
        ),
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    model = _model(transformers.FlaxViTForImageClassification, config, size)

    def loss(params: Any, batch: Any) -> Any:
        logits = model(
            batch["images"], params=params, dropout_rng=batch[KEY], train=True
        ).logits
        return cross_entropy(logits, batch["labels"])

    rows, side = (512 if size == "full" else 8), config.image_size
    batch = {
        "images": jax.ShapeDtypeStruct((rows, 3, side, side), jnp.float32),
        "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    shape = (1, side, side, 3)
    high = {"labels": config.num_labels}
    return _step(
        model, loss, batch, shape, size, optimizer, high=high, noise=KEY_BIASES
    )


def resnet(size: str, optimizer: Any) -> Case:
    """ResNet-50 on ImageNet (He et al. 2015, arXiv:1512.03385)."""
    config = transformers.ResNetConfig(
        **(
            {"num_labels": 1000}  # the other defaults are ResNet-50's
            if size == "full"
            else {
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [2, 2],
                "num_labels": 16,
            }
        )
    )
    rows, side = (512, 224) if size == "full" else (16, 32)
    model = _model(transformers.FlaxResNetForImageClassification, config, size)
    update = optimizer or default_optimizer(size)

    def step(state: ImageState, batch: Any) -> tuple[ImageState, Any]:
        def loss_of(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            outputs, changed = state.apply_fn(
                batch["images"], params=variables, train=True
            )
            loss = cross_entropy(outputs.logits, batch["labels"])
            return loss, changed["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        new = state.apply_gradients(grads=grads, batch_stats=stats)
        return new, {"loss": loss}

    def make(seed: int) -> tuple[ImageState]:
        variables = nn.meta.unbox(
            model.init_weights(jax.random.PRNGKey(seed), (1, side, side, 3))
        )
        return (
            ImageState.create(
                apply_fn=model.__call__,
                params=variables["params"],
                tx=update,
                batch_stats=variables["batch_stats"],
            ),
        )

    batch = {
        "images": jax.ShapeDtypeStruct((rows, 3, side, side), jnp.float32),
        "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    return of_function(step, make, batch, high={"labels": config.num_labels})


BUILDERS = {
    "hf-bart": bart,
    "hf-bert": bert,
    "hf-gemma": gemma,
    "hf-gpt2": gpt2,
    "hf-llama": llama,
    "hf-mistral": mistral,
    "hf-opt": opt,
    "hf-resnet": resnet,
    "hf-t5": t5,
    "hf-vit": vit,
}
