"""Small programs with known layouts, and the collectives of a sharded program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from autoshard.cost.moves import steps_of, unique_moves
from autoshard.ir.annotate import annotate
from autoshard.ir.trace import trace
from autoshard.ir.train_step import train_step
from autoshard.plan.sharded import OUTPUT, Layout
from autoshard.propagate import find_classes, propagate

BATCH, SEQ, EMBED, MLP, HEADS, WIDTH, LAYERS = 8, 16, 32, 64, 4, 8, 3


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


ACTIVATIONS = shape(BATCH, SEQ, EMBED)
MLP_WEIGHTS = {"up": shape(EMBED, MLP), "down": shape(MLP, EMBED)}
ATTENTION_WEIGHTS = {
    **{name: shape(EMBED, HEADS, WIDTH) for name in ("q", "k", "v")},
    "out": shape(HEADS, WIDTH, EMBED),
}


def residual(x):
    return annotate(x, "batch", "seq", "embed")


def mlp(weights, x):
    x = residual(x)
    hidden = annotate(jnp.tanh(x @ weights["up"]), "batch", "seq", "mlp")
    return residual(x + hidden @ weights["down"])


def attention(weights, x):
    x = residual(x)
    q, k, v = (
        annotate(
            jnp.einsum("bse,ehd->bshd", x, weights[n]), "batch", None, "heads", None
        )
        for n in ("q", "k", "v")
    )
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
    return residual(x + jnp.einsum("bshd,hde->bse", mixed, weights["out"]))


def mlp_step(optimizer=None):
    """A train step of the MLP above, of one layer."""
    return train_step(
        lambda weights, x: (mlp(weights, x) ** 2).mean(),
        optimizer or optax.adam(1e-3),
        model=lambda key: jax.tree.map(
            lambda s: jax.random.normal(key, s.shape), MLP_WEIGHTS
        ),
    )


def stacked_step():
    """The same with the layers in a scan, their weights stacked."""

    def loss(weights, x):
        x, _ = jax.lax.scan(lambda x, w: (mlp(w, x), None), x, weights)
        return (x**2).mean()

    return train_step(
        loss,
        optax.adam(1e-3),
        model=lambda key: jax.tree.map(
            lambda s: jax.random.normal(key, (LAYERS, *s.shape)), MLP_WEIGHTS
        ),
    )


def shard(fn, args, rules, **storage):
    """Propagates `{logical: axes}` and the given storage."""
    traced = trace(fn, args)
    layout = Layout(rules=tuple(rules.items()), **storage)
    return propagate(traced, find_classes(traced), layout)


def collectives(sharded):
    """`(kind, axes, where)` of every move, `where` an address and a slot."""
    ops = sharded.traced.program.ops
    return sorted(
        (
            step.kind,
            "+".join(step.axes),
            f"{ops[move.op].address if move.op != OUTPUT else 'output'} {move.slot}",
        )
        for move in unique_moves(sharded)
        for step in steps_of(move)
    )


def specs(sharded):
    """Storage spec per input path."""
    return {
        info.path: sharded.specs[value]
        for info, value in zip(
            sharded.traced.inputs, sharded.traced.program.inputs, strict=True
        )
    }
