"""Time of collectives, against closed forms of ring algorithms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.cost.collectives import Meshes
from autoshard.cost.network import LINK_EFFICIENCY
from autoshard.cost.price import Step, steps_of
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import cluster
from autoshard.plan.sharded import Reshard

BYTES = 1e9


def seconds(chips, kind, axes, bytes_=BYTES, **sizes):
    row = np.array([[sizes.get(axis, 1) for axis in AXES]])
    [time] = Meshes(cluster(chips), row).time_s(kind, frozenset(axes), bytes_)
    return time


def ring(members, bytes_per_s, latency_s, bytes_=BYTES):
    """Each of n members passes on n - 1 pieces of 1/n of the buffer."""
    return bytes_ * (members - 1) / members / (LINK_EFFICIENCY * bytes_per_s) + (
        latency_s
    )


# Figures of the catalogue: NVLink 450 GB/s and 1.9 us, network 50 GB/s a chip and 4 us.
NODE, NODE_LATENCY = 450e9, 1.9e-6
NET, NET_LATENCY = 50e9, 4e-6

GPU = [
    # In one node: seven steps over NVLink.
    ("h100:8", {"tensor": 8}, ["tensor"], ring(8, NODE, 7 * NODE_LATENCY)),
    ("h100:16", {"data": 2, "tensor": 8}, ["tensor"], ring(8, NODE, 7 * NODE_LATENCY)),
    # One member in each of two nodes: one network card at work.
    ("h100:16", {"data": 2, "tensor": 8}, ["data"], ring(2, NET, NET_LATENCY)),
    # Two whole nodes: eight cards, 400 GB/s, less than NVLink.
    (
        "h100:16",
        {"fsdp": 16},
        ["fsdp"],
        ring(16, 8 * NET, 7 * NODE_LATENCY + NET_LATENCY),
    ),
    (
        "h100:16",
        {"data": 2, "tensor": 8},
        ["data", "tensor"],
        ring(16, 8 * NET, 7 * NODE_LATENCY + NET_LATENCY),
    ),
    # Stride two: four members in each of two nodes.
    (
        "h100:16",
        {"data": 8, "tensor": 2},
        ["data"],
        ring(8, 4 * NET, 3 * NODE_LATENCY + NET_LATENCY),
    ),
    # Eight nodes of one member each: a tree of three levels of latency.
    (
        "h100:64",
        {"data": 8, "tensor": 8},
        ["data"],
        ring(8, NET, 3 * NET_LATENCY),
    ),
]


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize(("chips", "sizes", "axes", "expected"), GPU)
def test_a_ring_in_a_node_and_across_nodes(chips, sizes, axes, expected, kind):
    assert seconds(chips, kind, axes, **sizes) == pytest.approx(expected)


@pytest.mark.parametrize(("chips", "sizes", "axes", "expected"), GPU)
def test_an_all_reduce_is_two_rings(chips, sizes, axes, expected):
    assert seconds(chips, "all_reduce", axes, **sizes) == pytest.approx(2 * expected)


# v5e: 50 GB/s each way a link, 1 us a hop; only a side of 16 is closed into a ring.
TPU = [
    # Along one side, an open line: one direction.
    ("v5e:4x4", {"data": 4, "tensor": 4}, ["tensor"], ring(4, 50e9, 3e-6)),
    ("v5e:4x4", {"data": 4, "tensor": 4}, ["data"], ring(4, 50e9, 3e-6)),
    # Over both sides: two links at work, three hops along each.
    ("v5e:4x4", {"fsdp": 16}, ["fsdp"], ring(16, 100e9, 6e-6)),
    # A closed ring uses both directions.
    ("v5e:16x16", {"data": 16, "tensor": 16}, ["tensor"], ring(16, 100e9, 15e-6)),
]


@pytest.mark.parametrize(("chips", "sizes", "axes", "expected"), TPU)
def test_a_torus(chips, sizes, axes, expected):
    assert seconds(chips, "all_gather", axes, **sizes) == pytest.approx(expected)


def test_virtual_devices_of_a_host():
    got = seconds("cpu:8", "all_gather", ["data"], data=8)
    assert got == pytest.approx(ring(8, 5e9, 7 * 10e-6))


def test_an_exchange_in_a_node_keeps_its_own_part():
    got = seconds("h100:8", "all_to_all", ["expert"], expert=8)
    assert got == pytest.approx(ring(8, NODE, 7 * NODE_LATENCY))


def test_an_exchange_across_nodes_sends_what_leaves_over_the_network():
    """Of 16 parts 8 leave the node and 7 go to other chips of it, at the same time."""
    got = seconds("h100:16", "all_to_all", ["expert"], expert=16)
    leaving = BYTES * 8 / 16 / (LINK_EFFICIENCY * NET)
    assert got == pytest.approx(leaving + 7 * NODE_LATENCY + NET_LATENCY)


KINDS = ["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


@pytest.mark.parametrize("chips", ["h100:16", "v5e:4x4", "cpu:16"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_axis_of_one_costs_nothing(chips, kind):
    assert seconds(chips, kind, ["tensor"], data=16) == 0.0
    both = seconds(chips, kind, ["data", "tensor"], data=16)
    assert both == seconds(chips, kind, ["data"], data=16) > 0.0


@pytest.mark.parametrize("chips", ["h100:16", "v5e:4x4", "cpu:16"])
def test_a_slice_moves_nothing(chips):
    assert seconds(chips, "slice", ["data"], data=16) == 0.0


@given(
    st.sampled_from(["h100:64", "v5e:8x8", "v5p:4x4x4", "cpu:64"]),
    st.sampled_from(KINDS),
    st.integers(0, 6),
    st.floats(1.0, 1e12),
)
def test_more_bytes_never_take_less_time(chips, kind, log, bytes_):
    sizes = {"fsdp": 2**log, "tensor": 2 ** (6 - log)}
    small, large = (
        seconds(chips, kind, ["fsdp"], bytes_=b, **sizes) for b in (bytes_, 2 * bytes_)
    )
    assert 0 <= small <= large <= 2 * small


def test_candidates_are_priced_as_if_alone():
    rows = np.array([[1, n, 1, 1, 1, 64 // n] for n in (1, 2, 4, 8, 16, 32, 64)])
    axes = frozenset(["data"])
    together = Meshes(cluster("h100:64"), rows).time_s("all_reduce", axes, BYTES)
    alone = [
        seconds("h100:64", "all_reduce", axes, data=row[1], tensor=row[5])
        for row in rows
    ]
    np.testing.assert_allclose(together, alone)


# -- which collectives a reshard takes -------------------------------------------

D, T, N = ("data",), ("tensor",), ()


def steps(source, target, unreduced=()):
    return [
        (step.kind, step.axes, set(step.large))
        for step in steps_of(Reshard(0, "in0", 0, source, unreduced, target))
    ]


def test_steps_of_a_reshard():
    # The large side of a gather is what it makes; of a scatter, what it takes.
    assert steps((D, T), (D, N)) == [("all_gather", T, {"data"})]
    assert steps((D, N), (D, N), unreduced=T) == [("all_reduce", T, {"data"})]
    assert steps((D, N), (D, T), unreduced=T) == [("reduce_scatter", T, {"data"})]
    assert steps((D, N), (N, D)) == [("all_to_all", D, {"data"})]
    assert steps((D, N), (D, T)) == [("slice", T, {"data"})]
    assert steps((D, N), (D, N)) == []
    assert steps((N, N), (D, N), unreduced=("data", "tensor")) == [
        ("reduce_scatter", D, set()),
        ("all_reduce", T, {"data"}),
    ]


def test_a_step_is_a_value():
    assert Step("slice", D, frozenset()) == Step("slice", D, frozenset())
