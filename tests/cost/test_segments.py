"""Where the parts of a program belong, against what is known of the models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autoshard as ash
from autoshard import api, models
from autoshard.cost import Pricer
from autoshard.cost.collectives import Meshes
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.segments import ALL, BLOCK, BOTH, EMBED, HEAD
from autoshard.ir.mesh import AXES
from autoshard.plan.schema import ModelRef
from autoshard.plan.sharded import Layout
from autoshard.propagate import propagate
from autoshard.search import space
from autoshard.search.pinning import with_pins
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


# -- blocks that are copies of one another, against the same in a loop ----------------


def decoder(name, layers, remat, *, scan, whole=False):
    config = dataclasses.replace(models.get(name), layers=layers, scan_layers=scan)
    step = ash.train_step(
        models.next_token_loss,
        optax.adamw(1e-3),
        model=lambda rngs: models.build(config, rngs),
    ).with_schedule(microbatches=1, remat=remat)
    leaf = jax.ShapeDtypeStruct((BATCH, SEQ), jnp.int32)
    batch = {"tokens": leaf, "targets": leaf}
    read = Sketch.of_whole if whole else Sketch.of
    return read(step, (batch,), api.load_strategy("auto")).shallow


def totals(shallow):
    """Work of products, what is kept for the backward pass, state: by place."""
    program, work = shallow.traced.program, shallow.work
    places, values = work.segments, program.values
    flops, kept, state = np.zeros((3, 5))
    for op, rule in zip(program.ops, shallow.classes.rules, strict=True):
        if rule.op_kind == "matmul":
            flops[places.of_op[op.index]] += work.runs[op.index] * work.flops[op.index]
    for v in places.stashed:
        if work.materialised[v]:
            kept[places.of_value[v]] += values[v].bytes_ * work.alike[v]
    for v in program.inputs:
        state[places.of_value[v]] += values[v].bytes_ * work.alike[v]
    sent = [values[v].shape for v in places.sent]
    return places.blocks, sent, flops, kept[BLOCK], state


@pytest.mark.parametrize(
    ("name", "layers", "remat", "whole"),
    [
        ("llama3-tiny", 4, "none", False),
        ("llama3-tiny", 4, "full", False),
        ("gpt2-tiny", 5, "dots", False),
        # Few of many copies are traced, or all of them and then left out.
        ("llama3-tiny", 30, "full", False),
        ("gpt2-tiny", 30, "none", True),
    ],
)
def test_copies_of_blocks_are_cut_like_the_runs_of_a_loop(name, layers, remat, whole):
    loop = totals(decoder(name, layers, remat, scan=True))
    copies = totals(decoder(name, layers, remat, scan=False, whole=whole))
    assert loop[:2] == copies[:2]
    assert loop[0] == layers
    (flops, kept, state), (own_flops, own_kept, own_state) = loop[2:], copies[2:]
    np.testing.assert_array_equal(own_flops, flops)
    np.testing.assert_array_equal(own_state, state)
    # A loop stacks of all runs what copies do not keep of the first or last one.
    np.testing.assert_allclose(own_kept, kept, rtol=0.005)


def first_layout(left):
    """The program with the first rules and storage that are tried."""
    pins = {"rules.vocab": "none", "rules.seq.residual": "none"}
    strategy = with_pins(api.load_strategy("auto"), pins)
    layout = Layout.of(next(space.structures(strategy)))
    return Pricer(propagate(left.traced, left.classes, layout), left.work)


@pytest.mark.parametrize("kind", ["params", "optimizer", "activations"])
@pytest.mark.parametrize("layers", [4, 30])
def test_of_copies_the_same_is_offloaded_as_of_a_loop(kind, layers):
    one = Meshes(api.cluster("h100:8"), np.ones((1, len(AXES)), dtype=np.int64))
    loop, copies = (
        first_layout(decoder("llama3-tiny", layers, "full", scan=scan)).liveness
        for scan in (True, False)
    )
    held = [own.held(kind, one, np.ones(1)) for own in (loop, copies)]
    passes = () if kind == "activations" else ("forward", "backward")
    for name in ("bytes_", "of_block", "largest", *passes):
        ours, theirs = (getattr(own, name) for own in held)
        np.testing.assert_allclose(theirs, ours, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("cuts", [1, 8])
def test_stages_of_copies_cost_what_those_of_a_loop_do(stages, cuts):
    """They do the same work, but a loop slices and stacks what copies have at hand."""
    found = []
    for scan in (True, False):
        pricer = first_layout(decoder("llama3-tiny", 4, "none", scan=scan))
        one = np.ones((1, len(AXES)), dtype=np.int64)
        several = np.where(np.array(AXES) == "stage", stages, one)
        chips, pieces = api.cluster("h100:8"), np.full(1, float(cuts))
        (cut,) = pricer.price_stages(chips, several, pieces, [Pipeline("1f1b")])
        found.append((cut, pricer.price(chips, one, pieces)))
    (loop, whole_loop), (copies, whole_copies) = found
    assert copies.cut.blocks_of(0, 4, stages) == loop.cut.blocks_of(0, 4, stages)
    np.testing.assert_allclose(copies.matmul_s, loop.matmul_s, rtol=0.1)
    np.testing.assert_allclose(copies.step_s, loop.step_s, rtol=0.15)
    shares = [
        (own.peak_bytes / whole.peak_bytes).item()
        for own, whole in ((copies, whole_copies), (loop, whole_loop))
    ]
    assert shares[0] == pytest.approx(shares[1], rel=0.15)


def chained(kinds):
    """A loss of blocks one after the other, of several kinds."""

    def block(kind, w, x):
        return jnp.tanh(x @ w) if kind == "a" else x + jnp.sin(x @ w) @ w.T

    def loss(params, x):
        first, *blocks = params
        x = x @ first
        for kind, w in zip(kinds, blocks, strict=True):
            x = block(kind, w, x)
        return (x**2).mean()

    return ash.train_step(
        loss, optax.sgd(0.1), model=lambda key: [jnp.ones((8, 8)) for _ in "x" + kinds]
    )


@pytest.mark.parametrize(
    ("kinds", "blocks", "why"),
    [
        ("aaaaaa", 6, ""),
        ("abababab", 4, ""),  # every other layer is another: pairs are cut
        ("ab", 1, "no block repeats"),
        ("aaaabbbbbb", 1, "repeat 4 and 5 and 6 times"),
    ],
)
def test_copies_of_several_kinds(kinds, blocks, why):
    batch = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    sketch = Sketch.of(chained(kinds), (batch,), api.load_strategy("auto"))
    found = sketch.shallow.work.segments
    assert found.blocks == blocks
    assert why in found.why if why else not found.why


def of_loss(loss, blocks=6):
    def model(key):
        block = {
            "scale": jnp.ones(8),
            "up": jnp.ones((8, 16)),
            "down": jnp.ones((16, 8)),
        }
        return {"first": jnp.ones((2, 8)), "blocks": [block] * blocks}

    step = ash.train_step(loss, optax.sgd(0.1), model=model)
    batch = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    return Sketch.of(step, (batch,), api.load_strategy("auto")).shallow


def run(params, x):
    x = x * params["first"][0] + params["first"][1]
    for w in params["blocks"]:
        x = x + jnp.tanh((x * w["scale"]) @ w["up"]) @ w["down"]
    return x


def test_what_is_made_of_the_weights_of_a_block_goes_with_it():
    def loss(params, x):
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        x = run(params, x.astype(jnp.bfloat16))
        return (x**2).mean().astype(jnp.float32)

    found = of_loss(loss)
    assert found.work.segments.blocks == 6
    # Before the passes, and the gradients after them; `first` has one, and goes first.
    program, places = found.traced.program, found.work.segments.of_op
    shapes = {(8,): BLOCK, (8, 16): BLOCK, (16, 8): BLOCK, (2, 8): EMBED}
    of = {}
    for op in program.ops:
        shape = program.values[op.outputs[0]].shape if op.outputs else None
        converts = op.primitive == "convert_element_type" and shape in shapes
        if converts and not found.work.update[op.index]:
            of.setdefault(shape, []).append(int(places[op.index]))
    assert of == {
        shape: [place] * (12 if place == BLOCK else 2)
        for shape, place in shapes.items()
    }


def test_a_term_for_the_weights_is_no_block():
    def loss(params, x):
        decay = sum((w["up"] ** 2).sum() for w in params["blocks"])
        return (run(params, x) ** 2).mean() + 1e-3 * decay

    segments = of_loss(loss).work.segments
    # Of the first one gradients come with what goes before.
    assert (segments.blocks, segments.why) == (5, "")


def test_gradients_of_what_comes_first_belong_there():
    found = of_loss(lambda params, x: (run(params, x) ** 2).mean())
    program, places = found.traced.program, found.work.segments
    of = [
        int(places.of_op[op.index])
        for op in program.ops
        if op.primitive == "autoshard_annotate" and op.params["role"] == "gradient"
    ]
    assert sorted(of) == [*[BLOCK] * 18, EMBED]


def test_an_update_in_a_loop_is_no_stack_of_blocks():
    def updates(grads, state, params=None):
        return jax.tree.map(lambda g: jax.lax.map(lambda x: -0.1 * x, g), grads), state

    optimizer = optax.GradientTransformation(lambda params: (), updates)

    def loss(params, x):
        return (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]).sum()

    step = ash.train_step(loss, optimizer, model=lambda key: jnp.ones((6, 8, 8)))
    batch = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    left = Sketch.of(step, (batch,), api.load_strategy("auto")).shallow
    segments = left.work.segments
    assert (segments.blocks, segments.why) == (6, "")
    assert any(segments.of_value[v] == BLOCK for v in segments.stashed)


def of_function(fn, *args):
    return Sketch.of_whole(fn, args, api.load_strategy("auto")).shallow.work.segments


def test_blocks_with_the_same_weights_are_not_cut():
    def shared(w, x):
        for _ in range(8):
            x = jnp.tanh(x @ w)
        return x

    segments = of_function(shared, jnp.ones((8, 8)), jnp.ones((4, 8)))
    assert segments.blocks == 1


def test_copies_within_a_loop_are_no_blocks():
    def looped(ws, x):
        def body(x, _):
            for w in ws:
                x = jnp.tanh(x @ w)
            return x, None

        return jax.lax.scan(body, x, None, length=4)[0]

    segments = of_function(looped, [jnp.ones((8, 8))] * 6, jnp.ones((4, 8)))
    assert segments.blocks == 1


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
    [
        ((6,), 6, ""),
        ((1,), 1, "no block repeats"),
        ((3, 5), 1, "loops of 3 and 5"),
        ((4, 4), 1, "2 stacks of 4 blocks"),  # an encoder and a decoder
    ],
)
def test_why_a_program_cannot_be_cut(depths, blocks, why):
    batch = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    sketch = Sketch.of(scanned(*depths), (batch,), api.load_strategy("auto"))
    found = sketch.shallow.work.segments
    assert found.blocks == blocks
    assert why in found.why if why else not found.why
