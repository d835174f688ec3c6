"""The parts of a decoder block, as Flax NNX modules for one device.

Shape letters: b batch, s query position, t key position, e embed, h heads,
k kv_heads, g query heads per key head, d head_dim, m mlp, v vocab; of a mixture of
experts x expert, n group of a sequence, c slot of an expert.

Weights keep one dim per meaning (a query kernel is ``[embed, heads, head_dim]``), and
every parameter carries those meanings as logical axis names in its ``out_sharding``
metadata. Parameters are cast to the compute type where they are used, so the cast
belongs to the block and a gather of a parameter moves the narrower type.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from autoshard.models.config import DecoderConfig, RopeScaling

Rotation = tuple[jax.Array, jax.Array]
"""Cosine and sine of the rotary angles, each float32 ``[1, s, 1, head_dim / 2]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamFactory:
    """Makes annotated parameters; keyword order gives both shape and logical axes.

    Attributes:
        rngs: source of keys; each call draws one from the ``params`` stream.
        dtype: type of the values.
        layers: when given, each parameter gets a leading ``layers`` dim of this size
            and holds one independent draw per layer.

    >>> make = ParamFactory(rngs=nnx.Rngs(0), dtype=jnp.float32, layers=3)
    >>> kernel = make.normal(0.02, embed=4, mlp=8)
    >>> kernel.shape, kernel.get_metadata("out_sharding")
    ((3, 4, 8), ('layers', 'embed', 'mlp'))
    """

    rngs: nnx.Rngs
    dtype: jnp.dtype
    layers: int | None = None

    def normal(self, std: float, **dims: int) -> nnx.Param:
        """Normal values of standard deviation ``std``, whatever the fan-in."""
        shape = self._shape(dims)
        return self._param(
            jax.random.normal(self.rngs.params(), shape, self.dtype) * std, dims
        )

    def ones(self, **dims: int) -> nnx.Param:
        """Ones."""
        return self._param(jnp.ones(self._shape(dims), self.dtype), dims)

    def zeros(self, **dims: int) -> nnx.Param:
        """Zeros."""
        return self._param(jnp.zeros(self._shape(dims), self.dtype), dims)

    def _shape(self, dims: dict[str, int]) -> tuple[int, ...]:
        stack = () if self.layers is None else (self.layers,)
        return stack + tuple(dims.values())

    def _param(self, value: jax.Array, dims: dict[str, int]) -> nnx.Param:
        stack = () if self.layers is None else ("layers",)
        # The names are logical, not mesh axes: without this Flax would try to place
        # the value by them at once, and fail where there is no mesh.
        with nnx.use_eager_sharding(False):
            return nnx.Param(value, out_sharding=stack + tuple(dims))


