"""Where axes lie, against devices that are laid out one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from autoshard.cost.collectives import Meshes, scattered, taken
from autoshard.cost.constants import Constants
from autoshard.cost.overlap import exposed_s, least_exposed_s
from autoshard.cost.placement import Placements, distinguishes, orders_of
from autoshard.ir.mesh import AXES, arranged
from autoshard.plan.cluster import cluster


def laid_out(sizes, order):
    """The device at each coordinate of a mesh, axes in the order of `AXES`."""
    devices = np.arange(math.prod(sizes)).reshape([sizes[k] for k in order])
    return devices.transpose(np.argsort(order))


def first_group(sizes, order, axes):
    """The devices that talk to device 0 over some axes, in rising order."""
    devices = laid_out(sizes, order)
    at = tuple(slice(None) if a in axes else 0 for a in AXES)
    return sorted(np.ravel(devices[at]).tolist())


def cases(count):
    """Random meshes of powers of two, orders and axes: every level is nested."""
    rng = np.random.default_rng(count)
    for _ in range(60):
        cuts = np.sort(rng.integers(0, count + 1, len(AXES) - 1))
        logs = np.diff([0, *cuts, count])
        axes = [a for a in AXES if rng.random() < 0.5] or ["tensor"]
        yield (2**logs).tolist(), rng.permutation(len(AXES)), frozenset(axes)


@pytest.mark.parametrize("per_node", [2, 4, 8])
def test_members_in_a_node_are_counted_on_devices(per_node):
    there = cluster(f"h100:{64 // per_node}x{per_node}")
    for sizes, order, axes in cases(6):
        members = first_group(sizes, order, axes)
        group = Meshes(there, np.array([sizes]), np.array([order])).group(axes)
        inside = sum(device < per_node for device in members)
        assert float(group.inside[0]) == inside, (sizes, order, axes)
        nodes = {device // per_node for device in members}
        assert float(group.outside[0]) == len(nodes), (sizes, order, axes)


@pytest.mark.parametrize("name", ["v5e:4x16", "v5p:4x4x4", "v5e:8x8"])
def test_members_along_each_dim_of_a_torus_are_counted_on_devices(name):
    there, tried = cluster(name), 0
    for sizes, order, axes in cases(6):
        members = first_group(sizes, order, axes)
        places = [np.unravel_index(device, there.shape) for device in members]
        along = [sorted({int(x) for x in dim}) for dim in zip(*places, strict=True)]
        if any(len(set(np.diff(dim).tolist())) > 1 for dim in along):
            continue  # not evenly spaced: what they share is an average
        tried += 1
        group = Meshes(there, np.array([sizes]), np.array([order])).group(axes)
        links = hops = 0.0
        apart = 1
        for dim, side, closed in zip(along, there.shape, there.rings, strict=True):
            if len(dim) == 1:
                continue
            step = dim[1] - dim[0]
            apart = max(apart, step)
            # They go all the way round where the next step comes back to the first.
            ring = closed and dim[-1] + step == side
            links += (2 if ring else 1) / step
            hops += (len(dim) // 2 if ring else len(dim) - 1) * step
        assert float(group.links[0]) == (links or 1.0), (sizes, order, axes)
        assert float(group.hops[0]) == hops, (sizes, order, axes)
        assert float(group.stride[0]) == apart, (sizes, order, axes)
    assert tried > 30


def test_the_order_of_axes_is_the_layout_of_their_devices():
    """Of 2 x 4 devices, `tensor` outside of `data`: its two are four apart."""
    sizes = np.array([[1, 4, 1, 1, 1, 2]] * 2)
    orders = np.array([[AXES.index(a) for a in arranged(o)] for o in ((), ("tensor",))])
    orders[1] = [AXES.index(a) for a in arranged(("tensor", "data"))]
    found = Meshes(cluster("h100:1x8"), sizes, orders)
    assert found.strides[AXES.index("tensor")].tolist() == [1.0, 4.0]
    assert found.strides[AXES.index("data")].tolist() == [2.0, 1.0]
    assert [m.canonical for m in (found, found.take(np.array([0])))] == [False, True]


def test_orders_of_axes():
    assert arranged(()) == AXES
    assert arranged(("tensor", "data")) == (
        "stage", "tensor", "fsdp", "expert", "context", "data",
    )  # fmt: skip
    orders = orders_of(frozenset(["data", "expert", "tensor"])).tolist()
    assert orders[0] == list(range(len(AXES)))
    assert len({tuple(o) for o in orders}) == math.factorial(3)
    assert all(o[0] == 0 and o[2] == 2 and o[4] == 4 for o in orders)


def test_what_the_network_tells_apart():
    """In nodes of 8: of 2 x 4 x 16 devices three can fill a node, or two and a half."""
    sizes = np.array([[1, 2, 4, 1, 1, 16]])
    found = Placements(cluster("h100:16x8"), sizes).orders(0)
    seen = {
        tuple(
            sum(d < 8 for d in first_group(sizes[0], order, {a}))
            for a in ("data", "fsdp", "tensor")
        )
        for order in itertools.permutations(range(len(AXES)))
    }
    # 8 of tensor; data and fsdp; data and 4 of tensor; fsdp and 2 of tensor.
    assert seen == {(1, 1, 8), (2, 4, 1), (2, 1, 4), (1, 4, 2)}
    assert len(found) == len(seen)
    assert found[0].tolist() == list(range(len(AXES)))
    assert [distinguishes(cluster(c)) for c in ("h100:8", "h100:16", "cpu:4")] == [
        False, True, False,
    ]  # fmt: skip


def test_groups_anywhere_are_those_of_all_orders():
    rng = np.random.default_rng(1)
    for name, count in (("h100:8x4", 5), ("h100:3x4", None), ("v5e:4x8", 5)):
        there = cluster(name)
        rows = (
            [sizes for sizes, _, _ in cases(count)] if count else [[1, 2, 3, 1, 1, 2]]
        )
        sizes = np.array(rows)
        places = Placements(there, sizes)
        free = Meshes(there, sizes, anywhere=places)
        bytes_ = rng.uniform(1e3, 1e10, len(sizes))
        for axes in (["data"], ["fsdp", "tensor"], ["data", "context", "tensor"]):
            for kind in ("all_gather", "all_reduce", "all_to_all", "permute"):
                every = [
                    Meshes(there, sizes, np.tile(order, (len(sizes), 1))).time_s(
                        kind, frozenset(axes), bytes_
                    )
                    for order in itertools.permutations(range(len(AXES)))
                    if order[0] == 0  # no stages
                ]
                best = np.min(every, axis=0)
                got = free.time_s(kind, frozenset(axes), bytes_)
                assert (got <= best * (1 + 1e-12)).all()
                if there.kind == "gpu":  # a torus has the best of each figure
                    np.testing.assert_allclose(got, best, rtol=1e-12)


@pytest.mark.parametrize("kind", ["gpu", "tpu", "cpu"])
def test_the_least_that_shows_is_below_all_that_may(kind):
    constants, rng = Constants.shipped(), np.random.default_rng(0)
    work, ahead, after, between = rng.lognormal(0, 2, (4, 500))
    least = least_exposed_s(kind, constants, work, ahead, after, between)
    tight = np.full(500, np.inf)
    for _ in range(400):
        more = rng.lognormal(-1, 2, (3, 500)) * rng.integers(0, 2, (3, 1))
        given = ahead + more[0], after + more[1], between + more[2]
        shown = exposed_s(kind, constants, work, *given)
        assert (least <= shown * (1 + 1e-12)).all()
        tight = np.minimum(tight, shown)
    assert (least >= 0.9 * tight).mean() > 0.9


def test_what_is_taken_is_scattered_back():
    table, vector = np.arange(12.0).reshape(3, 4), np.arange(4.0)
    rows = np.array([2, 0]), np.array([3, 1])
    parts = [(at, taken((table, [vector], None), at)) for at in rows]
    assert parts[0][1][0].tolist() == [[2.0, 0.0], [6.0, 4.0], [10.0, 8.0]]
    back, [line], nothing = scattered(parts, 4)
    assert back.tolist() == table.tolist()
    assert (line.tolist(), nothing) == (vector.tolist(), None)
