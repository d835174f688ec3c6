"""A sketch priced with so many cuts agrees with the step traced with so many.

Search prices the program traced once, without microbatches; what it then plans is
traced with them. What differs by nature: cutting the batch (a copy of it, traced only),
and adding up the gradients (an estimate in one, ops in the other, which run in the
kernels of the products that make them).
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from cost.test_price import pricer
from helpers.equality import abstract_batch, make_step
from propagate.programs import mlp_step, shape, stacked_step

from autoshard.cost.collectives import Meshes
from autoshard.cost.constants import Constants
from autoshard.cost.rates import Rates
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import cluster

H100 = cluster("h100:8")
BATCH, DATA, FSDP, TENSOR = 256, ("data",), ("fsdp",), ("tensor",)

LAYOUTS = {
    "dp": ({"batch": DATA}, {"data": 8}, {}),
    "zero2": ({"batch": DATA}, {"data": 8}, {"gradients": DATA, "optimizer": DATA}),
    "fsdp": (
        {"batch": FSDP},
        {"fsdp": 8},
        {"params": FSDP, "gradients": FSDP, "optimizer": FSDP},
    ),
    "sp": (
        {"batch": DATA, "heads": TENSOR, "mlp": TENSOR, "seq.residual": TENSOR},
        {"data": 2, "tensor": 4},
        {},
    ),
}
STEPS = {
    "mlp": lambda: (mlp_step(), shape(BATCH, 128, 32)),
    "stacked": lambda: (stacked_step(), shape(BATCH, 128, 32)),
    "decoder": lambda: (make_step("llama3-tiny", scan=True), abstract_batch(BATCH)),
}


def volumes(found, meshes, cuts):
    """Bytes per step by kind and axes."""
    table = Counter()
    for index in range(len(found.moved.moves)):
        for step, _, size, runs in found.moved.collective(index, meshes, cuts):
            if step.kind != "slice":
                table[step.kind, step.axes] += float(size[0] * runs[0])
    return dict(table)


def arithmetic_s(found, meshes, cuts):
    """Seconds of products per step, their memory traffic aside."""
    rates = Rates.of(H100, Constants.shipped())
    times = found.compute.times(meshes, cuts, rates)
    return sum(time.arithmetic_s for time in times)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", STEPS)
def test_cuts_agree_with_traced_microbatches(which, layout):
    count = 4
    step, batch = STEPS[which]()
    rules, sizes, storage = LAYOUTS[layout]
    row = np.array([[sizes.get(axis, 1) for axis in AXES]])
    meshes, one = Meshes(H100, row), np.ones(1)
    sketch = pricer(step, [batch], rules, sizes, **storage)
    cut = step.with_schedule(microbatches=count, remat="none")
    traced = pricer(cut, [batch], rules, sizes, **storage)

    expected = volumes(traced, meshes, one)
    assert expected
    assert volumes(sketch, meshes, count * one) == pytest.approx(expected)

    a, b = sketch.price(H100, row, count * one), traced.price(H100, row, one)
    np.testing.assert_allclose(
        arithmetic_s(sketch, meshes, count * one), arithmetic_s(traced, meshes, one)
    )
    np.testing.assert_allclose(a.matmul_s + a.other_s, b.matmul_s + b.other_s, rtol=0.2)
    np.testing.assert_allclose(a.collective_s + a.hidden_s, b.collective_s + b.hidden_s)
    # What shows depends on the ops beside it, `other_s` among them.
    np.testing.assert_allclose(a.collective_s, b.collective_s, rtol=0.01)
    np.testing.assert_allclose(a.step_s, b.step_s, rtol=0.02)
    data = traced.liveness.state_bytes(meshes)["data"]
    assert abs(a.peak_bytes - b.peak_bytes) <= data + 0.001 * b.peak_bytes


def test_more_cuts_need_less_memory_and_more_collectives():
    step, batch = STEPS["stacked"]()
    rules, sizes, storage = LAYOUTS["fsdp"]
    found = pricer(step, [batch], rules, sizes, **storage)
    row = np.array([[sizes.get(axis, 1) for axis in AXES]] * 4)
    got = found.price(H100, row, np.array([1.0, 2.0, 4.0, 8.0]))
    assert (np.diff(got.peak_bytes) < 0).all()
    assert (np.diff(got.collective_s) > 0).all()
    np.testing.assert_allclose(got.matmul_s, got.matmul_s[0], rtol=0.2)
