"""Attention over a sequence in parts: what is sent, beside what, and what is held."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from propagate.programs import (
    ACTIVATIONS,
    ATTENTION_WEIGHTS,
    BATCH,
    HEADS,
    SEQ,
    WIDTH,
    attention,
    mlp,
)

from autoshard.cost import Pricer
from autoshard.cost.collectives import Meshes
from autoshard.cost.context import ring_s
from autoshard.cost.work import analyse
from autoshard.ir.mesh import AXES
from autoshard.ir.trace import trace
from autoshard.plan.cluster import cluster
from autoshard.plan.sharded import Layout
from autoshard.propagate import find_classes, propagate

H100 = cluster("h100:16")
RULES = {"batch": ("data",), "seq": ("context",), "heads": ("tensor",)}


def loss(weights, x):
    return (attention(weights, x) ** 2).mean()


def pricer(kind, heads=0, fn=None, rules=RULES):
    args = (ATTENTION_WEIGHTS, ACTIVATIONS)
    traced = trace(fn or jax.grad(loss), args)
    classes = find_classes(traced)
    sharded = propagate(traced, classes, Layout(rules=tuple(rules.items())))
    return Pricer(sharded, analyse(traced, classes)).with_context(kind, heads)


def row(**sizes):
    return np.array([[sizes.get(axis, 1) for axis in AXES]], dtype=np.int64)


def sent(kind, chips=H100, heads=0, **sizes):
    """`(kind, bytes, runs)` of all that attention sends."""
    meshes = Meshes(chips, row(**sizes))
    found = pricer(kind, heads).timing.sent(meshes, np.ones(1))
    return sorted((t.kind, float(t.bytes_[0]), float(t.runs[0])) for t in found)


# -- a ring, event by event -------------------------------------------------------


def simulated(compute_s, keys_s, sums_s, n):
    """When every device of a ring is done, and seconds that its link was busy.

    Every device follows its own clock. While it computes with the keys that it has, it
    sends them to the next device, unless that has them from the start, and the sum of
    gradients that it added to before; its link sends one after the other. It goes on
    when all of that is done, and the same has come from the device before it.
    """
    clock, busy = [0.0] * n, [0.0] * n
    keys = list(range(n))
    sums = [None] * n  # (whose keys, who has added to it)
    met, home = [set() for _ in range(n)], {}
    while any(part is not None for part in (*keys, *sums)):
        next_keys, came = [None] * n, [None] * n
        ends, arrives = list(clock), [0.0] * n
        for d in range(n):
            after, link = (d + 1) % n, clock[d]
            if keys[d] is not None and keys[d] != after:
                link += keys_s
                next_keys[after] = keys[d]
            if sums[d] is not None:
                link += sums_s
                came[after] = sums[d]
            busy[d] += link - clock[d]
            arrives[after] = link
            ends[d] = max(link, clock[d] + (compute_s if keys[d] is not None else 0.0))
        sums = [None] * n
        for d in range(n):
            clock[d] = max(ends[d], arrives[d])
            if keys[d] is None:
                home[d] = came[d]
                continue
            met[d].add(keys[d])
            owner, adders = came[d] or (keys[d], ())
            assert owner == keys[d]
            sums[d] = owner, (*adders, d)
        keys = next_keys
    everyone = set(range(n))
    assert all(own == everyone for own in met)
    assert all(home[d][0] == d and set(home[d][1]) == everyone for d in range(n))
    return max(clock), max(busy)


@pytest.mark.parametrize(
    ("compute", "keys", "sums", "n"),
    list(itertools.product((0.5, 2.0, 7.0), (1.0, 3.0), (0.0, 1.5, 4.0), (2, 3, 8))),
)
def test_a_ring_takes_what_its_events_take(compute, keys, sums, n):
    one = np.ones(1)
    total, shown = ring_s(n * compute * one, keys * one, sums * one, float(n) * one)
    end, sends = simulated(compute, keys, sums, n)
    assert n * compute + shown[0] == pytest.approx(end)
    assert total[0] == pytest.approx(sends)


def test_a_ring_of_one_device_sends_nothing():
    one = np.ones(1)
    assert [float(t[0]) for t in ring_s(one, one, one, one)] == [0.0, 0.0]


# -- bytes, by hand ---------------------------------------------------------------

# Queries, keys and values are float32 [8, 16, 4, 8]; over data=2, context=4, tensor=2
# a device has 1/16 of each.
LOCAL = BATCH * SEQ * HEADS * WIDTH * 4 / (2 * 4 * 2)
MESH = {"data": 2, "context": 4, "tensor": 2}


def test_a_ring_sends_keys_and_values_and_back_their_gradients_too():
    assert sent("ring", **MESH) == [
        ("permute", 2 * LOCAL, 3.0),  # forward, three steps to be with all
        ("permute", 2 * LOCAL, 3.0),  # backward
        ("permute", 2 * LOCAL, 4.0),  # gradients, and home
    ]


def test_heads_are_exchanged_eight_times():
    """Queries, keys, values and the result, and the gradients of all four."""
    mesh = {"data": 4, "context": 2, "tensor": 2}
    assert sent("ulysses", **mesh) == [("all_to_all", LOCAL, 1.0)] * 8


def test_usp_does_both():
    found = sent("usp", data=2, context=4, tensor=1, chips=cluster("h100:8"))
    each = BATCH * SEQ * HEADS * WIDTH * 4 / 8
    assert found == [
        *[("all_to_all", each, 1.0)] * 8,
        ("permute", 2 * each, 1.0),  # a ring of two
        ("permute", 2 * each, 1.0),
        ("permute", 2 * each, 2.0),
    ]


def test_without_context_devices_nothing_is_sent():
    for kind in ("ring", "ulysses", "usp"):
        found = pricer(kind).timing.sent(
            Meshes(H100, row(data=8, tensor=2)), np.ones(1)
        )
        assert all(float(t.time_s[0]) == 0 for t in found)


@pytest.mark.parametrize("kind", ["ring", "ulysses", "usp"])
def test_keys_and_values_are_not_gathered(kind):
    def of_keys(found):
        ops = found.program.ops
        return [
            m
            for m in found.moved.moves
            if m.op >= 0
            and any(form in ops[m.op].address for form in ("bqhd,bkhd", "bhqk,bkhd"))
        ]

    assert len(of_keys(pricer("all_gather"))) == 4
    assert of_keys(pricer(kind)) == []


# -- memory -------------------------------------------------------------------------


def held(kind):
    """Bytes of the buffers of attention's own, on one device, by when they begin."""
    found, meshes = pricer(kind), Meshes(H100, row(**MESH))
    size = {}
    for buffer in found.context.buffers():
        axes = frozenset(a for dim in buffer.spec for a in dim)
        bytes_ = found.local_bytes(buffer.value, axes, meshes, np.ones(1))
        size[buffer.begin] = size.get(buffer.begin, 0.0) + float(bytes_[0])
    return size


