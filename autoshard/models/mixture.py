"""A mixture of experts for one device, as dense products of constant shapes.

Where a token goes is a mask over experts and their slots, so sending tokens to experts
and back are two einsums (Lepikhin et al. 2020, arXiv:2006.16668, section 2.2, after
Mesh TensorFlow, arXiv:1811.02084). For the letters of shapes see
`autoshard.models.layers`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from autoshard.models.config import DecoderConfig, Experts
from autoshard.models.layers import INIT_STD, Mlp, ParamFactory, softmax, use


class Mixture(nnx.Module):
    """The feed-forward part of a block with experts.

    >>> from autoshard.models.registry import get
    >>> make = ParamFactory(rngs=nnx.Rngs(0), dtype=jnp.float32)
    >>> y, penalty = Mixture(get("mixtral-tiny"), make)(jnp.ones((2, 32, 128)))
    >>> y.shape, penalty.shape
    ((2, 32, 128), ())
    """

    def __init__(self, config: DecoderConfig, make: ParamFactory) -> None:
        assert config.experts is not None
        self.config = config.experts
        self.router = make.normal(
            INIT_STD, embed=config.embed, expert=config.experts.count
        )
        self.experts = Mlp(config, make, expert=config.experts.count)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map ``x`` ``[b, s, e]``.

        Returns:
            A value of its shape and dtype, zero for tokens that no expert had a slot
            for, and the penalty for the router, a float32 scalar.

        Raises:
            ValueError: the sequence is longer than a group and no multiple of it.
        """
        grouped = x.reshape(_groups(x.shape, self.config.group))
        logits = jnp.einsum(
            "bnse,ex->bnsx",
            grouped,
            use(self.router, x.dtype),
            preferred_element_type=jnp.float32,
        )
        combine, penalty = route(softmax(logits), self.config)
        combine = combine.astype(x.dtype)
        dispatch = (combine > 0).astype(x.dtype)
        sent = jnp.einsum("bnsxc,bnse->xbnce", dispatch, grouped)
        y = jnp.einsum("bnsxc,xbnce->bnse", combine, self.experts(sent))
        return y.reshape(x.shape), penalty


def route(gates: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """Where tokens go, and how uneven that is.

    The slots of an expert are given to first choices before second ones, and among
    these by position.

    Args:
        gates: the router's probabilities, float32 ``[b, n, s, x]``.
        experts: how many a token goes to, and their capacity.

    Returns:
        Weights of the experts' results, float32 ``[b, n, s, x, c]``, zero where a
        token has not that slot; and the penalty, ``balance`` where tokens and
        probabilities are spread evenly, and more the less they are.

    >>> gates = jnp.array([[[[0.6, 0.4], [0.9, 0.1]]]])
    >>> weights, _ = route(gates, Experts(count=2, top_k=1, capacity=1.0))
    >>> weights[0, 0, :, 0, 0].tolist()  # one slot each: the second token is dropped
    [1.0, 0.0]
    """
    slots = experts.slots(gates.shape[2])
    _, best = jax.lax.top_k(jax.lax.stop_gradient(gates), experts.top_k)
    chosen = _one_hot(best, experts.count)  # [b, n, s, k, x], k the choices
    weight = jnp.sum(gates[..., None, :] * chosen, axis=-1)
    weight /= jnp.sum(weight, axis=-1, keepdims=True)
    each = jnp.sum(chosen, axis=2, keepdims=True)
    before = jnp.cumsum(chosen, axis=2) - chosen + jnp.cumsum(each, axis=3) - each
    slot = jnp.sum(before * chosen, axis=-1)
    # A slot that there is not is no slot of any expert: the token is dropped.
    place = _one_hot(slot, slots)
    # As a product, so that what is kept for its gradient is not of the mask's size.
    combine = jnp.einsum("bnskx,bnskc->bnsxc", weight[..., None] * chosen, place)
    share = jnp.mean(chosen, axis=(2, 3))
    uneven = jnp.sum(share * jnp.mean(gates, axis=2), axis=-1) * experts.count
    return combine, jnp.mean(uneven) * experts.balance


def _one_hot(index: jax.Array, size: int) -> jax.Array:
    dims = (*index.shape, size)
    place = jax.lax.broadcasted_iota(index.dtype, dims, index.ndim)
    return (index[..., None] == place).astype(jnp.float32)


def _groups(shape: tuple[int, ...], group: int) -> tuple[int, ...]:
    batch, seq, embed = shape
    tokens = min(seq, group)
    if seq % tokens:
        raise ValueError(
            f"Mixture: sequences of {seq} tokens do not divide into groups of {group}; "
            f"make them a multiple of {group}, or set Experts(group=...) to a divisor "
            f"of {seq}"
        )
    return batch, seq // tokens, tokens, embed
