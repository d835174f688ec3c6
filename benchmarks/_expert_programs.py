"""Decoders as programs, given by the sizes that a published row says of its model.

Most published runs have attention as one kernel. The decoder of the zoo writes scores
out, so here its attention can be a foreign call with a registered rule, as a user's own
kernel would be. Nothing is ever run: the call has no implementation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import autoshard as ash
from autoshard import models
from autoshard.cost.decoder import Decoder
from autoshard.ir.train_step import TrainStep, train_step
from autoshard.models.config import FloatType
from autoshard.models.layers import Attention, Rotation, rotate

DTYPES: dict[str, FloatType] = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
"""Dtypes of published rows that a program can be written in."""

_QUERY, _KEY, _ROWS = "b s k g d", "b t k d", "b s k g"
_GIVEN = f"{_QUERY}, {_KEY}, {_KEY}"
_BACK = f"{_GIVEN}, {_QUERY}, {_ROWS}, {_QUERY}"


def _shaped(name: str, *results: Any) -> Any:
    """A call of a kernel whose results are shaped and typed as some arrays."""
    shapes = tuple(jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results)
    return jax.ffi.ffi_call(name, shapes)


def _run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    sums = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
    return _shaped("fused_attention", q, sums)(q, k, v)


def _run_dq(*given: jax.Array) -> Any:
    return _shaped("fused_attention_dq", given[0])(*given)


def _run_dkv(*given: jax.Array) -> Any:
    return _shaped("fused_attention_dkv", given[1], given[2])(*given)


# Half of the scores are masked and skipped: 2 FLOPs a point for the two products of the
# forward pass, and 5 for the five of the backward pass, which computes scores again.
for _name, _rule, _part in (
    ("", f"{_GIVEN} -> {_QUERY}, {_ROWS}; blocked t d; flops 2", _run),
    ("_dq", f"{_BACK} -> {_QUERY}; blocked t d; flops 2", _run_dq),
    ("_dkv", f"{_BACK} -> {_KEY}, {_KEY}; reduce s g; blocked t d; flops 3", _run_dkv),
):
    ash.register_rule(f"fused_attention{_name}", _rule, call=_part)


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of `[b, s, k, g, d]` over `[b, t, k, d]` as one kernel."""
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    mixed, log_sum = _run(q, k, v)
    return mixed, (q, k, v, mixed, log_sum)


def _backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    [dq] = _run_dq(*kept, gradient)
    return dq, *_run_dkv(*kept, gradient)


attend.defvjp(_forward, _backward)


class Fused(nnx.Module):
    """Attention with the parameters of another, computed by one kernel."""

    def __init__(self, plain: Attention) -> None:
        self.plain = plain

    def __call__(self, x: jax.Array, rotation: Rotation | None) -> jax.Array:
        """Attend over `x` `[b, s, e]`."""
        plain, config = self.plain, self.plain.config

        def projected(form: str, weight: Any) -> jax.Array:
            return jnp.einsum(form, x, weight[...].astype(x.dtype))

        q = projected("bse,ehd->bshd", plain.q)
        k = projected("bte,ekd->btkd", plain.k)
        v = projected("bte,ekd->btkd", plain.v)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        heads = q.shape
        q = q.reshape(*heads[:2], config.kv_heads, config.group, config.head_dim)
        mixed = attend(q, k, v).reshape(heads)
        return jnp.einsum("bshd,hde->bse", mixed, plain.o[...].astype(x.dtype))


def with_masters(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer of parameters in 16 bits that keeps float32 copies in its state."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        masters = wide(params)
        return masters, inner.init(masters)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        masters, kept = state
        changes, kept = inner.update(wide(gradients), kept, masters)
        masters = optax.apply_updates(masters, changes)
        narrow = jax.tree.map(lambda new, p: new.astype(p.dtype) - p, masters, params)
        return narrow, (masters, kept)

    return optax.GradientTransformation(init, update)


def config_of(
    decoder: Decoder, seq: int, dtype: str, masters: bool
) -> models.DecoderConfig:
    """The config of a dense decoder given by its numbers.

    Args:
        decoder: Sizes.
        seq: Positions.
        dtype: A key of `DTYPES`.
        masters: Whether parameters are stored in that dtype too.
    """
    gated = decoder.gated
    return models.DecoderConfig(
        name="published",
        vocab=decoder.vocab,
        layers=decoder.layers,
        embed=decoder.embed,
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        mlp=decoder.mlp,
        max_seq=seq,
        norm="rms" if gated else "layer",
        positions="rope" if gated else "learned",
        activation="swiglu" if gated else "gelu",
        tied_head=decoder.tied,
        dtype=DTYPES[dtype],
        param_dtype=DTYPES[dtype] if masters else "float32",
    )


def program(
    decoder: Decoder, seq: int, batch: int, dtype: str, fused: bool, masters: bool
) -> tuple[TrainStep, dict[str, jax.ShapeDtypeStruct]]:
    """A train step with AdamW, layers in a loop, and its abstract batch.

    Args:
        decoder: Sizes of the model.
        seq: Positions of a sequence.
        batch: Sequences of a step.
        dtype: Of the products.
        fused: Whether attention is one kernel.
        masters: Whether parameters are stored as they are multiplied, with float32
            copies beside the optimizer's moments; else they are float32.
    """
    config = config_of(decoder, seq, dtype, masters)

    def model(rngs: nnx.Rngs) -> models.Decoder:
        built = models.build(config, rngs)
        if fused:
            assert isinstance(built.blocks, models.Block)
            built.blocks.attention = Fused(built.blocks.attention)
        return built

    update = optax.adamw(1e-3)
    update = with_masters(update) if masters else update
    step = train_step(models.next_token_loss, update, model=model)
    leaf = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    return step, {"tokens": leaf, "targets": leaf}
