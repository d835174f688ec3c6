"""Google's Tunix models: Flax NNX, every weight annotated with mesh axes.

The weights name the axes `fsdp` and `tp`, as Tunix's trainer shards them. The loss is
the one of Tunix's supervised fine-tuning: positions and the causal mask are made from
the tokens' padding.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from tunix.models.gemma import model as gemma_model
from tunix.models.gemma3 import model as gemma3_model
from tunix.models.llama3 import model as llama3_model
from tunix.models.qwen2 import model as qwen2_model
from tunix.models.qwen3 import model as qwen3_model
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

import autoshard as ash
from clients.common import (
    Case,
    cross_entropy,
    default_optimizer,
    of_train_step,
    tokens,
)

_SMALL: dict[str, Any] = {
    "num_layers": 2,
    "embed_dim": 64,
    "hidden_dim": 128,
    "num_heads": 8,
    "head_dim": 16,
    "num_kv_heads": 4,
}


def _case(cls: Any, config: Any, vocab: int, size: str, optimizer: Any) -> Case:
    def loss(model: nnx.Module, batch: Any) -> Any:
        real = batch["tokens"] != 0  # 0 is padding
        logits, _ = model(
            batch["tokens"],
            build_positions_from_mask(real),
            None,
            make_causal_attn_mask(real),
        )
        return cross_entropy(logits, batch["targets"])

    step = ash.train_step(
        loss,
        optimizer or default_optimizer(size),
        model=lambda rngs: cls(config, rngs=rngs),
    )
    rows, seq = (64, 4096) if size == "full" else (8, 32)
    batch = tokens(rows, seq, "tokens", "targets")
    return of_train_step(step, batch, high={"tokens": vocab, "targets": vocab})


def llama3(size: str, optimizer: Any) -> Case:
    """Llama 3.1 8B (Llama Team 2024, arXiv:2407.21783)."""
    config = (
        llama3_model.ModelConfig.llama3p1_8b()
        if size == "full"
        else llama3_model.ModelConfig(
            **_SMALL, vocab_size=512, norm_eps=1e-5, rope_theta=10_000
        )
    )
    return _case(llama3_model.Llama3, config, config.vocab_size, size, optimizer)


def qwen2(size: str, optimizer: Any) -> Case:
    """Qwen2.5 7B (Qwen Team 2024, arXiv:2412.15115)."""
    config = (
        qwen2_model.ModelConfig.qwen2p5_7b()
        if size == "full"
        else qwen2_model.ModelConfig(
            **_SMALL,
            vocab_size=512,
            norm_eps=1e-6,
            rope_theta=10_000,
            use_tied_embedding=True,
        )
    )
    return _case(qwen2_model.Qwen2, config, config.vocab_size, size, optimizer)


def qwen3(size: str, optimizer: Any) -> Case:
    """Qwen3 8B (Qwen Team 2025, arXiv:2505.09388), with Tunix's own remat on."""
    remat = qwen3_model.RematConfig.BLOCK
    config = (
        qwen3_model.ModelConfig.qwen3_8b()
        if size == "full"
        else qwen3_model.ModelConfig(
            **_SMALL, vocab_size=512, norm_eps=1e-6, rope_theta=10_000
        )
    )
    config.remat_config = remat
    return _case(qwen3_model.Qwen3, config, config.vocab_size, size, optimizer)


def gemma(size: str, optimizer: Any) -> Case:
    """Gemma 2 2B (Gemma Team 2024, arXiv:2408.00118)."""
    local, everywhere = (
        gemma_model.AttentionType.LOCAL_SLIDING,
        gemma_model.AttentionType.GLOBAL,
    )
    config = (
        gemma_model.ModelConfig.gemma2_2b()
        if size == "full"
        else gemma_model.ModelConfig(
            **_SMALL,
            num_embed=512,
            final_logit_softcap=30.0,
            attn_logits_soft_cap=50.0,
            attention_types=(local, everywhere),
            sliding_window_size=16,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
        )
    )
    return _case(gemma_model.Gemma, config, config.num_embed, size, optimizer)


def gemma3(size: str, optimizer: Any) -> Case:
    """Gemma 3 4B, text only (Gemma Team 2025, arXiv:2503.19786)."""
    config = (
        gemma3_model.ModelConfig.gemma3_4b_pt()
        if size == "full"
        else gemma3_model.ModelConfig(
            # Five local layers to each global one: the smallest with both is six.
            **{**_SMALL, "num_layers": 6},
            num_embed=512,
            sliding_window_size=16,
            global_base_frequency=1_000_000,
            param_dtype=jnp.float32,
        )
    )
    return _case(gemma3_model.Gemma3, config, config.num_embed, size, optimizer)


BUILDERS = {
    "tunix-gemma": gemma,
    "tunix-gemma3": gemma3,
    "tunix-llama3": llama3,
    "tunix-qwen2": qwen2,
    "tunix-qwen3": qwen3,
}
