"""Time of collectives of meshes, against closed forms by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.cost.collectives import Meshes
from autoshard.cost.moves import Step, steps_of
from autoshard.cost.network import LINK_EFFICIENCY
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import cluster
from autoshard.plan.sharded import Reshard

BYTES = 1e9


def seconds(chips, kind, axes, bytes_=BYTES, **sizes):
    row = np.array([[sizes.get(axis, 1) for axis in AXES]])
    [time] = Meshes(cluster(chips), row).time_s(kind, frozenset(axes), bytes_)
    return time


# Figures of the catalogue: NVLink 450 GB/s and 1.9 us, network 50 GB/s a chip and 4 us;
# of these rings reach 81 % and 98.5 %, the switch adds at 68.4 %. A piece of 2.7 MB
# (2 MB in the network) is half-way from half of the rate to all of it.
NODE, NODE_LATENCY, LAUNCH = 450e9, 1.9e-6, 12e-6
NET, NET_LATENCY = 50e9, 4e-6


def ramp(members, half):
    return 1 + half / (BYTES / members + half)


def node(members, buffers, share=0.81):
    """Seconds in which `buffers` buffers go over NVLink, in pieces of 1/members."""
    return BYTES * buffers / (share * NODE) * ramp(members, 2.7e6)


def net(members, buffers):
    """The same over one network card."""
    return BYTES * buffers / (0.985 * NET) * ramp(members, 2.0e6)


def ring(members, bytes_per_s, latency_s):
    """Each of n members passes on n - 1 pieces of 1/n of the buffer."""
    return BYTES * (members - 1) / members / bytes_per_s + latency_s


# Mesh and axes; an all-gather; an all-reduce, both without the launch.
GPU = [
    # In one node: seven steps over NVLink; a sum by the switch, 9/8 of the buffer.
    (
        *("h100:8", {"tensor": 8}, ["tensor"]),
        node(8, 7 / 8) + 7 * NODE_LATENCY,
        node(8, 9 / 8, 0.684) + 14 * NODE_LATENCY,
    ),
    (
        *("h100:16", {"data": 2, "tensor": 8}, ["tensor"]),
        node(8, 7 / 8) + 7 * NODE_LATENCY,
        node(8, 9 / 8, 0.684) + 14 * NODE_LATENCY,
    ),
    # One member in each of two nodes: one network card at work.
    (
        *("h100:16", {"data": 2, "tensor": 8}, ["data"]),
        net(2, 1 / 2) + NET_LATENCY,
        net(2, 1) + 2 * NET_LATENCY,
    ),
    # Two whole nodes: eight cards, faster than seven eighths over NVLink are. The sum
    # of each node, by its switch, hides what two trees send over the cards.
    (
        *("h100:16", {"fsdp": 16}, ["fsdp"]),
        max(net(16, 15 / 16 / 8), node(16, 15 / 16 * 7 / 8)) + 15 * NET_LATENCY,
        node(16, 9 / 8, 0.684) + 14 * NODE_LATENCY + 2 * NET_LATENCY,
    ),
    (
        *("h100:16", {"data": 2, "tensor": 8}, ["data", "tensor"]),
        max(net(16, 15 / 16 / 8), node(16, 15 / 16 * 7 / 8)) + 15 * NET_LATENCY,
        node(16, 9 / 8, 0.684) + 14 * NODE_LATENCY + 2 * NET_LATENCY,
    ),
    # Stride two: four members in each of two nodes, with four cards.
    (
        *("h100:16", {"data": 8, "tensor": 2}, ["data"]),
        net(8, 7 / 8 / 4) + 7 * NET_LATENCY,
        net(8, 1 / 4) + 6 * NODE_LATENCY + 2 * NET_LATENCY,
    ),
    # Eight nodes of one member each: a ring, as a tree sends two whole buffers.
    (
        *("h100:64", {"data": 8, "tensor": 8}, ["data"]),
        net(8, 7 / 8) + 7 * NET_LATENCY,
        2 * (net(8, 7 / 8) + 7 * NET_LATENCY),
    ),
]


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize(("chips", "sizes", "axes", "expected", "_"), GPU)
def test_a_ring_in_a_node_and_across_nodes(chips, sizes, axes, expected, _, kind):
    got = seconds(chips, kind, axes, **sizes)
    assert got == pytest.approx(LAUNCH + expected)


@pytest.mark.parametrize(("chips", "sizes", "axes", "_", "expected"), GPU)
def test_an_all_reduce_takes_the_fastest_way(chips, sizes, axes, _, expected):
    got = seconds(chips, "all_reduce", axes, **sizes)
    assert got == pytest.approx(LAUNCH + expected)


# v5e: 50 GB/s each way a link, of which 90 % are reached, 1 us a hop; only a side of 16
# is closed into a ring.
ICI = 0.9 * 50e9
TPU = [
    # Along one side, an open line: one direction.
    ("v5e:4x4", {"data": 4, "tensor": 4}, ["tensor"], ring(4, ICI, 3e-6)),
    ("v5e:4x4", {"data": 4, "tensor": 4}, ["data"], ring(4, ICI, 3e-6)),
    # Over both sides: two links at work, three hops along each.
    ("v5e:4x4", {"fsdp": 16}, ["fsdp"], ring(16, 2 * ICI, 6e-6)),
    # A closed ring uses both directions; the farthest is eight hops away.
    ("v5e:16x16", {"data": 16, "tensor": 16}, ["tensor"], ring(16, 2 * ICI, 8e-6)),
    # A part of a ring is an open line.
    ("v5e:16x16", {"data": 64, "tensor": 4}, ["tensor"], ring(4, ICI, 3e-6)),
    # Every second chip of a side: two groups share its links, each hop is two links.
    ("v5e:4x4", {"data": 8, "tensor": 2}, ["data"], ring(8, 1.5 * ICI, 5e-6)),
    ("v5e:4x4", {"data": 4, "context": 2, "tensor": 2}, ["data"], ring(4, ICI, 3e-6)),
    ("v5e:4x4", {"data": 8, "tensor": 2}, ["tensor"], ring(2, ICI, 1e-6)),
    (
        *("v5e:16x16", {"data": 16, "context": 4, "tensor": 4}, ["context"]),
        ring(4, 2 * ICI / 4, 8e-6),
    ),
]


@pytest.mark.parametrize(("chips", "sizes", "axes", "expected"), TPU)
def test_a_torus(chips, sizes, axes, expected):
    assert seconds(chips, "all_gather", axes, **sizes) == pytest.approx(expected)


def test_an_exchange_on_a_torus_waits_for_the_busiest_link():
    """Of 4 x 4 chips in a square, half of a row's buffers cross its middle."""
    got = seconds("v5e:4x4", "all_to_all", ["expert"], expert=16)
    assert got == pytest.approx(BYTES * 4 / 4 / ICI + 6e-6)
    got = seconds("v5e:16x16", "all_to_all", ["expert"], data=16, expert=16)
    assert got == pytest.approx(BYTES * 16 / 8 / ICI + 8e-6)