def test_a_ring_holds_two_parts_of_keys_and_values():
    forward, backward = (bytes_ for _, bytes_ in sorted(held("ring").items()))
    assert forward == 2 * 2 * LOCAL
    assert backward == 2 * 4 * LOCAL  # and of their gradients


def test_what_is_exchanged_is_held_once():
    assert sum(held("ulysses").values()) == 8 * LOCAL


# -- which heads divide -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mesh", "can"),
    [
        ("ulysses", {"context": 4}, True),  # 4 heads
        ("ulysses", {"context": 2, "tensor": 2}, True),
        ("ulysses", {"context": 4, "tensor": 2}, False),  # 2 heads on a device
        ("ulysses", {"context": 8}, False),
        ("ring", {"context": 8}, True),
        ("usp", {"context": 2}, False),  # no two degrees
        ("usp", {"context": 8}, True),  # 2 x 4 or 4 x 2
        ("usp", {"context": 8, "tensor": 4}, False),  # one head on a device
    ],
)
def test_heads_must_divide(kind, mesh, can):
    assert pricer(kind).context.divides(row(**mesh)).tolist() == [can]


def test_the_fastest_split_of_usp_is_taken():
    """Of each split asked for alone, the one that shows the least."""
    meshes = Meshes(cluster("h100:16"), row(context=8, data=2))
    seconds = {}
    for heads in (2, 4):
        found = pricer("usp", heads).timing.sent(meshes, np.ones(1))
        seconds[heads] = sum(float(t.shown_s[0]) for t in found)
    price = pricer("usp").price(meshes.cluster, meshes.sizes, np.ones(1))
    best = min(seconds, key=lambda heads: seconds[heads])
    assert price.context_heads.tolist() == [best]
    alone = pricer("usp", best).price(meshes.cluster, meshes.sizes, np.ones(1))
    assert price.step_s[0] == alone.step_s[0]


# -- what is attention ----------------------------------------------------------------


def test_a_program_without_attention_has_no_passes():
    def fn(weights, x):
        return (mlp({"up": weights["q"][:, 0], "down": weights["out"][0]}, x)).mean()

    assert pricer("ring", fn=fn).context.passes == ()


def test_a_sequence_that_is_whole_has_no_passes():
    assert pricer("ring", rules={"batch": ("data",)}).context.passes == ()
