"""Bounds that hold however state is stored, on programs in which storage tells.

A bound is found with one storage and held against the price of another.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoshard import annotate, train_step
from autoshard.cost import Pricer, floors
from autoshard.cost.collectives import Meshes
from autoshard.cost.rates import Rates
from autoshard.cost.work import analyse
from autoshard.ir.mesh import AXES
from autoshard.ir.trace import trace
from autoshard.plan.cluster import cluster
from autoshard.plan.sharded import Layout
from autoshard.propagate import find_classes, propagate

H100 = cluster("h100:8")
ROWS = 2**18
LARGE = 2**20
STORAGES = (
    {},
    {"optimizer": ("fsdp",)},
    dict.fromkeys(("params", "gradients", "optimizer"), ("fsdp",)),
    dict.fromkeys(("params", "gradients", "optimizer"), ("context",)),
)


def gram(p, x):
    """A product that reads one parameter twice."""
    norms = (p["w"].T @ p["w"]).sum() + jnp.einsum("ij,ij->j", p["w"], p["w"]).sum()
    return ((x @ p["w"]) ** 2).mean() + jax.lax.stop_gradient(norms)


def in_two_halves(p, x):
    """Parts of a parameter, of odd sizes."""
    first, second = jnp.split(p["s"], 2, axis=1)
    hidden = annotate(x @ first, "batch", "mlp") * annotate(x @ second, "batch", "mlp")
    return (hidden**2).mean()


CASES = [
    (gram, {"w": (LARGE, 16)}, (64, LARGE)),
    (in_two_halves, {"s": (LARGE, 20)}, (8, LARGE)),
]


@pytest.mark.parametrize(("loss", "shapes", "batch"), CASES, ids=lambda x: str(x)[:20])
def test_no_storage_is_below_the_bound_of_another(loss, shapes, batch):
    def marked(p, x):
        return loss(p, annotate(x, "batch", None))

    def init(key):
        return {name: jax.random.normal(key, shape) for name, shape in shapes.items()}

    step = train_step(marked, optax.adam(1e-3), model=init)
    data = jax.ShapeDtypeStruct(batch, jnp.float32)
    traced = trace(step, (step.abstract_state(), data))
    classes = find_classes(traced)
    work = analyse(traced, classes)
    rules = {
        "batch": ("data", "fsdp"),
        "mlp": ("tensor",),
    }
    pricers = [
        Pricer(
            propagate(traced, classes, Layout(rules=tuple(rules.items()), **s)), work
        )
        for s in STORAGES
    ]
    meshes_of = [
        {"fsdp": 8},
        {"data": 2, "fsdp": 4},
        {"context": 8},
        {"data": 2, "fsdp": 2, "context": 2},
        {"data": 4, "tensor": 2},
        {"context": 2, "tensor": 4},
    ]
    sizes = np.array([[own.get(axis, 1) for axis in AXES] for own in meshes_of])
    sizes, cuts = np.tile(sizes, (2, 1)), np.repeat([1.0, 8.0], len(sizes))
    meshes = Meshes(H100, sizes)
    rates = Rates.of(H100, pricers[0].constants)

    def products(pricer):
        """Of each product the bound, and what it takes: float64[2, candidate]."""
        found = defaultdict(lambda: np.zeros((2, len(sizes))))
        for time in pricer.compute.times(meshes, cuts, rates, update=False):
            if time.kernel.kind == "product":  # of which each mesh has one kernel
                found[time.kernel.op] += time.least_s, time.total_s
        return found

    tight = 0
    for first, other in itertools.product(pricers, repeat=2):
        known = floors.rest_s(first, meshes, cuts)
        own = meshes, cuts
        state_s = floors.summed_s(other, *own) + floors.update_s(other, *own)
        moved = floors.moved_s(other, *own)
        rest = known[1] + state_s.sum(axis=0)
        found, _ = floors.stored_s(other, meshes, moved, rest)
        step_s = other.price(H100, sizes, cuts).step_s
        assert (found <= step_s * (1 + 1e-12)).all()
        assert (known[0] <= step_s * (1 + 1e-12)).all()
        kernels = other._kernels(meshes, cuts)
        computed = (kernels.matmul + kernels.other - kernels.update).sum(axis=0)
        assert (known[2:].sum(axis=0) <= computed * (1 + 1e-12)).all()
        bounds, taken = products(first), products(other)
        assert bounds.keys() == taken.keys()
        for op, own in bounds.items():
            assert (own[0] <= taken[op][1] * (1 + 1e-12)).all(), op
        tight += int((found > 0.7 * step_s).sum())
    assert tight
