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


def scaled_twice(p, x):
    """Two passes over the batch, each with a parameter, of which one is computed on."""
    first = jnp.tanh(x * p["a"]) @ p["w"]
    return ((first + jnp.tanh(x * (1 + p["b"])) @ p["z"]) ** 2).mean()


def exponential_scale(p, x):
    """What is made of a parameter alone is costly."""
    return ((x * jnp.exp(p["a"])) @ p["w"] ** 2).mean()


def residual(p, x):
    """What is between blocks is sharded over an axis that parameters are stored on."""
    x = annotate(x, "batch", "embed")
    for into, out in (("w", "v"), ("z", "y")):
        hidden = annotate(jnp.tanh(x @ p[into]), "batch", "mlp")
        x = annotate(x + hidden @ p[out], "batch", "embed")
    return (x**2).mean()


def _normed(x, scale, bias):
    """Batch norm: what is made of the data meets parameters of its shape."""
    mean = x.mean(0)
    var = jnp.square(x).mean(0) - mean**2
    return (x - mean) * (jax.lax.rsqrt(var + 1e-5) * scale) + bias


def batch_norm(p, x):
    scale = jax.lax.rsqrt(jnp.square(x).mean(0) + 1e-5) * p["a"]
    return ((jnp.tanh(x) @ p["w"] + jnp.tanh(x * scale) @ p["z"]) ** 2).mean()


def batch_norms_in_a_loop(p, x):
    def body(h, q):
        inner = jnp.tanh(_normed(h, q["g"], q["e"]) @ q["m"])
        return h + inner * jnp.exp(q["l"]) + jnp.tanh(h * (1 + q["l"])), None

    layers = {name: p[name] for name in "gmel"}
    h, _ = jax.lax.scan(body, x, layers)
    return ((h @ p["w"]) ** 2).mean()


def queue(p, x):
    """State beside the batch, along the same dim."""
    both = jnp.concatenate([x, jax.lax.stop_gradient(p["q"])], 0)
    return (jnp.tanh(both).sum(-1) ** 2).mean() + 0 * p["q"].sum()


def written_over(p, x):
    """The batch in the place of a part of the state."""
    both = jax.lax.dynamic_update_slice(jax.lax.stop_gradient(p["q"]), x, (0, 0))
    return (jnp.tanh(both).sum(-1) ** 2).mean() + 0 * p["q"].sum()


def carried(p, x):
    """A loop that begins with state and goes on with the batch."""

    def step(h, row):
        h = jnp.tanh(row @ p["w"] + h @ p["u"])
        return h, h

    rows = annotate(jnp.swapaxes(x, 0, 1), None, "batch", None)
    _, made = jax.lax.scan(step, jax.lax.stop_gradient(p["h"]), rows)
    return ((made @ p["v"]) ** 2).mean()


def carried_statistics(p, x):
    """Statistics that begin as state, along which two passes can be one or two."""

    def step(c, rows):
        a, b = rows[:, 0], rows[:, 1]
        first, second = jnp.tanh(a * c) @ p["w"], jnp.tanh(b * (1 + c)) @ p["z"]
        out = first + second + jnp.tanh(a + b) @ p["w"]
        return 0.9 * c + 0.1 * a.mean(0), (out**2).mean()

    parts = annotate(jnp.swapaxes(x, 0, 1), None, "batch", None, None)
    _, found = jax.lax.scan(step, jax.lax.stop_gradient(p["a"]), parts)
    return found.mean()


def one_for_each_example(p, x):
    """State with a row for each example."""
    made = x @ p["w"]
    memory = 0.9 * p["m"] + 0.1 * jax.lax.stop_gradient(made)
    return ((made - memory) ** 2).mean()


