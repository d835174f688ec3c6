"""Few copies of a block in place of many: the oracle is the step traced as a whole."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.unrolled import BATCH, block, layer_of, step_of

from autoshard.ir.addresses import Addresses
from autoshard.ir.annotations.names import WORDS
from autoshard.ir.few import Few, few_of, param_in
from autoshard.ir.stretch import NotAlikeError, fold_few, path_with
from autoshard.ir.trace import described, trace, with_state


def numbered(count):
    return {k: layer_of() for k in range(count)}


def few(step, remat="none", microbatches=1):
    found = few_of(step.with_schedule(microbatches=microbatches, remat=remat), BATCH)
    assert isinstance(found, Few), found
    return found


def stretch(step, remat="none", microbatches=1):
    part = few(step, remat, microbatches)
    traced = trace(part.step(remat), (BATCH,))
    inputs, _ = described(part.whole, with_state(part.whole, (BATCH,)), WORDS)
    return fold_few(part, traced, [0] * len(traced.program.values), inputs)


def whole(step, remat="none", microbatches=1):
    return trace(step.with_schedule(microbatches=microbatches, remat=remat), (BATCH,))


def kinds(ops, times):
    """How many ops there are of each primitive, in each scope."""
    found = Counter()
    for op, count in zip(ops, times, strict=True):
        found[op.primitive, op.scope] += count
    return found


OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
}


@pytest.mark.parametrize(("remat", "microbatches"), [("none", 1), ("none", 4)])
@pytest.mark.parametrize("count", [16, 30])
def test_all_ops_of_the_whole_are_counted_and_addressed(count, remat, microbatches):
    step = step_of(numbered(count))
    found = stretch(step, remat, microbatches)
    expected = whole(step, remat, microbatches).program
    left = found.folded.traced.program
    assert kinds(left.ops, found.folded.alike_ops) == kinds(
        expected.ops, [1] * len(expected.ops)
    )
    of = Addresses(found).of
    addresses = [
        a for op in found.folded.full.program.ops for a in of(op.address).values()
    ]
    assert sorted(addresses) == sorted(op.address for op in expected.ops)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    step = step_of(numbered(17), optimizer=OPTIMIZERS[name])
    found, expected = stretch(step), whole(step).program
    assert sum(found.folded.alike_ops) == len(expected.ops)
    of = Addresses(found).of
    addresses = [
        a for op in found.folded.full.program.ops for a in of(op.address).values()
    ]
    assert sorted(addresses) == sorted(op.address for op in expected.ops)


def test_names_may_sort_otherwise_than_the_layers_run():
    """`layer_10` comes before `layer_2`, but runs after it."""
    step = step_of({f"layer_{k}": layer_of() for k in range(25)})
    found, expected = stretch(step), whole(step).program
    of = Addresses(found).of
    addresses = [
        a for op in found.folded.full.program.ops for a in of(op.address).values()
    ]
    assert sorted(addresses) == sorted(op.address for op in expected.ops)


def test_what_a_kept_copy_stands_for_is_a_copy_of_it():
    """The address of a copy is of an op that does the same with arrays alike."""
    step = step_of({f"layer_{k}": layer_of() for k in range(20)})
    found, expected = stretch(step), whole(step).program
    at = {op.address: op for op in expected.ops}
    of = Addresses(found).of
    full = found.folded.full.program
    seen = 0
    for op in full.ops:
        for address in of(op.address).values():
            other = at[address]
            assert (op.primitive, op.scope) == (other.primitive, other.scope)
            assert [full.values[v].shape for v in op.outputs] == [
                expected.values[v].shape for v in other.outputs
            ]
            seen += 1
    assert seen == len(expected.ops)


def test_gradients_name_the_parameter_of_their_copy():
    step = step_of({f"layer_{k}": layer_of() for k in range(20)})
    found, expected = stretch(step), whole(step).program
    marked = {
        op.address: op.params["path"]
        for op in expected.ops
        if op.primitive == "autoshard_annotate"
    }
    of, mine = Addresses(found).of, {}
    for op in found.folded.full.program.ops:
        if op.primitive == "autoshard_annotate":
            for copy, address in of(op.address).items():
                path = op.params["path"]
                mine[address] = path if copy < 0 else path_with(path, found.paths[copy])
    assert mine == marked


def test_more_layers_are_no_more_to_trace():
    sizes = [
        len(trace(few(step_of(numbered(n))).step("none"), (BATCH,)).program.ops)
        for n in (18, 60)
    ]
    assert sizes[0] == sizes[1]


def test_leaves_that_are_left_out_have_one_that_stands_for_them():
    step = step_of(numbered(20))
    part = few(step)
    [stack] = part.stacks
    assert stack.copies == 20
    # Weights, and both moments, of three arrays in each of the copies left out.
    assert len(part.stands) == 3 * 3 * len(stack.gone)
    gone, stand = stack.gone[0], stack.stand
    assert (
        part.stands[f"opt_state/0/mu/blocks/{gone}/up"]
        == f"opt_state/0/mu/blocks/{stand}/up"
    )


def test_fingerprints_tell_depths_and_widths_apart():
    prints = {
        few(step_of(layers)).fingerprint
        for layers in (
            numbered(20),
            numbered(21),
            {k: layer_of(40) for k in range(20)},
        )
    }
    assert len(prints) == 3
    again = few(step_of({f"layer_{k:02}": layer_of() for k in range(20)}))
    assert again.fingerprint == few(step_of(numbered(20))).fingerprint


def why(step):
    found = few_of(step, BATCH)
    assert isinstance(found, str)
    return found


def test_few_layers_are_traced_as_they_are():
    assert why(step_of(numbered(8))) == ""


def test_layers_that_something_else_reads_are_traced_as_they_are():
    def loss(params, x):
        kept = []
        for name in range(20):
            x = block(params["blocks"][name], x)
            kept.append(x)
        return (jnp.concatenate(kept) ** 2).mean()

    assert why(step_of(numbered(20), loss=loss)) == ""


def test_a_layer_with_another_name_scope_is_told():
    def loss(params, x):
        for name in range(20):
            with jax.named_scope(f"block_{name}"):
                x = block(params["blocks"][name], x)
        return (x**2).mean()

    assert why(step_of(numbered(20), loss=loss)) == (
        "copies of the block are in scopes of other names: block_0 and block_1"
    )


def test_an_optimizer_that_freezes_a_layer_is_told():
    def labels(params):
        return {
            "blocks": {
                k: jax.tree.map(lambda _, k=k: "no" if k == 5 else "yes", layer)
                for k, layer in params["blocks"].items()
            },
            "head": "yes",
        }

    ways = {"yes": optax.adam(1e-3), "no": optax.set_to_zero()}
    said = why(step_of(numbered(20), optimizer=optax.multi_transform(ways, labels)))
    assert "the optimizer" in said


def test_an_optimizer_that_decays_half_of_the_layers_is_told():
    """Nothing of it is in the state, but of the kept copies some are updated so."""

    def decayed(params):
        return {
            "blocks": {
                k: jax.tree.map(lambda _, k=k: k < 10, layer)
                for k, layer in params["blocks"].items()
            },
            "head": True,
        }

    step = step_of(numbered(20), optimizer=optax.adamw(1e-3, mask=decayed))
    with pytest.raises(NotAlikeError, match="is unlike others"):
        stretch(step)


def test_a_norm_that_clips_all_gradients_is_told():
    """Sums of it are not counted with the layers; `ir.fold` leaves them as well."""
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    with pytest.raises(NotAlikeError, match="not all that is done"):
        stretch(step_of(numbered(20), optimizer=clipped))


def test_a_backward_pass_that_counts_from_another_layer_is_told():
    with pytest.raises(NotAlikeError, match="cut between other layers"):
        stretch(step_of(numbered(20)), remat="full")


def test_the_owner_of_a_moment_is_found_by_its_path():
    params = {"params/blocks/3/up", "params/up"}
    assert param_in("opt_state/0/mu/blocks/3/up", params) == "params/blocks/3/up"
    assert param_in("params/up", params) == "params/up"
    assert param_in("opt_state/0/count", params) is None
