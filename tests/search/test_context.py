"""Searching kinds of attention, against every candidate priced by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.equality import abstract_batch, make_step
from helpers.spaces import OneByOne, fitting, floats, mlp_step, of_mesh, small_memory

import autoshard as ash
from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy, plan_from_json, plan_to_json
from autoshard.search.pinning import with_pins
from autoshard.search.solver import Solver

CI, ALL = (0, 1, 2, 3, 5, 6), range(60)


def attention_step(seq, heads, width, embed=16):
    """A step of one attention over annotated sequences."""

    def loss(params, x):
        x = ash.annotate(x, "batch", "seq", "embed")
        q, k, v = (
            ash.annotate(
                jnp.einsum("bse,ehd->bshd", x, params[n]), "batch", None, "heads", None
            )
            for n in ("q", "k", "v")
        )
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
        return (jnp.einsum("bshd,hde->bse", mixed, params["o"]) ** 2).mean()

    def model(key):
        made = {n: jnp.ones((embed, heads, width)) for n in ("q", "k", "v")}
        return {**made, "o": jnp.ones((heads, width, embed))}

    return ash.train_step(loss, optax.adamw(1e-3), model=model), embed


def instance(seed):
    rng = np.random.default_rng([seed, 23])
    seq = int(rng.choice([8, 64, 1024, 8192]))
    step, embed = attention_step(seq, int(rng.choice([1, 2, 4, 8])), 8)
    batch = floats(int(rng.choice([1, 2, 8])), seq, embed)
    chips = cluster(str(rng.choice(["cpu:4", "h100:8", "h100:16", "v5e:2x4"])))
    axes = ["context", *rng.choice(["data", "fsdp", "tensor"], 2, False)]
    strategy = of_mesh(
        *axes,
        rules={"batch": "auto", "seq": "auto", "heads": "auto"},
        storage={"optimizer": "auto"} if rng.random() < 0.5 else {},
        microbatches="auto" if rng.random() < 0.5 else 1,
        context_kind=str(rng.choice(["auto", "auto", "all_gather"])),
    )
    return step, batch, chips, strategy


def check_exact(seed):
    step, batch, chips, strategy = instance(seed)
    priced = OneByOne(step, batch, strategy).price(chips)
    assert priced
    peaks = sorted(p.peak_bytes for p in priced)
    limit = float(np.random.default_rng([seed, 3]).choice([*peaks, peaks[-1]]))
    chips = small_memory(chips, limit * 1.0001 / MEMORY_HEADROOM)
    fits = fitting(priced, chips)
    solver = Solver(step, (batch,), chips, strategy)
    for best in (1, 3, None):
        explored = solver.explored(best)
        least = min(p.step_s for p in fits)
        assert explored.ranked[0][0] == pytest.approx(least, rel=1e-9)
        assert explored.lower_bound_s == explored.ranked[0][0]
    mine = np.array([entry[0] for entry in explored.ranked])
    for one in fits:
        assert np.isclose(mine, one.step_s, rtol=1e-9).any(), one.strategy


@pytest.mark.parametrize("seed", CI)
def test_search_with_kinds_of_attention_is_exact(seed):
    check_exact(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", sorted({*ALL} - {*CI}))
def test_search_with_kinds_of_attention_is_exact_at_length(seed):
    check_exact(seed)


STEP, BATCH = make_step("llama3-tiny", scan=True), abstract_batch()
CHIPS = cluster("h100:16")


def pinned(name="fsdp-tp-cp", step=STEP, batch=BATCH, **pins):
    pins = {"remat": "none", "microbatches": 1, **pins}
    return Solver(step, (batch,), CHIPS, with_pins(load_strategy(name), pins))


@pytest.mark.parametrize("kind", ["ring", "ulysses", "usp"])
def test_a_kind_is_written_down_and_refused(kind):
    [plan] = pinned(context=4, tensor=2, context_kind=kind).plans()
    schedule = plan.strategy.schedule
    assert schedule.context_kind == kind
    assert schedule.context_heads == (2 if kind == "usp" else 0)  # 2 x 2
    assert plan.not_executable == (f"context_kind {kind}",)
    assert f"attention by {kind}" in str(plan)
    parts = plan.predicted
    whole = parts.matmul_s + parts.memory_bound_s + parts.collective_s
    assert whole == pytest.approx(parts.step_s)
    assert plan_from_json(plan_to_json(plan)) == plan
    sent = {c.kind for c in parts.collectives if c.axes == ("context",)}
    assert (
        sent
        >= {
            "ring": {"permute"},
            "ulysses": {"all_to_all"},
            "usp": {"permute", "all_to_all"},
        }[kind]
    )
    with pytest.raises(InputError, match=rf"context_kind {kind}.*--executable"):
        ash.parallelize(STEP, plan)


def test_only_gathers_can_be_run():
    only = ash.search(
        STEP, BATCH, cluster=CHIPS, pins={"context": 4, "remat": "none"},
        executable=True,
    )  # fmt: skip
    assert only.strategy.schedule.context_kind == "all_gather"
    with pytest.raises(InputError, match=r"context_kind = 'ring'.*cannot be run yet"):
        ash.search(
            STEP, BATCH, cluster=CHIPS, pins={"context_kind": "ring"}, executable=True
        )


@pytest.mark.parametrize(
    ("pins", "kind", "said"),
    [
        ({"context": 1, "context_kind": "ring"}, InputError, "context = 1"),
        (
            {"context": 2, "context_kind": "ring", "rules.seq": "none"},
            InputError,
            r"context_kind = 'ring'.*over a sequence.*none was found.*seq",
        ),
        (
            {"context": 16, "context_kind": "ulysses"},
            InfeasibleError,
            r"the 8 heads of attention are not divisible by 16",
        ),
    ],
)
def test_kinds_that_cannot_be(pins, kind, said):
    with pytest.raises(kind, match=said):
        pinned(**pins).plans()


def test_a_program_without_attention_has_gathers_alone():
    step, batch = mlp_step(), floats(32, 32)
    found = Solver(step, (batch,), CHIPS, load_strategy("auto"))
    kinds = {g.context_kind for g in found.explored(1).groups}
    assert kinds == {"all_gather"}


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        ({"context_kind": "ring", "context_heads": 2}, "only 'usp'"),
        ({"context_kind": "usp", "context_heads": 1}, "is a ring"),
        ({"context_kind": "star"}, "context_kind = 'star' cannot be set"),
    ],
)
def test_fields_must_go_together(pins, said):
    with pytest.raises(InputError, match=said):
        with_pins(load_strategy("fsdp-tp-cp"), pins)
