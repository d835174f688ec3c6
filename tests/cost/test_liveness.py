"""Peaks of programs small enough to count on paper, and of chains by brute force."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from propagate.programs import shape

from autoshard.cost import Pricer
from autoshard.cost.collectives import Meshes
from autoshard.cost.work import analyse
from autoshard.ir.annotate import annotate
from autoshard.ir.mesh import AXES
from autoshard.ir.trace import trace
from autoshard.plan.cluster import cluster
from autoshard.plan.sharded import Layout
from autoshard.propagate import find_classes, propagate

H100, V5P = cluster("h100:8"), cluster("v5p:2x2x2")


def peak(fn, args, chips=H100, rules=(), storage=None, **sizes):
    """Bytes at the peak without the arguments."""
    traced = trace(fn, args)
    classes = find_classes(traced)
    layout = Layout(rules=tuple(dict(rules).items()), sizes=sizes, **(storage or {}))
    found = Pricer(propagate(traced, classes, layout), analyse(traced, classes))
    meshes = Meshes(chips, np.array([[sizes.get(axis, 1) for axis in AXES]]))
    _, table = found.liveness.memory(meshes, np.ones(1))
    return table["gradients"][0] + table["activations"][0]


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_of_products_by_brute_force(seed):
    """Of what is made one after another, all that is still to be read is there."""
    rng = np.random.default_rng(seed)
    widths = [int(w) * 8 for w in rng.integers(1, 40, size=7)]
    rows = 16
    kept = int(rng.integers(1, 6))

    def fn(weights, x):
        made = [x]
        for weight in weights:
            made.append(made[-1] @ weight)
        return made[-1].sum() + made[kept].sum()

    weights = [shape(a, b) for a, b in itertools.pairwise(widths)]
    # Result k is read by product k + 1; number `kept` and the last are read at the end.
    sizes = [rows * width * 4 for width in widths[1:]]
    steps = range(len(sizes))
    alive = [
        sum(sizes[k] for k in range(now + 1) if k >= now - 1 or k == kept - 1)
        for now in steps
    ]
    got = peak(fn, [weights, shape(rows, widths[0])])
    assert abs(got - max(alive)) <= 3 * 4  # and the sums, of four bytes each


ROWS, IN, OUT = 128, 256, 512


def test_operands_of_what_is_put_off_outlive_the_loop():
    def fn(weights, x):
        logits = x @ weights["head"]
        back = logits @ weights["back"]
        late = jnp.einsum("ri,ro->io", x, logits)
        body = lambda c, _: (c @ weights["square"], None)  # noqa: E731
        return jax.lax.scan(body, back, None, length=3)[0], late

    weights = {"head": shape(IN, OUT), "back": shape(OUT, IN), "square": shape(IN, IN)}
    got = peak(fn, [weights, shape(ROWS, IN)])
    carried = ROWS * IN * 4
    # In the loop: the logits, what came in, and what goes on; after it the late
    # product's result is there next to the logits and the loop's result.
    loop = ROWS * OUT * 4 + 2 * carried
    after = ROWS * OUT * 4 + carried + IN * OUT * 4
    assert got == max(loop, after)


def test_what_is_fused_keeps_its_operands_until_it_is_read():
    """`sin(a)` is made in the kernel that adds `b`, so `a` is there until then."""

    def fn(weights, x):
        a = x @ weights["up"]
        b = (a @ weights["down"]) @ weights["up"]
        return (jnp.sin(a) + b) @ weights["down"]

    weights = {"up": shape(IN, OUT), "down": shape(OUT, IN)}
    wide, thin = ROWS * OUT * 4, ROWS * IN * 4
    # a, b (whose place the sum takes), and the result of the last product.
    assert peak(fn, [weights, shape(ROWS, IN)]) == max(2 * wide + thin, 2 * wide)


def test_tpus_keep_what_only_products_read_in_half_the_bytes():
    def fn(weight, x):
        return jnp.sin(x) @ weight

    args = [shape(IN, OUT), shape(ROWS, IN)]
    operand, result = ROWS * IN * 4, ROWS * OUT * 4
    assert peak(fn, args, H100) == operand + result
    assert peak(fn, args, V5P) == operand / 2 + result


def test_tpus_fill_tiles():
    def fn(weight, x):
        return x @ weight

    # [3, 100] takes a tile of 4 rows by 128 lanes.
    got = peak(fn, [shape(64, 100), shape(3, 64)], V5P)
    assert got == pytest.approx(4 * 128 * 4)


def test_gpus_pad_an_odd_sum_that_is_split():
    def fn(weight, x):
        return x @ weight

    def got(rows, inner, chips=H100):
        return peak(fn, [shape(inner, OUT), shape(rows, inner)], chips)

    result, operands = ROWS * OUT * 4, (ROWS + OUT) * 4
    assert got(ROWS, 256) == result
    assert got(ROWS, 257) == result + operands * 257
    # A result of 2^21 elements is work enough for all cores.
    assert got(4096, 257) == 4096 * OUT * 4


def test_a_partial_sum_is_there_while_the_next_product_runs():
    """Its pieces are scattered beside that product."""

    def fn(weights, x):
        first = annotate(x @ weights["a"], "rows", None)
        return first.sum() + (x @ weights["b"]).sum()

    weights = {"a": shape(IN, OUT), "b": shape(IN, OUT)}

    def fn_sharded(weights, x):
        return fn(weights, annotate(x, None, "inner"))

    rules = {"inner": ("tensor",), "rows": ("tensor",)}
    got = peak(fn_sharded, [weights, shape(ROWS, IN)], rules=rules, tensor=4)
    result = ROWS * OUT * 4
    part = ROWS * IN * 4 / 4
    # What each device takes of x, the first partial sum, its piece, the sum of that,
    # and the second partial sum.
    assert got == part + result + result / 4 + 4 + result
