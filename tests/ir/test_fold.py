"""Folding: a deep program becomes the one that fewer layers would have given."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.unrolled import BATCH, HIDDEN, ROWS, WIDTH, block, layer_of, step_of

from autoshard.ir.annotations.paths import with_specs
from autoshard.ir.fold import fold
from autoshard.ir.trace import trace


def traced(layers, remat="none", **kwargs):
    step = step_of(layers, **kwargs).with_schedule(microbatches=1, remat=remat)
    return trace(step, (BATCH,))


def folded(program):
    return fold(program, [0] * len(program.program.values))


def wiring(traced_):
    """All of a program but names and where it was written."""
    program = traced_.program
    return {
        "values": [(v.shape, v.dtype, v.producer, v.region) for v in program.values],
        "ops": [(op.primitive, op.inputs, op.outputs, op.region) for op in program.ops],
        "inputs": program.inputs,
        "outputs": program.outputs,
        "infos": [(i.shape, i.dtype, i.state) for i in traced_.inputs],
        "out_source": traced_.out_source,
    }


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    "optimizer", [optax.adamw(1e-3), optax.sgd(0.1, momentum=0.9), optax.lion(1e-3)]
)
def test_what_is_left_is_the_program_of_fewer_layers(remat, optimizer):
    make = partial(traced, remat=remat, optimizer=optimizer)
    deep = folded(make({k: layer_of() for k in range(12)}))
    names = {
        int(i.path.split("/")[2])
        for i in deep.traced.inputs
        if i.path.startswith("params/blocks")
    }
    assert len(names) < 8
    assert {0, 11} < names
    assert wiring(deep.traced) == wiring(make({k: layer_of() for k in sorted(names)}))


def test_names_may_sort_otherwise_than_the_layers_run():
    """`layer_10` comes before `layer_2`, but runs after it."""
    layers = {f"layer_{k}": layer_of() for k in range(13)}
    deep = folded(traced(layers))
    names = {
        i.path.split("/")[2]
        for i in deep.traced.inputs
        if i.path.startswith("params/blocks")
    }
    few = {name: layer_of() for name in layers if name in names}
    assert len(few) < 12
    assert wiring(deep.traced) == wiring(traced(few))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_every_op_and_value_is_stood_for_once(remat):
    deep = traced({k: layer_of() for k in range(14)}, remat)
    found = folded(deep)
    assert sum(found.alike_ops) == len(deep.program.ops)
    assert sum(found.alike) == len(deep.program.values)
    for k, op in enumerate(found.traced.program.ops):
        was = deep.program.ops[found.ops[k]]
        assert (op.primitive, op.address) == (was.primitive, was.address)


def test_more_layers_are_no_more_ops():
    few, many = (folded(traced({k: layer_of() for k in range(n)})) for n in (12, 40))
    assert len(few.traced.program.ops) == len(many.traced.program.ops)
    assert max(many.alike) == max(few.alike) + 28


def test_layers_that_take_turns_are_folded_two_by_two():
    def either(layer, x):
        return (
            jnp.sin(block(layer, x)) if layer["up"].shape[1] == 48 else block(layer, x)
        )

    layers = {k: layer_of(48 if k % 2 else HIDDEN) for k in range(20)}
    found = folded(traced(layers, run=either))
    shapes = {
        v.shape
        for v, alike in zip(found.traced.program.values, found.alike, strict=True)
        if alike > 1
    }
    assert {(WIDTH, 48), (WIDTH, HIDDEN)} <= shapes
    assert sum(found.alike_ops) == len(traced(layers, run=either).program.ops)


def unchanged(program, marks=None):
    return fold(program, marks or [0] * len(program.program.values)).traced is program


def test_a_layer_of_another_width_keeps_its_difference():
    layers = {k: layer_of(40 if k == 6 else HIDDEN) for k in range(13)}
    program = traced(layers)
    found = folded(program)
    odd = [v for v in found.traced.program.values if v.shape == (WIDTH, 40)]
    assert len(odd) == len(
        [v for v in program.program.values if v.shape == odd[0].shape]
    )
    assert sum(found.alike_ops) == len(program.program.ops)


def test_few_layers_are_left_as_they_are():
    assert unchanged(traced({k: layer_of() for k in range(4)}))


def test_copies_that_something_else_reads_are_left_as_they_are():
    def fn(ws, x):
        kept = []
        for w in ws:
            x = jnp.tanh(x @ w)
            kept.append(x)
        return jnp.concatenate(kept)

    w = jnp.ones((WIDTH, WIDTH))
    program = trace(fn, ([w] * 12, jnp.ones((ROWS, WIDTH))))
    assert program.blocks.chains
    assert unchanged(program)


def test_a_loop_is_left_as_it_is():
    def fn(ws, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, ws)[0]

    assert unchanged(trace(fn, (jnp.ones((12, WIDTH, WIDTH)), jnp.ones((ROWS, WIDTH)))))


def test_copies_that_are_marked_otherwise_are_left_as_they_are():
    program = traced({k: layer_of() for k in range(12)})
    assert not unchanged(program)
    for k, info in enumerate(program.inputs):
        if info.path == "params/blocks/5/up":
            marks = [0] * len(program.program.values)
            marks[program.program.inputs[k]] = 1
            assert unchanged(program, marks)


def test_a_layer_that_the_user_rematerialises_keeps_its_difference():
    """Its forward pass is that of the others."""

    def loss(ws, x):
        for k, w in enumerate(ws):
            run = jax.checkpoint(block) if k == 6 else block
            x = run(w, x)
        return (x**2).mean()

    args = [layer_of() for _ in range(14)], jnp.ones((ROWS, WIDTH))
    program = trace(jax.grad(loss), args)
    again = [op for op in program.program.ops if "rematted" in op.scope]
    found = folded(program)
    assert again
    left = [
        k for k, op in enumerate(found.traced.program.ops) if "rematted" in op.scope
    ]
    assert len(left) == len(again)
    assert {found.alike_ops[k] for k in left} == {1}


def test_seeds_of_kept_inputs_stay():
    program = with_specs(
        traced({k: layer_of() for k in range(12)}), {r"blocks/\d+/up$": ["", "tensor"]}
    )
    found = folded(program)
    paths = dict(zip(found.traced.program.inputs, found.traced.inputs, strict=True))
    assert {s.value for s in found.traced.seeds} == {
        v for v, info in paths.items() if info.path.endswith("/up")
    }