class Norm(nnx.Module):
    """RMS or layer normalisation over the last dim, computed in float32.

    >>> from autoshard.models.registry import get
    >>> make = ParamFactory(rngs=nnx.Rngs(0), dtype=jnp.float32)
    >>> x = jnp.full((1, 1, 128), 3.0)
    >>> float(Norm(get("llama3-tiny"), make)(x)[0, 0, 0])
    1.0000
    """

    def __init__(self, config: DecoderConfig, make: ParamFactory) -> None:
        self.centred = config.norm == "layer"
        self.eps = config.norm_eps
        self.scale = make.ones(embed=config.embed)
        biased = self.centred and config.use_bias
        self.bias = make.zeros(embed=config.embed) if biased else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise ``x`` ``[b, s, e]``; the result has its shape and dtype."""
        y = x.astype(jnp.float32)
        if self.centred:
            y -= jnp.mean(y, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(variance + self.eps)
        y *= use(self.scale, jnp.float32)[None, None]
        if self.bias is not None:
            y += use(self.bias, jnp.float32)[None, None]
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped key and value heads.

    Query heads are viewed as ``[kv_heads, group]``, so keys and values are never
    repeated. Scores and softmax are float32.

    >>> from autoshard.models.registry import get
    >>> make = ParamFactory(rngs=nnx.Rngs(0), dtype=jnp.float32)
    >>> Attention(get("gpt2-tiny"), make)(jnp.ones((2, 5, 64)), None).shape
    (2, 5, 64)
    """

    def __init__(self, config: DecoderConfig, make: ParamFactory) -> None:
        e, d = config.embed, config.head_dim
        h, k = config.heads, config.kv_heads
        std = INIT_STD
        self.config = config
        self.q = make.normal(std, embed=e, heads=h, head_dim=d)
        self.k = make.normal(std, embed=e, kv_heads=k, head_dim=d)
        self.v = make.normal(std, embed=e, kv_heads=k, head_dim=d)
        self.o = make.normal(residual_std(config), heads=h, head_dim=d, embed=e)
        bias = make.zeros if config.use_bias else _absent
        # One parameter, as in GPT-2: the rows of a kv head are the biases of its
        # query group, then of its key, then of its value.
        self.qkv_bias = bias(kv_heads=k, qkv=config.group + 2, head_dim=d)
        self.o_bias = bias(embed=e)

    def __call__(self, x: jax.Array, rotation: Rotation | None) -> jax.Array:
        """Attend over ``x`` ``[b, s, e]``; the result has its shape and dtype."""
        config = self.config
        q = _linear("bse,ehd->bshd", x, self.q, None)
        k = _linear("bte,ekd->btkd", x, self.k, None)
        v = _linear("bte,ekd->btkd", x, self.v, None)
        if self.qkv_bias is not None:
            bias = use(self.qkv_bias, x.dtype)
            group = config.group
            q += bias[:, :group].reshape(config.heads, config.head_dim)[None, None]
            k += bias[:, group][None, None]
            v += bias[:, group + 1][None, None]
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        batch, seq = x.shape[:2]
        heads = (batch, seq, config.heads, config.head_dim)
        q = q.reshape(batch, seq, config.kv_heads, config.group, config.head_dim)
        scores = jnp.einsum(
            "bskgd,btkd->bksgt", q, k, preferred_element_type=jnp.float32
        )
        scores = scores * config.head_dim**-0.5 + causal_bias(seq)
        weights = softmax(scores).astype(x.dtype)
        mixed = jnp.einsum("bksgt,btkd->bskgd", weights, v).reshape(heads)
        return _linear("bshd,hde->bse", mixed, self.o, self.o_bias)


