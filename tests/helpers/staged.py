"""Spaces with pipeline stages written out, and scanned programs to cut into them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autoshard.cost.pipeline import Pipeline
from autoshard.ir.mesh import AXES
from autoshard.ir.train_step import TrainStep, train_step
from autoshard.plan.cluster import Cluster, cluster
from autoshard.plan.strategy import Strategy
from autoshard.search.divisible import divisible
from helpers.spaces import OneByOne, of_mesh, peak_bytes, rows_of, written_out


def scanned_mlp(
    blocks: int, width: int = 16, hidden: int = 32, vocab: int = 0
) -> TrainStep:
    """A loop over residual MLPs; with a vocabulary, between two tables."""

    def loss(params: Any, x: Any) -> Any:
        if vocab:
            x = jnp.tanh(x @ params["first"])

        def block(x: Any, w: Any) -> Any:
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        x, _ = jax.lax.scan(block, x, params["blocks"])
        if vocab:
            return jax.nn.logsumexp(x @ params["last"], axis=-1).mean()
        return (x**2).mean()

    def model(key: Any) -> Any:
        made = {
            "blocks": {
                "up": jnp.ones((blocks, width, hidden)),
                "down": jnp.ones((blocks, hidden, width)),
            }
        }
        if vocab:
            made |= {
                "first": jnp.ones((width, width)),
                "last": jnp.ones((width, vocab)),
            }
        return made

    return train_step(loss, optax.adamw(1e-3), model=model)


@dataclasses.dataclass(frozen=True)
class Instance:
    """A program that can be cut, where it runs and what is left open."""

    step: TrainStep
    blocks: int
    batch: jax.ShapeDtypeStruct
    cluster: Cluster
    strategy: Strategy


def instance(seed: int) -> Instance:
    """The same instance for the same seed."""
    rng = np.random.default_rng([seed, 17])
    blocks = int(rng.choice([2, 3, 4, 5, 6, 8]))
    vocab = int(rng.choice([0, 16, 256, 2048]))
    step = scanned_mlp(blocks, int(rng.choice([8, 16, 64])), 32, vocab)
    width = jax.tree.leaves(jax.eval_shape(step.model, 0))[0].shape[-1]
    batch = jax.ShapeDtypeStruct((int(rng.choice([4, 8, 16])), width), jnp.float32)
    chips = str(rng.choice(["cpu:4", "h100:8", "h100:16", "v5e:2x4", "h100:6"]))
    axes = ["stage", *rng.choice(["data", "fsdp"], int(rng.integers(1, 3)), False)]
    schedule = {
        "pipeline": str(rng.choice(["auto", "auto", "1f1b", "gpipe", "zb-h1"])),
        "vocab": str(rng.choice(["auto", "ends", "spread"])),
        "remat": str(rng.choice(["auto", "none", "dots", "full"])),
        "microbatches": "auto",
    }
    schedule["virtual"] = "auto" if schedule["pipeline"] == "auto" else 1
    storage = {"optimizer": "auto"} if rng.random() < 0.5 else {}
    if "fsdp" in axes and rng.random() < 0.5:
        storage["params"] = ("fsdp",)
    strategy = of_mesh(*axes, storage=storage, **schedule)
    return Instance(step, blocks, batch, cluster(chips), strategy)


def turns(strategy: Strategy) -> list[Pipeline]:
    """Every way in which stages may take turns."""
    schedule = strategy.schedule
    found = []
    for name in ("gpipe", "1f1b", "zb-h1", "zb-h2", "interleaved"):
        if schedule.pipeline != name and (
            schedule.pipeline != "auto" or name == "gpipe"
        ):
            continue
        for virtual in (2, 4) if name == "interleaved" else (1,):
            for vocab in ("ends", "spread"):
                if schedule.vocab in ("auto", vocab) and schedule.virtual in (
                    "auto",
                    virtual,
                ):
                    found.append(Pipeline(name, virtual, vocab))
    return found


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate, how its stages take turns, and its price."""

    strategy: Strategy
    turn: Pipeline | None
    step_s: float
    peak_bytes: float


def one_by_one(given: Instance) -> list[Found]:
    """All candidates that divide and can be cut, each priced by itself."""
    brute = OneByOne(given.step, given.batch, given.strategy)
    found = []
    wished = given.strategy.schedule.pipeline not in ("auto", "none")
    for one in written_out(
        given.strategy, given.cluster, brute.batch, tuple(brute.sketches)
    ):
        stages, cuts = one.mesh.get("stage", 1), one.schedule.microbatches
        offload = one.schedule.offload
        assert offload != "auto"
        assert isinstance(stages, int)
        assert isinstance(cuts, int)
        row = np.array([[one.mesh.get(a, 1) for a in AXES]], dtype=np.int64)
        count = np.array([cuts], dtype=np.int64)
        assert one.order != "auto"
        more = {"orders": rows_of(one.order), "offload": offload}
        if stages > given.blocks or not brute.has_all(one):
            continue
        if not divisible(brute.pricer(one), row, count, brute.batch)[0]:
            continue
        pricer = brute.pricer(one, sizes=True)
        if stages == 1:
            price = pricer.price(given.cluster, row, count.astype(float), **more)
            peak = peak_bytes(price, given.cluster)
            found.append(Found(one, None, float(price.step_s[0]), peak))
            continue
        for turn in turns(given.strategy):
            if turn.virtual * stages > given.blocks:
                continue
            if turn.virtual > 1 and cuts % stages:
                continue
            (price,) = pricer.price_stages(
                given.cluster, row, count.astype(float), [turn], **more
            )
            assert price.cut is not None
            blocks = price.cut.blocks_of(0, given.blocks, stages)
            if min(blocks) < 1:  # fewer blocks than parts
                continue
            peak = peak_bytes(price, given.cluster)
            found.append(Found(one, turn, float(price.step_s[0]), peak))
    several = [f for f in found if f.turn is not None]
    return several if wished and several else found