def of_random_parts(seed):
    """Point-by-point ops, statistics and products of the batch and of parameters."""
    choose = np.random.default_rng(seed)
    plan = choose.random(64).tolist()

    def loss(p, x):
        numbers = iter(plan)

        def one_of(some):
            return some[int(next(numbers) * len(some))]

        rows, wide, out = [p["a"], p["b"], p["c"]], [x, jnp.abs(x)], []
        kinds = ("shift", "costly", "times", "statistic", "norm", "scale", "add", "mix")
        for _ in range(9):
            kind = one_of((*kinds, "scale", "product"))
            row, value = one_of(rows), one_of(wide)
            if kind == "shift":
                rows.append(1 + row)
            elif kind == "costly":
                rows.append(jnp.exp(row))
            elif kind == "times":
                rows.append(row * one_of(rows))
            elif kind == "statistic":
                rows.append(jax.lax.rsqrt(jnp.square(value).mean(0) + 1))
            elif kind == "norm":
                rows.append((row - row.mean()) / (1 + jnp.abs(row).sum()))
            elif kind == "scale":
                wide.append(jnp.tanh(value * row + one_of(rows)))
            elif kind == "add":
                wide.append(jnp.tanh(value + one_of(wide)))
            elif kind == "mix":
                wide.append((value @ p["m"]) * row)
            else:
                out.append(value @ one_of((p["w"], p["z"])))
        return (sum(out, wide[-1] @ p["w"]) ** 2).mean()

    return loss


ROW = (512,)
WIDE = {"w": (512, 8), "z": (512, 8), "a": ROW, "b": ROW}
BLOCKS = {"w": (512, 64), "z": (512, 64), "v": (64, 512), "y": (64, 512)}
SQUARE = (1024, 1024)
RECURRENT = {"h": (2048, 1024), "w": SQUARE, "u": SQUARE, "v": (1024, 8)}
STACKED = {"g": (4, 512), "m": (4, 512, 512), "e": (4, 512), "l": (4, 512)}
RANDOM = range(12)
CASES = [
    (gram, {"w": (LARGE, 16)}, (64, LARGE)),
    (in_two_halves, {"s": (LARGE, 20)}, (8, LARGE)),
    (scaled_twice, WIDE, (ROWS, 512)),
    (exponential_scale, WIDE, (ROWS, 512)),
    (residual, BLOCKS, (64, 512)),
    (batch_norm, WIDE, (ROWS, 512)),
    (batch_norms_in_a_loop, {**STACKED, "w": (512, 8)}, (ROWS, 512)),
    (queue, {"q": (4096, 8192)}, (4096, 8192)),
    (written_over, {"q": (4096, 8192)}, (1024, 8192)),
    (carried, RECURRENT, (2048, 16, 1024)),
    (carried_statistics, WIDE, (2**16, 4, 2, 512)),
    (one_for_each_example, {"m": (8192, 1024), "w": SQUARE}, (8192, 1024)),
]


@pytest.mark.parametrize(("loss", "shapes", "batch"), CASES, ids=lambda x: str(x)[:20])
def test_no_storage_is_below_the_bound_of_another(loss, shapes, batch):
    assert tight_bounds(loss, shapes, batch)


@pytest.mark.parametrize(
    "seed",
    [
        *RANDOM,
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in range(300)
            if s not in RANDOM
        ),
    ],
)
def test_of_random_programs_neither(seed):
    shapes = {**WIDE, "c": ROW, "m": (512, 512)}
    tight_bounds(of_random_parts(seed), shapes, (ROWS, 512))


def tight_bounds(loss, shapes, batch):
    """Holds all bounds against all prices; gives how many come close."""

    def marked(p, x):
        return loss(p, annotate(x, "batch", *[None] * (x.ndim - 1)))

    def init(key):
        return {name: jax.random.normal(key, shape) for name, shape in shapes.items()}

    step = train_step(marked, optax.adam(1e-3), model=init)
    data = jax.ShapeDtypeStruct(batch, jnp.float32)
    traced = trace(step, (step.abstract_state(), data))
    classes = find_classes(traced)
    work = analyse(traced, classes)
    rules = {
        "batch": ("data", "fsdp"),
        "embed.residual": ("context",),
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
        kernels = other.timing.kernels(meshes, cuts)
        computed = (kernels.matmul + kernels.other - kernels.update).sum(axis=0)
        assert (known[2:].sum(axis=0) <= computed * (1 + 1e-12)).all()
        bounds, taken = products(first), products(other)
        assert bounds.keys() == taken.keys()
        for op, own in bounds.items():
            assert (own[0] <= taken[op][1] * (1 + 1e-12)).all(), op
        tight += int((found > 0.7 * step_s).sum())
    return tight