class Mlp(nnx.Module):
    """The feed-forward part: gated (SwiGLU) or plain (GELU, tanh form).

    Args:
        config: the shape of the model.
        make: makes its parameters.
        expert: how many of them there are, stacked on a leading ``expert`` dim; each
            maps tokens of its own. By default there is one, without that dim.

    >>> from autoshard.models.registry import get
    >>> make = ParamFactory(rngs=nnx.Rngs(0), dtype=jnp.float32)
    >>> Mlp(get("llama3-tiny"), make)(jnp.ones((2, 5, 128))).shape
    (2, 5, 128)
    """

    def __init__(
        self, config: DecoderConfig, make: ParamFactory, **expert: int
    ) -> None:
        e, m = config.embed, config.mlp
        gated = config.activation == "swiglu"
        std = INIT_STD
        self.gate = make.normal(std, **expert, embed=e, mlp=m) if gated else None
        self.up = make.normal(std, **expert, embed=e, mlp=m)
        self.down = make.normal(residual_std(config), **expert, mlp=m, embed=e)
        bias = make.zeros if config.use_bias else _absent
        self.gate_bias = bias(mlp=m) if gated else None
        self.up_bias = bias(mlp=m)
        self.down_bias = bias(embed=e)
        self.stacked = bool(expert)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``x`` ``[b, s, e]``; the result has its shape and dtype.

        Of several experts ``x`` is ``[x, b, n, c, e]``.
        """
        wide, narrow = _EXPERTS if self.stacked else _DENSE
        hidden = _linear(wide, x, self.up, self.up_bias)
        if self.gate is None:
            hidden = jax.nn.gelu(hidden, approximate=True)
        else:
            gate = _linear(wide, x, self.gate, self.gate_bias)
            hidden *= jax.nn.silu(gate)
        return _linear(narrow, hidden, self.down, self.down_bias)


_DENSE = "bse,em->bsm", "bsm,me->bse"
_EXPERTS = "xbnce,xem->xbncm", "xbncm,xme->xbnce"

INIT_STD = 0.02
"""Standard deviation of fresh weights (Radford et al. 2019; Llama uses the same)."""


def residual_std(config: DecoderConfig) -> float:
    """Standard deviation for maps that add to the residual stream.

    Two of them per layer add up, so each is scaled down by the root of their number
    (Radford et al. 2019, section 2.3).

    >>> from autoshard.models.registry import get
    >>> residual_std(get("gpt3-tiny")) * 8**0.5
    0.0200
    """
    return INIT_STD / math.sqrt(2 * config.layers)


def causal_bias(seq: int) -> jax.Array:
    """What to add to scores so that no position sees a later one.

    A bias of one small matrix, where a choice between scores and a constant would need
    both the mask and the constant at the full size of the scores: neither depends on
    the layer, so differentiating a scan over layers moves them out of it, and there
    they would have to be held in memory. Computed from iotas, so the program itself
    holds no table.

    Returns:
        float32 ``[1, 1, s, 1, t]``: 0 where ``t <= s``, elsewhere the lowest finite
        number (not -inf, which could turn into a NaN on the way back).

    >>> (causal_bias(3)[0, 0, :, 0] == 0).tolist()
    [[True, False, False], [True, True, False], [True, True, True]]
    """
    shape = (1, 1, seq, 1, seq)
    query = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 4)
    return jnp.where(query >= key, np.float32(0), np.finfo(np.float32).min)


def rotation_table(
    seq: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Rotation:
    """Cosines and sines of the rotary angles of positions ``0 .. seq - 1``.

    Feature pair ``i`` turns by ``theta ** (-2 i / head_dim)`` radians per token
    (arXiv:2104.09864, section 3.2.2). Computed from iotas, so that a long context does
    not put a table into the program.

    Returns:
        ``(cos, sin)``, each float32 ``[1, seq, 1, head_dim / 2]``, ready to meet heads.

    >>> cos, sin = rotation_table(3, 4, 10_000.0)
    >>> cos.shape, float(sin[0, 2, 0, 0])
    ((1, 3, 1, 2), 0.909297)
    """
    pair = jnp.arange(head_dim // 2, dtype=jnp.float32)
    freq = jnp.exp(pair * (-2.0 * math.log(theta) / head_dim))
    if scaling is not None:
        # Full turns that a pair makes within the context it was trained on.
        turns = freq * (scaling.original_max_seq / (2.0 * math.pi))
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = (turns - scaling.low_freq_factor) / span
        keep = jnp.minimum(jnp.maximum(keep, 0.0), 1.0)
        freq *= keep + (1.0 - keep) / scaling.factor
    position = jnp.arange(seq, dtype=jnp.float32)
    angle = position[None, :, None, None] * freq[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn the feature pairs of ``x`` ``[b, s, heads, head_dim]`` by their angles.

    Feature ``i`` is paired with ``i + head_dim / 2``, as in the published Llama
    checkpoints on Hugging Face. Computed in float32; shape and dtype are kept.

    >>> x = jnp.ones((1, 2, 1, 2))
    >>> rotate(x, rotation_table(2, 2, 10_000.0))[0, :, 0, 0].tolist()
    [1.0, -0.301169]
    """
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _absent(**_: int) -> None:
    """Stands in for a parameter maker where the config has no such parameter."""


def softmax(scores: jax.Array) -> jax.Array:
    """Softmax over the last dim.

    >>> softmax(jnp.zeros((1, 4)))[0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    # The largest score only guards exp against overflow; it cancels in the gradient.
    top = jnp.max(jax.lax.stop_gradient(scores), axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def use(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """The value of a parameter, cast where it is used."""
    return param[...].astype(dtype)


def _linear(
    form: str, x: jax.Array, kernel: nnx.Param, bias: nnx.Param | None
) -> jax.Array:
    y = jnp.einsum(form, x, use(kernel, x.dtype))
    if bias is not None:
        y += use(bias, x.dtype)[None, None]
    return y
