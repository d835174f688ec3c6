"""Kernels of programs small enough to be fused on paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from cost.test_price import pricer
from propagate.programs import shape

from autoshard.ir.mesh import AXES
from autoshard.ir.train_step import train_step


def everywhere(found):
    """The kernels where all axes have several devices."""
    return found.compute.kernels(frozenset(AXES))


def fused(fn, *args):
    """Per kernel: its kind, and the shapes it reads and writes."""
    found = pricer(fn, args)
    values = found.program.values

    def shapes(of):
        return sorted(values[v].shape for v in of)

    return [(k.kind, shapes(k.reads), shapes(k.writes)) for k in everywhere(found)]


def test_a_chain_of_pointwise_ops_is_one_loop():
    got = fused(lambda x, y: jnp.exp(x * 2) + y, shape(8, 4), shape(8, 4))
    assert got == [("loop", [(8, 4), (8, 4)], [(8, 4)])]


def test_a_literal_behind_a_barrier_is_not_read():
    def fn(x):
        x, two = jax.lax.optimization_barrier((x, 2.0))
        return x * two

    assert fused(fn, shape(8, 4)) == [("loop", [(8, 4)], [(8, 4)])]


def test_what_follows_a_product_runs_in_its_kernel():
    got = fused(lambda w, x, b: jnp.tanh(x @ w + b), shape(4, 6), shape(8, 4), shape(6))
    assert got == [("product", [(4, 6), (6,), (8, 4)], [(8, 6)])]


def test_cheap_ops_before_a_product_run_in_its_kernel_and_costly_ones_do_not():
    assert fused(lambda w, x: (x * 2) @ w, shape(4, 6), shape(8, 4)) == [
        ("product", [(4, 6), (8, 4)], [(8, 6)])
    ]
    assert fused(lambda w, x: jnp.exp(x) @ w, shape(4, 6), shape(8, 4)) == [
        ("loop", [(8, 4)], [(8, 4)]),
        ("product", [(4, 6), (8, 4)], [(8, 6)]),
    ]


def test_a_reduction_of_a_product_runs_in_its_kernel():
    def fn(w, x):
        y = x @ w
        return y, y.max(axis=1)

    assert fused(fn, shape(4, 6), shape(8, 4)) == [
        ("product", [(4, 6), (8, 4)], [(8,), (8, 6)])
    ]


def test_a_softmax_passes_three_times_over_its_scores():
    def fn(x):
        weights = jnp.exp(x - x.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    # Exponents are made twice rather than written.
    assert fused(fn, shape(8, 4)) == [
        ("reduce", [(8, 4)], [(8,)]),
        ("reduce", [(8,), (8, 4)], [(8,)]),
        ("loop", [(8,), (8,), (8, 4)], [(8, 4)]),
    ]


def test_an_update_reads_and_writes_each_state_once():
    def loss(weight, x):
        return (x @ weight).sum()

    step = train_step(loss, optax.adam(0.1), model=lambda key: jnp.zeros((4, 6)))
    found = pricer(step, [shape(8, 4)])
    program = found.sharded.traced.program
    (kernel,) = [
        kernel
        for kernel in everywhere(found)
        if kernel.kind == "loop"
        and found.work.update[kernel.op]
        and program.values[kernel.space].shape == (4, 6)
    ]
    whole = [
        [v for v in of if program.values[v].shape]
        for of in (kernel.reads, kernel.writes)
    ]
    # Gradient, weight and two moments; weight and two moments.
    assert [len(of) for of in whole] == [4, 3]


def test_a_table_of_zeros_is_written_before_rows_are_added_to_it():
    def fn(rows, index):
        return jnp.zeros((16, 4)).at[index].add(rows)

    got = fused(fn, shape(8, 4), shape(8, dtype=jnp.int32))
    assert ("loop", [], [(16, 4)]) in got


def test_state_that_lies_across_its_gradient_is_copied_there_and_back():
    # JAX writes the gradient of the right operand of a product as a product with the
    # columns first, which it then turns; of a turned operand it turns it twice.
    def copies(loss):
        step = train_step(loss, optax.sgd(0.1), model=lambda key: jnp.zeros((64, 32)))
        found = pricer(step, [shape(16, 64)])
        return sum(kernel.kind == "copy" for kernel in everywhere(found))

    def turned(w, batch):
        return ((batch[:, :32] @ w.T) ** 2).sum()

    assert copies(lambda w, batch: ((batch @ w) ** 2).sum()) == 2
    assert copies(turned) == 0
