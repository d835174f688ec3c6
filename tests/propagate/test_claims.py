"""Axes that the batch and experts both want, on a layer small enough to say each move.

Of the four products of a layer with experts the first and the last have the batch in
three arrays and experts in two, the two between experts in three and the batch in two.
So all that has to move is what goes from one kind to the other (Lepikhin et al. 2020,
arXiv:2006.16668, algorithm 1): once there and once back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from propagate.programs import collectives, shape, shard, specs

from autoshard.ir.annotate import annotate
from autoshard.ir.train_step import train_step

EXPERTS, SLOTS, BATCH, SEQ, EMBED, MLP = 4, 3, 8, 6, 16, 32
WEIGHTS = {"up": shape(EXPERTS, EMBED, MLP), "down": shape(EXPERTS, MLP, EMBED)}
TOKENS = {"x": shape(BATCH, SEQ, EMBED), "mask": shape(BATCH, SEQ, EXPERTS, SLOTS)}
BOTH = {"batch": ("data", "expert"), "expert": ("expert",)}


def layer(weights, batch):
    up = annotate(weights["up"], "expert", None, "mlp")
    sent = jnp.einsum("bsxc,bse->bxce", batch["mask"], batch["x"])
    hidden = jnp.tanh(jnp.einsum("bxce,xem->bxcm", sent, up))
    back = jnp.einsum("bxcm,xme->bxce", hidden, weights["down"])
    return jnp.einsum("bsxc,bxce->bse", batch["mask"], back)


def moved(sharded):
    """Kind and axes of every move but slices, each with the form of its product."""
    return [
        (kind, axes, where.split("/")[0].split(" ")[0])
        for kind, axes, where in collectives(sharded)
        if kind != "slice"
    ]


THERE, BACK = "bsxc,bse->bxce", "bxcm,xme->bxce"


@pytest.mark.parametrize("names", [("batch", "expert"), ("expert", "batch")])
def test_tokens_go_to_their_experts_and_back(names):
    rules = {name: BOTH[name] for name in names}  # whichever rule comes first
    sharded = shard(layer, [WEIGHTS, TOKENS], rules)
    assert sorted(moved(sharded)) == sorted(
        [("all_to_all", "expert", THERE), ("all_to_all", "expert", BACK)]
    )
    assert specs(sharded) == {
        "0/up": (("expert",), (), ()),
        "0/down": (("expert",), (), ()),
        "batch/x": (("data", "expert"), (), ()),
        "batch/mask": (("data", "expert"), (), (), ()),
    }


def test_within_experts_the_batch_keeps_its_other_axes():
    sharded = shard(layer, [WEIGHTS, TOKENS], BOTH)
    program = sharded.traced.program
    hidden = [
        sharded.specs[op.outputs[0]]
        for op in program.ops
        if op.primitive == "tanh"  # [b, x, c, m] or, before its transpose, [x, b, ...]
    ]
    (spec,) = hidden
    assert sorted(spec) == [(), (), ("data",), ("expert",)]


def test_gradients_take_the_same_two_ways():
    step = train_step(
        lambda weights, batch: (layer(weights, batch) ** 2).mean(),
        optax.sgd(0.1),
        model=lambda key: jax.tree.map(
            lambda s: jax.random.normal(key, s.shape), WEIGHTS
        ),
    )
    found = moved(shard(step, [step.abstract_state(), TOKENS], BOTH))
    exchanged = [where for kind, _, where in found if kind == "all_to_all"]
    # The mask and the tokens are data: no gradient of theirs sends anything back.
    assert len(exchanged) == 3
    assert {axes for kind, axes, _ in found if kind == "all_to_all"} == {"expert"}
    # Gradients of experts are sums over the batch, which within experts is over `data`
    # only: one sum of each weight. The loss is summed over all, and the norm of the
    # gradients, which a step reports, over the experts of each weight.
    sums = sorted(axes for kind, axes, _ in found if kind == "all_reduce")
    assert sums == ["data", "data", "data+expert", "expert", "expert"]


def test_an_axis_that_nothing_else_wants_needs_no_exchange():
    """Over `tensor` experts are cut, and the partial sums of their results added."""
    rules = {"batch": ("data", "expert"), "expert": ("tensor", "expert")}
    found = moved(shard(layer, [WEIGHTS, TOKENS], rules))
    assert sorted(found) == sorted(
        [
            ("all_to_all", "expert", THERE),
            ("all_to_all", "expert", BACK),
            ("all_reduce", "tensor", "bsxc,bxce->bse"),
        ]
    )


def test_where_only_experts_want_an_axis_tokens_stay_where_they_are():
    rules = {"batch": ("data",), "expert": ("expert",)}
    found = moved(shard(layer, [WEIGHTS, TOKENS], rules))
    assert found == [("all_reduce", "expert", "bsxc,bxce->bse")]


def test_width_and_experts_share_two_axes():
    """Of one axis both want, experts have it: three arrays of a product against two."""
    rules = {"mlp": ("tensor",), "expert": ("tensor", "expert")}
    sharded = shard(layer, [WEIGHTS, TOKENS], rules)
    found = specs(sharded)
    assert found["0/up"] == (("tensor", "expert"), (), ())
    assert moved(sharded) == [("all_reduce", "expert+tensor", "bsxc,bxce->bse")]


def test_the_router_is_gathered_dim_by_dim():
    """Its product is the batch's: over `fsdp` and then over `expert` it is made whole.

    XLA's partitioner writes two gathers, see tests/lower/test_collectives.py.
    """

    def route(weights, batch):
        router = annotate(weights["router"], None, "expert")
        return jnp.einsum("bse,ex->bsx", batch["x"], router)

    weights = {"router": shape(EMBED, EXPERTS)}
    sharded = shard(route, [weights, TOKENS], BOTH, params=("fsdp",))
    where = "bse,ex->bsx"
    assert sorted(moved(sharded)) == sorted(
        [("all_gather", "expert", where), ("all_gather", "fsdp", where)]
    )
