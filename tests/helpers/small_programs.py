"""Small random programs, strategies and clusters, for search against brute force."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autoshard as ash
from autoshard import models
from autoshard.ir.train_step import TrainStep, train_step
from autoshard.models import mixture
from autoshard.plan.cluster import Cluster, cluster
from autoshard.plan.strategy import Rule, Schedule, Storage, Strategy

_DIMS = (2, 3, 4, 6, 8, 8, 12, 16, 16, 32, 64)
_CLUSTERS = (
    *(f"cpu:{n}" for n in (1, 2, 3, 4, 5, 6, 8, 12, 16)),
    *("h100:1", "h100:2", "h100:4", "h100:6", "h100:8", "h100:16"),
    *("v5e:1", "v5e:2x2", "v5e:2x4", "v5e:4x4"),
)


@dataclasses.dataclass(frozen=True)
class Instance:
    """A program, where it runs and what is left open."""

    step: TrainStep
    batch: jax.ShapeDtypeStruct
    cluster: Cluster
    strategy: Strategy
    about: str


def instance(seed: int) -> Instance:
    """The same instance for the same seed."""
    rng = np.random.default_rng(seed)
    step, batch, ops = _program(rng)
    chips = str(rng.choice(_CLUSTERS))
    strategy = _strategy(rng, cluster(chips).num_chips, batch.shape[0])
    about = f"seed {seed}: {ops} on {batch.shape}, {chips}, {strategy!r}"
    return Instance(step, batch, cluster(chips), strategy, about)


def with_made_weights(seed: int) -> Instance:
    """The same, but weights are scaled or rounded before they are used.

    What is used is then no state, but made of it, whatever it is gathered from.
    """
    rng = np.random.default_rng(seed)
    step, batch, ops = _program(rng, np.random.default_rng([seed, 9]))
    chips = str(rng.choice(_CLUSTERS))
    strategy = _strategy(rng, cluster(chips).num_chips, batch.shape[0])
    about = f"seed {seed}: {ops}, made weights, on {batch.shape}, {chips}, {strategy!r}"
    return Instance(step, batch, cluster(chips), strategy, about)


def with_experts(seed: int) -> Instance:
    """An instance whose blocks have experts; the same for the same seed."""
    rng = np.random.default_rng([seed, 7])
    step, batch, about = _mixture(rng)
    # Of more chips the spaces are too large to be priced one by one.
    chips = str(rng.choice(["cpu:2", "cpu:4", "cpu:6", "cpu:8", "h100:8", "v5e:2x4"]))
    there = cluster(chips)
    strategy = _strategy(rng, there.num_chips, batch.shape[0])
    strategy = _for_experts(rng, strategy)
    about = f"seed {seed}: {about} on {batch.shape}, {chips}, {strategy!r}"
    return Instance(step, batch, there, strategy, about)


def _mixture(rng: Any) -> tuple[TrainStep, jax.ShapeDtypeStruct, str]:
    """Blocks of one or two products and experts, with a penalty or without."""
    repeats, width = int(rng.choice([1, 2])), int(rng.choice([4, 8]))
    size, count = int(rng.choice([4, 8, 12])), int(rng.choice([2, 4, 6, 8]))
    shape = (int(rng.choice([4, 8, 16])), int(rng.choice([4, 8])), width)
    how = models.Experts(
        count=count, top_k=int(rng.choice([1, 2])), balance=float(rng.choice([0, 0.1]))
    )
    dense, scanned = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    like = {
        "router": (width, count),
        "up": (count, width, size),
        "down": (count, size, width),
    } | ({"in": (width, size), "out": (size, width)} if dense else {})

    def params(key: Any) -> Any:
        block = {k: jax.random.normal(key, leaf) for k, leaf in like.items()}
        if scanned:
            return jax.tree.map(lambda x: jnp.stack([x] * repeats), block)
        return [block] * repeats

    def apply(x: Any, block: Any) -> tuple[Any, Any]:
        if dense:
            h = ash.annotate(jnp.tanh(x @ block["in"]), "batch", None, "heads")
            x = x + h @ block["out"]
        gates = jax.nn.softmax(x @ block["router"], axis=-1)
        combine, penalty = mixture.route(gates[:, None], how)
        combine = combine[:, 0]
        up = ash.annotate(block["up"], "expert", None, "mlp")
        sent = jnp.einsum("bsxc,bse->xbce", (combine > 0).astype(x.dtype), x)
        h = jnp.tanh(jnp.einsum("xbce,xem->xbcm", sent, up))
        y = jnp.einsum("xbcm,xme->xbce", h, block["down"])
        return x + jnp.einsum("bsxc,xbce->bse", combine, y), penalty

    def loss(blocks: Any, x: Any) -> Any:
        total = jnp.zeros(())
        if scanned:
            x, penalties = jax.lax.scan(apply, x, blocks)
            total += penalties.sum()
        else:
            for block in blocks:
                x, penalty = apply(x, block)
                total += penalty
        return (x**2).mean() + total

    optimizer = optax.adam(1e-3) if rng.random() < 0.5 else optax.sgd(0.1)
    batch = jax.ShapeDtypeStruct(shape, jnp.float32)
    about = f"{repeats} x {like}, {how}, scanned {scanned}"
    return train_step(loss, optimizer, model=params), batch, about


def _for_experts(rng: Any, strategy: Strategy) -> Strategy:
    """A strategy that has the axis of experts, more often than not as a hole."""
    size = "auto" if rng.random() < 0.8 else 2
    rule = Rule(logical="expert", axes="auto" if rng.random() < 0.8 else ("expert",))
    kept = [r for r in strategy.rules if r.logical not in ("seq", "seq.residual")]
    at = int(rng.integers(0, len(kept) + 1))
    return strategy.model_copy(
        update={
            "mesh": {**strategy.mesh, "expert": size},
            "rules": (*kept[:at], rule, *kept[at:]),
        }
    )


def _made(form: str, w: Any) -> Any:
    if form == "scaled":
        return 0.5 * w
    return w.astype(jnp.bfloat16).astype(w.dtype) if form == "rounded" else w


def _program(
    rng: Any, forms: Any = None
) -> tuple[TrainStep, jax.ShapeDtypeStruct, list[str]]:
    """Up to 12 ops: the ops of a block, once or several times, and a mean.

    Args:
        rng: What draws them.
        forms: What draws how weights are made of parameters; they are these without.
    """
    repeats = int(rng.choice([1, 1, 2, 3]))
    width = int(rng.choice(_DIMS))
    shape = [int(rng.choice([1, 4, 6, 8, 8, 16, 16])), width]
    if rng.random() < 0.4:
        shape.insert(1, int(rng.choice([2, 4, 6, 8])))
    kinds = ["product", "pair", "pointwise", "scale", "softmax", "double", "norm"]
    count = int(rng.integers(1, 1 + 11 // repeats))
    ops = [str(k) for k in rng.choice(kinds, count, p=[0.1, 0.4, *[0.1] * 5])]
    hidden = [int(rng.choice(_DIMS)) for _ in ops]
    named = [str(n) for n in rng.choice(["", "mlp", "heads", "vocab"], count)]

    how = ["plain"] * count
    if forms is not None:
        how = [
            str(form) for form in forms.choice(["plain", "scaled", "rounded"], count)
        ]

    def params(key: Any) -> Any:
        block = {}
        for k, (op, size) in enumerate(zip(ops, hidden, strict=True)):
            shapes = {
                "product": [(width, width)],
                "pair": [(width, size), (size, width)],
                "scale": [(width,)],
            }.get(op, [])
            for j, leaf in enumerate(shapes):
                block[f"{op}{k}_{j}"] = jax.random.normal(key, leaf)
        return {"blocks": [block] * repeats, "last": jax.random.normal(key, (width,))}

    def apply(block: Any, x: Any) -> Any:
        for k, (op, name) in enumerate(zip(ops, named, strict=True)):
            if op == "product":
                x = x @ _made(how[k], block[f"{op}{k}_0"])
            elif op == "pair":
                h = jnp.tanh(x @ _made(how[k], block[f"{op}{k}_0"]))
                if name:
                    h = ash.annotate(h, "batch", *[None] * (h.ndim - 2), name)
                x = x + h @ _made(how[k], block[f"{op}{k}_1"])
            elif op == "scale":
                x = x * block[f"{op}{k}_0"]
            elif op == "softmax":
                x = jax.nn.softmax(x, axis=-1)
            elif op == "double":
                x = x + x
            elif op == "norm":
                x = x - x.mean(axis=-1, keepdims=True)
            else:
                x = jnp.tanh(x)
        return x

    def loss(params: Any, x: Any) -> Any:
        for block in params["blocks"]:
            x = apply(block, x)
        return ((x * params["last"]) ** 2).mean()

    optimizer = optax.adam(1e-3) if rng.random() < 0.5 else optax.sgd(0.1)
    batch = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return train_step(loss, optimizer, model=params), batch, ops * repeats


def _strategy(rng: Any, chips: int, batch: int) -> Strategy:
    """Random axes, rules and storage, each a hole more often than not."""

    def hole(share: float = 0.7) -> bool:
        return bool(rng.random() < share)

    axes = [a for a in ("data", "fsdp", "context", "tensor") if hole(0.6)] or ["data"]
    divisors = [d for d in range(1, chips + 1) if chips % d == 0]
    mesh: dict[str, Any] = dict.fromkeys(axes, "auto")
    if len(axes) > 1 and hole(0.3):
        mesh[str(rng.choice(axes))] = int(rng.choice(divisors))
    rules: list[Rule] = [Rule(logical="batch", axes="auto")]
    names = ("seq", "heads", "kv_heads", "mlp", "vocab", "seq.residual")
    for name in [n for n in names if hole(0.5)]:
        fixed = ("tensor",) if "tensor" in axes and hole(0.5) else ()
        rules.append(Rule(logical=name, axes="auto" if hole() else fixed))
    storage = {}
    for state in ("params", "gradients", "optimizer"):
        fixed = tuple(a for a in ("fsdp", "context", "data") if a in axes and hole(0.5))
        storage[state] = "auto" if hole(0.6) else fixed
    divides = [d for d in range(1, batch + 1) if batch % d == 0]
    return Strategy(
        name="random",
        about="",
        mesh=mesh,
        rules=tuple(rules),
        storage=Storage(**storage),
        schedule=Schedule(
            microbatches="auto" if hole() else int(rng.choice(divides)),
            remat="auto" if hole(0.8) else "none",
        ),
    )