def test_a_shift_on_a_torus_takes_one_link():
    got = seconds("v5e:16x16", "permute", ["tensor"], data=16, tensor=16)
    assert got == pytest.approx(BYTES / ICI + 1e-6)
    # Four groups lie between each other, four links apart.
    sizes = {"data": 16, "context": 4, "tensor": 4}
    got = seconds("v5e:16x16", "permute", ["context"], **sizes)
    assert got == pytest.approx(4 * (BYTES / ICI + 1e-6))


def test_virtual_devices_of_a_host():
    got = seconds("cpu:8", "all_gather", ["data"], data=8)
    assert got == pytest.approx(ring(8, LINK_EFFICIENCY * 5e9, 7 * 10e-6))
    # Any device copies from any other: an exchange takes as long as a gather.
    assert seconds("cpu:8", "all_to_all", ["expert"], expert=8) == pytest.approx(got)


def test_an_exchange_in_a_node_keeps_its_own_part():
    got = seconds("h100:8", "all_to_all", ["expert"], expert=8)
    assert got == pytest.approx(LAUNCH + node(8, 7 / 8) + 7 * NODE_LATENCY)


def test_an_exchange_across_nodes_sends_what_leaves_over_the_network():
    """Of 16 parts 8 leave the node and 7 go to other chips of it, at the same time."""
    got = seconds("h100:16", "all_to_all", ["expert"], expert=16)
    leaving = net(16, 8 / 16) + 7 * NODE_LATENCY + NET_LATENCY
    assert got == pytest.approx(LAUNCH + leaving)


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
