"""A decoder-only language model for one device: GPT, Llama 3 and Mixtral shapes.

Nothing here knows of a mesh. What a planner may use beyond the program itself are the
logical axis names on the parameters: ``embed heads kv_heads head_dim mlp vocab``,
``layers`` on the leading dim of stacked blocks, ``expert`` on what each expert of a
mixture has of its own, ``qkv`` on the rows of the attention
bias, and ``position`` on the rows of a learned position table.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from autoshard.models.config import DecoderConfig
from autoshard.models.layers import (
    INIT_STD,
    Attention,
    Mlp,
    Norm,
    ParamFactory,
    Rotation,
    rotation_table,
)
from autoshard.models.mixture import Mixture


class Block(nnx.Module):
    """One pre-norm layer: attention and feed-forward, each added to the residual.

    >>> from autoshard.models.registry import get
    >>> make = ParamFactory(rngs=nnx.Rngs(0), dtype=jnp.float32)
    >>> x, penalty = Block(get("gpt2-tiny"), make)(jnp.ones((2, 5, 64)), None)
    >>> x.shape, penalty
    ((2, 5, 64), None)
    """

    def __init__(self, config: DecoderConfig, make: ParamFactory) -> None:
        self.attention_norm = Norm(config, make)
        self.attention = Attention(config, make)
        self.mlp_norm = Norm(config, make)
        mixed = config.experts is not None
        self.mlp = Mixture(config, make) if mixed else Mlp(config, make)

    def __call__(
        self, x: jax.Array, rotation: Rotation | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Map the residual stream ``x`` ``[b, s, e]`` to its next value.

        Returns:
            That, and the penalty of its router, float32, where it has one.
        """
        x += self.attention(self.attention_norm(x), rotation)
        if isinstance(self.mlp, Mlp):
            return x + self.mlp(self.mlp_norm(x)), None
        y, penalty = self.mlp(self.mlp_norm(x))
        return x + y, penalty


