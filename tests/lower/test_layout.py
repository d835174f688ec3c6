"""Which device is where in the mesh of a plan."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autoshard as ash
from autoshard.lower.step import build_mesh
from autoshard.plan.devices import row_major
from autoshard.verify import verify_lowered
from autoshard.verify.targets import target_of


@dataclass(frozen=True)
class Chip:
    """What is asked of a device."""

    id: int
    platform: str
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def planned(order, chips="cpu:8"):
    args = jnp.ones((16, 8)), jnp.ones((8, 4))
    pins = {"data": 4, "fsdp": 2, "order": order}
    plan = ash.search(jnp.matmul, *args, cluster=chips, strategy="fsdp", pins=pins)
    return plan, args


@pytest.mark.parametrize("order", ["data+fsdp", "fsdp+data"])
def test_devices_are_laid_out_in_the_order_of_the_plan(order):
    plan, _ = planned(order)
    mesh = build_mesh(plan)
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    shape = {"data+fsdp": (4, 2), "fsdp+data": (2, 4)}[order]
    assert mesh.axis_names == tuple(order.split("+"))
    assert ids.tolist() == np.arange(8).reshape(shape).tolist()


def test_tpus_are_laid_out_over_their_torus():
    """Coordinates count x first, numbers do not: (0, 0), (1, 0), (0, 1), (1, 1), ..."""
    places = [(x, y, 0) for y, x in itertools.product(range(4), range(2))]
    chips = [Chip(k, "tpu", place) for k, place in enumerate(places)]
    assert [c.coords for c in row_major(chips)] == sorted(places)
    assert [c.id for c in row_major(chips)] == [0, 2, 4, 6, 1, 3, 5, 7]


def test_gpus_are_laid_out_by_number():
    chips = [Chip(k, "gpu") for k in (4, 5, 0, 1)]
    assert [c.id for c in row_major(chips)] == [0, 1, 4, 5]


def test_collectives_of_another_order_are_read_from_the_groups_of_devices():
    """What the compiler emits is named by axes, whose order is that of the plan."""
    target = None
    for order in ("data+fsdp", "fsdp+data"):
        plan, args = planned(order)
        step = ash.parallelize(jnp.matmul, plan, *args)
        target = target_of(plan, "host")
        abstract = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
        found = verify_lowered(plan, step.jitted.lower(*abstract), target)
        assert found.comparison is not None
        assert found.unexplained == 0
        assert {frozenset(c.axes) for c in plan.predicted.collectives} == {
            frozenset(side[1]) for row in found.rows for side in row.emitted
        }
