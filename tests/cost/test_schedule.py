"""The order of ops, against what any order has to keep and what compilers put off."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from propagate.programs import ACTIVATIONS, mlp_step, shape, stacked_step

from autoshard.cost.schedule import positions
from autoshard.ir.program import LINK
from autoshard.ir.trace import trace


def order_of(fn, args):
    program = trace(fn, args).program
    return program, positions(program)


PROGRAMS = {
    "mlp": mlp_step,
    "stacked": stacked_step,
    "microbatches": lambda: stacked_step().with_schedule(microbatches=2, remat="full"),
}


@pytest.mark.parametrize("which", PROGRAMS)
def test_every_op_runs_once_and_after_what_it_needs(which):
    program, at = order_of(PROGRAMS[which](), [ACTIVATIONS])
    assert sorted(at) == list(range(len(program.ops)))
    for op in program.ops:
        for v in op.inputs:
            maker = program.values[v].producer if v >= 0 else -1
            # A loop's first run reads what is carried in, a later one what is on.
            if maker >= 0 and maker < op.index:
                assert at[maker] < at[op.index], (op.address, maker)


@pytest.mark.parametrize("which", PROGRAMS)
def test_the_ops_of_a_loop_stay_together(which):
    program, at = order_of(PROGRAMS[which](), [ACTIVATIONS])
    for region in range(1, len(program.regions)):
        inside = {region}
        for inner, info in enumerate(program.regions):
            if info.parent in inside:
                inside.add(inner)
        spots = sorted(at[op.index] for op in program.ops if op.region in inside)
        assert spots == list(range(spots[0], spots[-1] + 1))


def test_gradients_of_weights_come_last_in_a_layer():
    """In the backward loop what the next layer needs runs before what is stacked."""
    program, at = order_of(stacked_step(), [ACTIVATIONS])
    last = max(op.region for op in program.ops)
    stacked = {
        op.inputs[0]
        for op in program.ops
        if op.region == last and op.primitive == LINK and op.params["kind"] == "stack"
    }
    products = [
        op for op in program.ops if op.region == last and op.primitive == "dot_general"
    ]
    weights, others = [], []
    for op in products:
        reached, pending = set(), {op.outputs[0]}
        while pending:
            v = pending.pop()
            reached.add(v)
            pending |= {
                out
                for user in program.ops
                if user.region == last and v in user.inputs and user.primitive != LINK
                for out in user.outputs
            } - reached
        onwards = any(p is not op and reached & set(p.inputs) for p in products)
        kept = weights if reached & stacked and not onwards else others
        kept.append(at[op.index])
    assert len(weights) == 2
    assert len(others) >= 2
    assert min(weights) > max(others)


def test_without_a_loop_the_order_is_the_programs():
    program, at = order_of(mlp_step(), [ACTIVATIONS])
    assert list(at) == list(range(len(program.ops)))


def test_a_product_waits_for_a_loop_that_does_not_need_it():
    def fn(weight, x):
        late = x.T @ x
        early = x @ weight
        carried = jax.lax.scan(lambda c, _: (jnp.tanh(c), None), early, None, 3)[0]
        return late, carried

    program, at = order_of(fn, [shape(8, 8), shape(4, 8)])
    late, early = (op for op in program.ops if op.primitive == "dot_general")
    tanh = next(op for op in program.ops if op.primitive == "tanh")
    assert at[early.index] < at[tanh.index] < at[late.index]