class Decoder(nnx.Module):
    """Token ids in, next-token logits out.

    With ``config.scan_layers`` the blocks are one ``Block`` whose parameters have a
    leading ``layers`` dim, run by a single ``jax.lax.scan`` that carries the residual
    stream; otherwise they are a list of separate blocks.

    Args:
        config: the shape of the model.
        rngs: keys for the initial values (stream ``params``).

    >>> from autoshard.models.registry import get
    >>> model = Decoder(get("llama3-tiny"), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 16), jnp.int32)).shape
    (2, 16, 256)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.param_dtype)
        make = ParamFactory(rngs=rngs, dtype=dtype)
        self.config = config
        self.embedding = make.normal(INIT_STD, vocab=config.vocab, embed=config.embed)
        self.positions = (
            make.normal(INIT_STD, position=config.max_seq, embed=config.embed)
            if config.positions == "learned"
            else None
        )
        stacked = ParamFactory(rngs=rngs, dtype=dtype, layers=config.layers)
        self.blocks: Block | nnx.List[Block] = (
            Block(config, stacked)
            if config.scan_layers
            else nnx.List([Block(config, make) for _ in range(config.layers)])
        )
        self.final_norm = Norm(config, make)
        self.head = (
            None
            if config.tied_head
            else make.normal(INIT_STD, embed=config.embed, vocab=config.vocab)
        )

    def __call__(self, tokens: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Predict the token after each position.

        Args:
            tokens: int32 ``[b, s]`` in ``0 .. vocab - 1``, ``s <= max_seq``. An id
                outside that range gives NaN logits rather than another token's row.

        Returns:
            Logits, float32 ``[b, s, vocab]``; position ``i`` sees tokens ``0 .. i``,
            with experts only as long as none of them drops a token: the first choice of
            a later one has a slot before the second of an earlier one (GShard).
            With experts, also what is to be added to the loss: the penalties of all
            routers, a float32 scalar.

        Raises:
            ValueError: ``tokens`` is not an integer matrix, or is too long.
        """
        config = self.config
        _check_tokens(tokens, config)
        seq = tokens.shape[1]
        dtype = jnp.dtype(config.dtype)
        x = (
            self.embedding[...]
            .at[tokens]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        x = x.astype(dtype)
        rotation = None
        if self.positions is None:
            rotation = rotation_table(
                seq, config.head_dim, config.rope_theta, config.rope_scaling
            )
        else:
            x += self.positions[...][:seq].astype(dtype)[None]
        x, penalties = self._run_blocks(x, rotation)
        x = self.final_norm(x)
        if self.head is None:
            form, head = "bse,ve->bsv", self.embedding
        else:
            form, head = "bse,ev->bsv", self.head
        logits = jnp.einsum(
            form, x, head[...].astype(dtype), preferred_element_type=jnp.float32
        )
        return logits if penalties is None else (logits, jnp.sum(penalties))

    def _run_blocks(
        self, x: jax.Array, rotation: Rotation | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The residual stream after all blocks, and the penalty of each, if any."""
        if not isinstance(self.blocks, Block):
            penalties = []
            for block in self.blocks:
                x, penalty = block(x, rotation)
                penalties.append(penalty)
            return x, jnp.stack(penalties) if self.config.experts else None
        graph, stacked = nnx.split(self.blocks)

        def step(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, jax.Array | None]:
            return nnx.merge(graph, layer)(x, rotation)

        return jax.lax.scan(step, x, stacked)


def build(config: DecoderConfig, rngs: nnx.Rngs | None = None) -> Decoder:
    """Make a decoder with fresh values; seed 0 when no ``rngs`` are given.

    >>> from autoshard.models.registry import get
    >>> build(get("gpt2-tiny")).config.embed
    64
    """
    return Decoder(config, rngs=nnx.Rngs(0) if rngs is None else rngs)


def build_abstract(config: DecoderConfig) -> Decoder:
    """Make a decoder whose parameters are shapes and dtypes only, of any model size.

    >>> from autoshard.models.registry import get
    >>> model = build_abstract(get("llama3-405b"))
    >>> model.blocks.mlp.up.shape
    (126, 16384, 53248)
    """
    return nnx.eval_shape(lambda: build(config))


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the parameters of an unrolled decoder into those of a scanned one.

    Args:
        params: ``nnx.to_pure_dict(nnx.state(model))`` of a decoder built with
            ``scan_layers=False``; ``params["blocks"]`` maps layer numbers to trees.

    Returns:
        The same tree with ``blocks`` replaced by one tree of arrays with a leading
        ``layers`` dim.

    Raises:
        ValueError: ``params`` has no numbered blocks.

    >>> from dataclasses import replace
    >>> from autoshard.models.registry import get
    >>> flat = build(replace(get("gpt2-tiny"), scan_layers=False))
    >>> params = stack_layers(nnx.to_pure_dict(nnx.state(flat)))
    >>> params["blocks"]["mlp"]["up"].shape
    (4, 64, 256)
    """
    blocks = params.get("blocks")
    if not isinstance(blocks, Mapping) or set(blocks) != set(range(len(blocks))):
        found = sorted(map(str, blocks)) if isinstance(blocks, Mapping) else blocks
        raise ValueError(
            f"stack_layers: params['blocks'] must map 0 .. layers - 1 to one tree per "
            f"layer, got {found!r}; pass the parameters of a decoder built with "
            "scan_layers=False (a scanned one is stacked already)"
        )
    trees = [blocks[layer] for layer in range(len(blocks))]
    return {**params, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *trees)}


def _check_tokens(tokens: jax.Array, config: DecoderConfig) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"Decoder {config.name!r}: tokens are {tokens.dtype}{list(tokens.shape)}; "
            "pass integer ids of shape [batch, seq]"
        )
    if tokens.shape[1] > config.max_seq:
        raise ValueError(
            f"Decoder {config.name!r}: sequences of {tokens.shape[1]} tokens exceed "
            f"max_seq={config.max_seq}; shorten them, or build the model from "
            f"dataclasses.replace(config, max_seq={tokens.shape[1]})"
        )
