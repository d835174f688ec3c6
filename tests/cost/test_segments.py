"""Where the parts of a program belong, against what is known of the models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autoshard as ash
from autoshard import api
from autoshard.cost.segments import ALL, BLOCK, BOTH, EMBED, HEAD
from autoshard.plan.schema import ModelRef
from autoshard.search.reading import Sketch

BATCH, SEQ = 8, 32


def of_model(name, remat="none"):
    ref = ModelRef(
        model=name, batch=BATCH, seq=SEQ, optimizer="adamw", learning_rate=1e-3,
        dtype="bf16",
    )  # fmt: skip
    resolved = api.resolve(ref)
    step = resolved.step.with_schedule(microbatches=1, remat=remat)
    return Sketch.of(step, (resolved.batch,), api.load_strategy("auto"))


def place_of(sketch):
    places = sketch.shallow.work.segments.of_value
    inputs = zip(
        sketch.shallow.traced.program.inputs, sketch.shallow.traced.inputs, strict=True
    )
    return {info.path: int(places[v]) for v, info in inputs}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_state_belongs_where_its_parameter_is_used(remat):
    sketch = of_model("llama3-tiny", remat)
    place = place_of(sketch)
    for state in ("params", "opt_state/0/mu", "opt_state/0/nu"):
        assert place[f"{state}/embedding"] == EMBED
        assert place[f"{state}/head"] == HEAD
        assert place[f"{state}/final_norm/scale"] == HEAD
        in_blocks = [p for p in place if p.startswith(f"{state}/blocks/")]
        assert in_blocks
        assert {place[p] for p in in_blocks} == {BLOCK}
    assert place["batch/tokens"] == place["step"] == ALL


@pytest.mark.parametrize("remat", ["none", "full"])
def test_tied_tables_are_at_both_ends(remat):
    place = place_of(of_model("gpt2-tiny", remat))
    assert place["params/embedding"] == BOTH
    assert place["opt_state/0/mu/embedding"] == BOTH
    assert place["params/positions"] == EMBED
    assert place["params/final_norm/scale"] == HEAD


@pytest.mark.parametrize("remat", ["none", "full"])
def test_products_of_the_head_are_those_of_its_matrix(remat):
    sketch = of_model("llama3-tiny", remat)
    program, work = sketch.shallow.traced.program, sketch.shallow.work
    shapes = {i.path: i.shape for i in sketch.traced.inputs}
    found = dict.fromkeys((BLOCK, EMBED, HEAD, BOTH, ALL), 0.0)
    for op, rule in zip(program.ops, sketch.shallow.classes.rules, strict=True):
        if rule.op_kind == "matmul":
            flops = work.runs[op.index] * work.flops[op.index]
            found[int(work.segments.of_op[op.index])] += flops
    # Forward, and the gradients of its operand and of itself.
    assert found[HEAD] == 3 * 2 * BATCH * SEQ * np.prod(shapes["params/head"])
    assert found[EMBED] == found[BOTH] == found[ALL] == 0
    assert found[BLOCK] > 0


def test_what_is_handed_on_is_the_residual():
    sketch = of_model("llama3-tiny")
    (sent,) = sketch.shallow.work.segments.sent
    value = sketch.shallow.traced.program.values[sent]
    width = next(
        i.shape[1] for i in sketch.traced.inputs if i.path == "params/embedding"
    )
    assert value.shape == (BATCH, SEQ, width)


def test_full_remat_stashes_one_residual_a_block():
    sketch = of_model("llama3-tiny", "full")
    values, segments = (
        sketch.shallow.traced.program.values,
        sketch.shallow.work.segments,
    )
    (sent,) = segments.sent
    kept = [values[v].shape for v in segments.stashed if segments.of_value[v] == BLOCK]
    assert kept == [(segments.blocks, *values[sent].shape)]


def scanned(*depths):
    def loss(params, x):
        for stack in params:
            x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]
        return (x**2).mean()

    return ash.train_step(
        loss, optax.sgd(0.1), model=lambda key: [jnp.ones((n, 8, 8)) for n in depths]
    )


@pytest.mark.parametrize(
    ("depths", "blocks", "why"),
    [((6,), 6, ""), ((1,), 1, "no block repeats"), ((3, 5), 1, "loops of 3 and 5")],
)
def test_why_a_program_cannot_be_cut(depths, blocks, why):
    batch = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    sketch = Sketch.of(scanned(*depths), (batch,), api.load_strategy("auto"))
    found = sketch.shallow.work.segments
    assert found.blocks == blocks
    assert why in found.why if why else not found.why
