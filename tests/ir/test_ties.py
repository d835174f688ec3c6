"""Repeated blocks: what is tied is the same, and what repeats is found."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fuzz.laws import reordered
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from autoshard.ir.program import build
from autoshard.ir.ties import find_blocks
from autoshard.ir.trace import trace
from autoshard.ir.train_step import train_step
from autoshard.models import decoder, loss, registry

TOKENS = {
    name: jax.ShapeDtypeStruct((4, 16), jnp.int32) for name in ("tokens", "targets")
}


def program_of(fn, *args):
    jaxpr = jax.make_jaxpr(fn)(*args)
    return build(jaxpr, [f"in{k}" for k in range(len(jax.tree.leaves(args)))])


def step_program(loss_fn, params, batch, optimizer=None):
    step = train_step(loss_fn, optimizer or optax.adamw(1e-3), model=lambda key: params)
    return trace(step, [batch]).program


def decoder_program(name, layers, *, scan=False, microbatches=1, remat="none"):
    config = replace(registry.get(name), layers=layers, scan_layers=scan)
    step = train_step(
        loss.next_token_loss,
        optax.adamw(1e-3),
        model=lambda rngs: decoder.build(config, rngs),
    ).with_schedule(microbatches=microbatches, remat=remat)
    return trace(step, [TOKENS]).program


def signature(program, op):
    """What two ops must have in common, written out."""
    params = {
        key: value
        for key, value in op.params.items()
        if key not in ("start_indices", "limit_indices", "path", "_operand_shapes")
        and not hasattr(value, "eqns")
    }

    def types(values):
        return [
            None if v < 0 else (program.values[v].shape, str(program.values[v].dtype))
            for v in values
        ]

    return (
        op.primitive,
        sorted((key, str(value)) for key, value in params.items()),
        types(op.inputs),
        types(op.outputs),
        op.operand_shapes,
        program.regions[op.region].trips,
    )


def consumers(program):
    """Per value, by whom and in which slot it is consumed."""
    found = {}
    for op in program.ops:
        for slot, value in enumerate(op.inputs):
            use = (op.primitive, slot, program.values[op.outputs[0]].shape)
            found.setdefault(value, Counter())[use] += 1
    for value in program.outputs:
        found.setdefault(value, Counter())["result"] += 1
    return found


def passed_on(program, blocks):
    """What stands for the values that a copy takes from the copy before."""
    found = set()
    for repeat in blocks.repeats:
        if repeat.kind == "unrolled":
            for op in program.ops[repeat.start : repeat.start + repeat.ops]:
                for v in op.inputs:
                    made = program.values[v].producer if v >= 0 else -1
                    copies = [
                        (i - repeat.start) // repeat.period for i in (made, op.index)
                    ]
                    if made >= repeat.start and copies[0] + 1 == copies[1]:
                        found.add(int(blocks.tied_values[v]))
    return found


def assert_sound(program, blocks):
    """Every tie holds, checked op by op.

    With its operands tied to the representative's, op after op, a tied op computes from
    the same graph as its representative, however far one looks back, up to seams. A
    seam is excused by a chain alone: one of the two operands is passed on from copy to
    copy, the other one is what the first or last copy has in place of that. (Or both
    are inputs, which something untied uses, too.)
    """
    represent, tied = blocks.representative, blocks.tied_values
    assert represent.shape == (len(program.ops),)
    assert tied.shape == (len(program.values),)
    assert (represent <= np.arange(len(program.ops))).all()
    assert (represent[represent] == represent).all()
    assert (tied[tied] == tied).all()
    used, read = consumers(program), {}
    for op in program.ops:
        for slot, v in enumerate(op.inputs):
            read.setdefault(v, Counter())[int(represent[op.index]), slot] += 1
    seams = set(blocks.seams.tolist())
    covered = np.zeros(len(program.ops), dtype=bool)
    last = np.zeros(len(program.ops), dtype=bool)
    for repeat in blocks.repeats:
        if repeat.kind == "unrolled":
            end = repeat.start + repeat.ops
            assert not covered[repeat.start : end].any()
            covered[repeat.start : end] = last[end - repeat.period : end] = True
    passed = passed_on(program, blocks)
    for op in program.ops:
        twin = program.ops[represent[op.index]]
        if twin is op:
            assert op.index not in seams
            continue
        assert signature(program, op) == signature(program, twin)
        assert [tied[v] for v in op.outputs] == list(twin.outputs)
        same = [
            v == w or (v >= 0 and w >= 0 and tied[v] == tied[w])
            for v, w in zip(op.inputs, twin.inputs, strict=True)
        ]
        assert all(same) == (op.index not in seams)
        for ok, v, w in zip(same, op.inputs, twin.inputs, strict=True):
            if not ok and {tied[v], tied[w]}.isdisjoint(passed):
                assert program.values[v].producer < 0
                assert program.values[w].producer < 0
    for value in program.values:
        other = program.values[tied[value.index]]
        assert (value.shape, value.dtype) == (other.shape, other.dtype)
        if value.index != other.index:
            made, by = value.producer, other.producer
            if made >= 0 and covered[made]:
                assert represent[made] == represent[by] == by
            else:
                assert read.get(value.index) == read.get(other.index)
            # What uses a value decides on it, too. The last copy may feed another.
            if made < 0 or not last[made]:
                assert used.get(value.index) == used.get(other.index)


def layers_of(program, blocks, primitive):
    """Copies of the repeats that hold a primitive, by position."""
    return [
        repeat.count
        for repeat in blocks.repeats
        if repeat.kind == "unrolled"
        and any(
            op.primitive == primitive
            for op in program.ops[repeat.start : repeat.start + repeat.period]
        )
    ]


# -- whole models ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama3-tiny"])
@pytest.mark.parametrize("layers", [2, 5])
def test_every_layer_forward_backward_and_update(name, layers):
    program = decoder_program(name, layers)
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    # Matrix products stand in the forward and in the backward repeat, and only there.
    assert layers_of(program, blocks, "dot_general") == [layers, layers]
    forward, backward = (
        r
        for r in blocks.repeats
        if any(
            op.primitive == "dot_general"
            for op in program.ops[r.start : r.start + r.period]
        )
    )
    assert forward.start + forward.ops <= backward.start
    assert "layers.py" in forward.source
    # Every leaf of every layer has one square root in AdamW.
    [leaves] = [
        r
        for r in blocks.repeats
        if r.period > 9
        and any(
            op.primitive == "sqrt" for op in program.ops[r.start : r.start + r.period]
        )
    ]
    assert leaves.count == layers
    # All leaves of a layer stand for those of the other layers.
    for value, path in zip(program.inputs, program.input_paths, strict=True):
        if "/blocks/" in path:
            head, _, rest = path.partition("/blocks/")
            first = f"{head}/blocks/0/{rest.partition('/')[2]}"
            first = program.input_paths.index(first)
            assert blocks.tied_values[value] == program.inputs[first]
        else:
            assert blocks.tied_values[value] == value


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama3-tiny"])
def test_with_accumulation_and_rematerialised_blocks(name):
    program = decoder_program(name, 4, microbatches=2, remat="full")
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert layers_of(program, blocks, "dot_general") == [4, 4]
    assert [r.count for r in blocks.repeats if r.kind == "scanned"] == [2]


def test_a_scanned_model_is_one_block_already():
    program = decoder_program("llama3-tiny", 4, scan=True)
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert blocks.tied_ops == 0
    forward, backward = blocks.repeats
    assert (forward.kind, forward.count, backward.count) == ("scanned", 4, 4)
    region = program.ops[forward.start].region
    assert forward.ops == sum(op.region == region for op in program.ops)


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama3-tiny"])
def test_one_layer_has_nothing_to_tie(name):
    blocks = find_blocks(decoder_program(name, 1))
    assert blocks.repeats == ()
    assert blocks.tied_ops == 0
    assert len(blocks.seams) == 0


def test_more_layers_leave_as_many_ops_untied():
    few, many = (
        find_blocks(decoder_program("llama3-tiny", layers)) for layers in (3, 9)
    )
    untied = [len(b.representative) - b.tied_ops for b in (few, many)]
    assert untied[0] == untied[1]


def test_float32_chains_whose_saved_inputs_come_from_elsewhere_at_the_ends():
    """Without casts the backward pass reads the residual stream itself."""
    w = [jnp.ones((8, 8)) for _ in range(5)]

    def fn(params, x):
        x = jnp.tanh(x @ params["first"])
        for layer in params["layers"]:
            x = x + jnp.tanh(x @ layer)
        return (x**2).mean()

    program = step_program(
        fn, {"first": w[0], "layers": w}, jnp.ones((4, 8)), optax.sgd(0.1)
    )
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert layers_of(program, blocks, "dot_general") == [5, 5]


def test_layers_sorted_by_name_in_the_update():
    """`layer_10` comes before `layer_2` in the parameters, but not in the model."""
    params = {f"layer_{i}": jnp.ones((8, 8)) for i in range(12)}
    params |= {"embed": jnp.ones((16, 8))}

    def fn(params, tokens):
        x = params["embed"][tokens]
        for i in range(12):
            x = x + jnp.tanh(x @ params[f"layer_{i}"])
        return (x**2).mean()

    program = step_program(fn, params, jnp.zeros((4, 6), jnp.int32))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert layers_of(program, blocks, "dot_general") == [12, 12]
    assert 12 in layers_of(program, blocks, "sqrt")
    stands = {
        path: program.input_paths[program.inputs.index(blocks.tied_values[value])]
        for value, path in zip(program.inputs, program.input_paths, strict=True)
    }
    for path, representative in stands.items():
        if "layer_" in path:
            assert representative == path.rpartition("layer_")[0] + "layer_0"


def test_the_first_layer_needs_no_gradient_of_its_input():
    """So its backward pass is another one, and what is made of that is not tied."""

    def fn(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return (x**2).mean()

    params = [{"w": jnp.ones((8, 8)), "b": jnp.ones(8)} for _ in range(5)]
    program = step_program(fn, params, jnp.ones((4, 8)))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert layers_of(program, blocks, "dot_general") == [4, 4]
    updates = [op.index for op in program.ops if op.primitive == "sqrt"][-10:]
    copies = Counter(blocks.representative[updates].tolist())
    assert sorted(copies.values()) == [1, 1, 4, 4]


def test_local_and_global_layers_in_turns():
    """Every third layer has another mask; the ops are the same, the block is three."""

    def fn(params, x):
        masks = [jnp.tril(jnp.ones((4, 4))), jnp.triu(jnp.ones((4, 4)))]
        for i, w in enumerate(params):
            x = x + (x @ w @ x.T * masks[i % 3 == 2]) @ x
        return x

    program = program_of(fn, [jnp.ones((8, 8))] * 9, jnp.ones((4, 8)))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    [repeat] = [r for r in blocks.repeats if r.kind == "unrolled"]
    assert repeat.count == 3
    assert layers_of(program, blocks, "dot_general") == [3]
    per_block = program.ops[repeat.start : repeat.start + repeat.period]
    assert sum(op.primitive == "dot_general" for op in per_block) == 9


def summed(w, start, rows):
    return jax.lax.scan(lambda c, y: (c + jnp.tanh(y @ w), None), start, rows)[0]


def test_layers_that_hold_a_loop():
    def fn(params, x):
        for w in params:
            x = x + summed(w, x[0], x)
        return x

    program = program_of(fn, [jnp.ones((8, 8))] * 4, jnp.ones((6, 8)))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert layers_of(program, blocks, "dot_general") == [4]
    assert [r.count for r in blocks.repeats if r.kind == "scanned"] == [6] * 4


def test_a_cut_never_goes_through_a_loop():
    """The first layer is odd amid its loop, so its rest has the right length."""

    def fn(params, x, other):
        for i, w in enumerate(params):
            x = x + summed(other @ w if i == 0 else w @ w, x[0], x)
        return x

    program = program_of(fn, [jnp.ones((8, 8))] * 5, jnp.ones((6, 8)), jnp.ones((8, 8)))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    [repeat] = [r for r in blocks.repeats if r.kind == "unrolled"]
    assert repeat.count == 4
    regions = [op.region for op in program.ops]
    for copy in range(repeat.count):
        begin = repeat.start + copy * repeat.period
        assert regions[begin - 1] == 0
        assert regions[begin] == 0


def test_loops_of_other_lengths_are_not_copies():
    def fn(params, x):
        for n, w in enumerate(params):
            x = x + summed(w, x[0], x[: 2 + n % 2])
        return x

    program = program_of(fn, [jnp.ones((8, 8))] * 2, jnp.ones((6, 8)))
    assert find_blocks(program).tied_ops == 0


def test_rows_of_one_stack():
    """Each layer slices its weights out of one array."""

    def fn(w, x):
        for i in range(5):
            x = x + jnp.tanh(x @ w[i])
        return x

    program = program_of(fn, jnp.ones((5, 8, 8)), jnp.ones((4, 8)))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert layers_of(program, blocks, "dot_general") == [5]
    assert layers_of(program, blocks, "slice") == [5]


def test_wider_slices_at_other_places_are_not_copies():
    """A window that begins elsewhere reaches another part of its neighbours."""

    def fn(x):
        for i in range(3):
            x = jnp.tanh(jnp.concatenate([x[i : i + 4], x[i : i + 4]]))
        return x

    assert find_blocks(program_of(fn, jnp.ones((8, 4)))).tied_ops == 0


def test_parallel_experts():
    def fn(experts, x):
        return sum(jnp.tanh(x @ e["up"]) @ e["down"] for e in experts)

    experts = [{"up": jnp.ones((8, 16)), "down": jnp.ones((16, 8))}] * 6
    program = program_of(fn, experts, jnp.ones((4, 8)))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    # The first one is added to nothing, so at most the others are a chain of sums.
    assert min(layers_of(program, blocks, "tanh")) >= 5


# -- what differs is not tied ----------------------------------------------------

LAYERS, ODD = 6, 3


def stack(change):
    """Six layers of which one is built by `change`."""

    def plain(x, w, b, other):
        return x + jnp.tanh(x @ w + b) * other["scale"]

    def fn(ws, bs, x, other):
        kept = []
        for i, (w, b) in enumerate(zip(ws, bs, strict=True)):
            layer = change if i == ODD else plain
            x = layer(x, w, b, other)
            if isinstance(x, tuple):
                x, extra = x
                kept.append(extra)
        return x, kept

    other = {"scale": jnp.ones(8), "other": jnp.ones(8), "w": jnp.ones((8, 8))}
    args = ([jnp.ones((8, 8))] * LAYERS, [jnp.ones(8)] * LAYERS, jnp.ones((4, 8)))
    return program_of(fn, *args, other)


def same(x, w, b, other):
    return x + jnp.tanh(x @ w + b) * other["scale"]


def another_op(x, w, b, other):
    return x + jnp.sin(x @ w + b) * other["scale"]


def another_param(x, w, b, other):
    y = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))
    return x + jnp.tanh(y + b) * other["scale"]


def operands_swapped(x, w, b, other):
    return jnp.tanh(x @ w + b) * other["scale"] + x


def another_common_value(x, w, b, other):
    return x + jnp.tanh(x @ w + b) * other["other"]


def a_shared_weight(x, w, b, other):
    return x + jnp.tanh(x @ other["w"] + b) * other["scale"]


def a_result_returned(x, w, b, other):
    y = jnp.tanh(x @ w + b)
    return x + y * other["scale"], y


def another_source(x, w, b, other):
    y = jnp.tanh(x @ w + b)
    return y + y * other["scale"]


def test_the_six_layers_repeat():
    program = stack(same)
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert layers_of(program, blocks, "dot_general") == [LAYERS]


@pytest.mark.parametrize(
    "change",
    [
        another_op,
        another_param,
        operands_swapped,
        another_common_value,
        a_result_returned,
        another_source,
    ],
)
def test_the_odd_layer_is_left_alone(change):
    program = stack(change)
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    products = [op.index for op in program.ops if op.primitive == "dot_general"]
    assert len(products) == LAYERS
    copies = Counter(blocks.representative[products].tolist())
    assert copies[products[ODD]] == 1, "the odd layer is tied"
    # Those before it and those after it repeat among themselves.
    assert blocks.tied_ops > 0


def test_a_stream_that_is_also_returned_ends_a_run_of_copies():
    def fn(ws, x):
        for i, w in enumerate(ws):
            x = x + jnp.tanh(x @ w)
            if i == 2:
                kept = x
        return x, kept

    program = program_of(fn, [jnp.ones((8, 8))] * 7, jnp.ones((4, 8)))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert layers_of(program, blocks, "dot_general") == [3, 4]


def test_inputs_that_something_untied_uses_are_not_tied():
    """The layers are, as what else reads their weights does not touch them."""

    def fn(ws, x, y):
        total = 0.0
        for w in ws:
            x = x + jnp.tanh(x @ w)
        for i, w in enumerate(ws):
            for _ in range(i):  # so that no two are equally far apart
                y = jnp.sin(y) if i % 2 else jnp.cos(y)
            total = total + jnp.sum(jnp.abs(w)) * y.shape[0]
        return x, y, total

    program = program_of(fn, [jnp.ones((8, 8))] * 4, jnp.ones((4, 8)), jnp.ones(3))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert layers_of(program, blocks, "dot_general") == [4]
    assert (blocks.tied_values[:5] == np.arange(5)).all()
    products = [op.index for op in program.ops if op.primitive == "dot_general"]
    assert set(products[1:]) <= set(blocks.seams.tolist())


def test_a_weight_that_is_used_twice_is_not_a_layers_own():
    """The odd layer uses a parameter like any other, so its ops may be tied."""
    program = stack(a_shared_weight)
    blocks = find_blocks(program)
    assert_sound(program, blocks)

    def shared_twice(ws, x):
        for w in (*ws, ws[0]):
            x = x + jnp.tanh(x @ w)
        return x

    def ring(ws, x):
        for i, w in enumerate(ws):
            x = x + jnp.tanh((x @ w) @ ws[(i + 1) % len(ws)])
        return x

    program = program_of(ring, [jnp.ones((8, 8))] * 5, jnp.ones((4, 8)))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert (blocks.tied_values[:6] == np.arange(6)).all()

    program = program_of(shared_twice, [jnp.ones((8, 8))] * 4, jnp.ones((4, 8)))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    assert blocks.tied_values[program.inputs[0]] == program.inputs[0]
    assert program.inputs[0] not in blocks.tied_values[np.array(program.inputs[1:4])]


def paired(order):
    """Six layers, then their two results multiplied, those of a layer with `order`."""

    def fn(ws, x):
        ones, twos = [], []
        for w in ws:
            x = jnp.tanh(x @ w)
            ones.append(x)
            twos.append(jnp.sin(x))
        return [jnp.exp(a * twos[k]).sum() for a, k in zip(ones, order, strict=True)]

    program = program_of(fn, [jnp.ones((8, 8))] * 6, jnp.ones((4, 8)))
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    products = [op.index for op in program.ops if op.primitive == "mul"]
    return Counter(blocks.representative[products].tolist())


@pytest.mark.parametrize(
    ("order", "tied"),
    [
        ([0, 1, 2, 3, 4, 5], [6]),
        # All take the layer before; the first takes what is nobody's layer before.
        ([5, 0, 1, 2, 3, 4], [5, 1]),
        # Each value is at the right place of some layer, but not of the same one.
        ([5, 4, 3, 2, 1, 0], [1, 1, 1, 1, 1, 1]),
        ([0, 1, 2, 4, 3, 5], [3, 1, 1, 1]),
    ],
)
def test_what_is_read_of_other_layers_must_be_of_the_same_layer(order, tied):
    assert sorted(paired(order).values(), reverse=True) == tied


@pytest.mark.parametrize(("odd", "tied"), [(0, [5]), (1, [3, 1, 1])])
def test_an_end_of_a_chain_is_excused_only_where_the_chain_ends(odd, tied):
    """Each layer's input times a result of it; one of them takes another value.

    It may for the first layer, whose input comes out of no layer, but not for the
    second one. What it leaves out is used alike elsewhere, or that would tell.
    """

    def fn(ws, x, other):
        ins, outs = [], []
        for w in ws:
            ins.append(x)
            x = jnp.tanh(x @ w)
            outs.append(jnp.sin(x))
        last = jnp.exp(ins[1] * outs[0]).sum() if odd else 0.0
        ins[odd] = other
        pairs = list(zip(ins, outs, strict=True))[odd:]
        products = [jnp.exp(a * b).sum() for a, b in reversed(pairs)]
        return x, products, jnp.cos(other), last

    x = jnp.ones((4, 8))
    program = program_of(fn, [jnp.ones((8, 8))] * 5, x, x)
    blocks = find_blocks(program)
    assert_sound(program, blocks)
    products = [op.index for op in program.ops if op.primitive == "exp"]
    found = Counter(blocks.representative[products].tolist())
    assert sorted(found.values(), reverse=True) == tied


def test_a_program_without_repetition():
    def fn(a, b, c, d, x):
        h = jnp.tanh(x @ a)
        y = jnp.exp(h @ b).sum(axis=-1)
        queries, keys = jnp.sin(x @ c), jnp.sin(x @ d)  # two roles, not two copies
        return jnp.sqrt(y) + jnp.cos(x).mean(), queries, keys

    a, b, x = jnp.ones((8, 16)), jnp.ones((16, 4)), jnp.ones((4, 8))
    program = program_of(fn, a, b, a, a, x)
    blocks = find_blocks(program)
    assert blocks.repeats == ()
    assert (blocks.representative == np.arange(len(program.ops))).all()
    assert (blocks.tied_values == np.arange(len(program.values))).all()


@pytest.mark.parametrize("fn", [lambda: (), lambda: (jnp.zeros(3),)])
def test_empty_programs(fn):
    blocks = find_blocks(program_of(fn))
    assert blocks.repeats == ()


# -- random programs -------------------------------------------------------------

UNARY = (jnp.sin, jnp.cos, jnp.tanh)
BINARY = (jnp.add, jnp.multiply, jnp.subtract)

instructions = st.tuples(
    st.integers(0, 5), st.integers(0, 7), st.integers(0, 7), st.booleans()
)


def run(code, live, weights):
    """A few instructions; each reads recent values or a weight of its own."""
    for what, one, two, own in code:
        x = live[-1 - one % len(live)]
        if what < 3:
            live.append(UNARY[what](x))
        else:
            y = next(weights) if own else live[-1 - two % len(live)]
            live.append(BINARY[what - 3](x, y))
    return live


@given(
    head=st.lists(instructions, max_size=4),
    block=st.lists(instructions, min_size=1, max_size=5),
    count=st.integers(2, 6),
    tail=st.lists(instructions, max_size=4),
    odd=st.tuples(st.integers(0, 5), st.integers(0, 4), instructions),
    broken=st.booleans(),
    gradient=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_random_programs_are_tied_soundly(
    head, block, count, tail, odd, broken, gradient
):
    layers = [list(block) for _ in range(count)]
    if broken:  # one instruction of one copy is another
        layer, at, instruction = odd
        layers[layer % count][at % len(block)] = instruction
    codes = [head, *layers, tail]
    needed = sum(1 for c in codes for i in c if i[0] >= 3 and i[3])

    def fn(ws, x):
        weights = iter(ws)
        live = [x, x * 2]
        for code in codes:
            # A copy sees what the one before made last, and nothing older.
            live = run(code, live[-2:], weights)
        return (live[-1] * live[-2]).sum()

    call = jax.grad(fn) if gradient and needed else fn
    program = program_of(call, [jnp.ones(4)] * needed, jnp.ones(4))
    assert_sound(program, find_blocks(program))


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(
    ("branches", "looped"),
    [([[1, 0], [1, 1]], True), ([[0, 0], [1, 0]], False), ([[2, 2, 2]], True)],
)
def test_branches_and_loops_in_any_order_of_visiting(branches, looped, seed):
    """A branch takes what another one made, and a loop what comes later."""

    def choose(which, *xs):
        kept = [lambda *a, p=p: tuple(a[j] for j in p) for p in branches]
        return lax.switch(which, kept, *xs)

    def fn(which, *xs):
        def body(c, _):
            return tuple(map(jnp.sin, choose(which, *c))), None

        return lax.scan(body, xs, None, length=3)[0] if looped else choose(which, *xs)

    xs = [jnp.ones(8)] * len(branches[0])
    other = reordered(trace(fn, [jnp.int32(0), *xs]), random.Random(seed))
    assert_sound(other.traced.program, other.traced.blocks)
