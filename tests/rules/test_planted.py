"""A mistake planted in a rule is caught, and what catches it names the user's line."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from rules.plant import instead, planted

import autoshard as ash
from autoshard.ir.errors import InputError
from autoshard.ir.program import build
from autoshard.plan.strategy import Strategy
from autoshard.rules import register_rule, rule_of
from autoshard.rules.check import check_rule, loose_factors
from autoshard.verify import verify_collectives

FILE = Path(__file__).name


def line_of(fn, part):
    """`file:line` of the line of a function that holds a piece of text."""
    lines, first = inspect.getsourcelines(fn)
    [at] = [k for k, text in enumerate(lines) if part in text]
    return f"{FILE}:{first + at}"


# -- mistakes ------------------------------------------------------------------------


def drop(slot, dim):
    """A dim of an operand or result forgets its factors."""

    def change(rule):
        slots = [list(dims) for dims in (*rule.operands, *rule.results)]
        slots[slot][dim] = ()
        return _with(rule, slots)

    return change


def swap(slot):
    """The first two dims of an operand or result are taken for each other."""

    def change(rule):
        slots = [list(dims) for dims in (*rule.operands, *rule.results)]
        slots[slot][:2] = slots[slot][1::-1]
        return _with(rule, slots)

    return change


def _with(rule, slots):
    fixed = [tuple(dims) for dims in slots]
    ahead = len(rule.operands)
    return dataclasses.replace(
        rule, operands=tuple(fixed[:ahead]), results=tuple(fixed[ahead:])
    )


def kind(old, new):
    """Every factor of one kind is of another."""

    def change(rule):
        kinds = tuple(new if k == old else k for k in rule.kinds)
        return dataclasses.replace(rule, kinds=kinds)

    return change


def shorter(rule):
    """Every halo lacks its lowest row."""
    halos = tuple((max(low - 1, 0), high) for low, high in rule.halos)
    return dataclasses.replace(rule, halos=halos)


# -- the op by itself ----------------------------------------------------------------


def product(w, x):
    y = jnp.tanh(x)
    return y @ w


def running(w, x):
    y = jnp.tanh(x)
    return jnp.cumsum(y, 1) + w


def turned(w, x):
    y = jnp.tanh(x)
    return y.T * w


def looked_up(w, x):
    ids = x[:, 0].astype(jnp.int32)
    return w.at[ids].get(mode="fill")


def ordered(w, x):
    y = jnp.tanh(x)
    return lax.sort(y, dimension=1) + w


def summed(w, x):
    y = jnp.tanh(x)
    return y.sum(1) + w[0]


def largest(w, x):
    y = jnp.tanh(x)
    return y.max(1) + w[0]


def smoothed(w, x):
    kernel = w[:3, :1].reshape(1, 1, 3)
    return lax.conv(x[:, None], kernel, (1,), "SAME")


ARGS = (jax.ShapeDtypeStruct((16, 16), "float32"),) * 2


def traced(fn, primitive, args=ARGS):
    program = build(jax.make_jaxpr(fn)(*args), [])
    return program, next(op for op in program.ops if op.primitive == primitive)


MISTAKES = [
    # fn, primitive, its line, the change, the factor to blame and what shows it
    (product, "dot_general", "@", drop(0, 0), "dim 0 of operand 0, (16, 16), has no"),
    # Along j, the columns of w, its rows are cut.
    (product, "dot_general", "@", swap(1), "factor j is pass, but"),
    (product, "dot_general", "@", kind("reduce", "pass"), "factor k is pass and no"),
    (looked_up, "gather", ".at[", kind("reduce", "pass"), "factor j is pass and no"),
    (running, "cumsum", "cumsum", kind("blocked", "pass"), "factor j is pass, but"),
    (running, "cumsum", "cumsum", swap(1), "factor i is pass, but"),
    (turned, "transpose", ".T", swap(1), "factor i is pass, but"),
    (turned, "transpose", ".T", drop(1, 1), "dim 1 of result 0, (16, 16), has no"),
    (ordered, "sort", "sort", kind("blocked", "pass"), "factor j is pass, but"),
    (summed, "reduce_sum", ".sum(", kind("reduce", "pass"), "factor j is pass and no"),
    (largest, "reduce_max", ".max(", kind("reduce", "pass"), "factor j is pass and no"),
    (smoothed, "conv_general_dilated", "conv", shorter, "factor j is shift(0,1), but"),
]


@pytest.mark.parametrize(("fn", "primitive", "part", "change", "what"), MISTAKES)
def test_an_op_in_pieces_tells_a_wrong_rule(fn, primitive, part, change, what):
    program, op = traced(fn, primitive)
    right = rule_of(program, op)
    assert check_rule(program, op) == ()
    wrong = change(right)
    with (
        planted(primitive, instead(right, wrong)),
        pytest.raises(InputError) as caught,
    ):
        check_rule(program, op)
    message = str(caught.value)
    assert message.startswith(f"the rule of {primitive!r} at ")
    assert line_of(fn, part) in message
    assert repr(wrong.text) in message
    assert what in message
    assert f"Correct the function that is registered for {primitive!r}" in message


@pytest.mark.parametrize(
    ("fn", "primitive", "change", "loose"),
    [
        (product, "dot_general", kind("pass", "blocked"), {0: "pass", 1: "pass"}),
        (product, "dot_general", kind("reduce", "blocked"), {2: "reduce"}),
        (
            smoothed,
            "conv_general_dilated",
            lambda rule: dataclasses.replace(
                rule, halos=tuple((a + (a > 0), b) for a, b in rule.halos)
            ),
            {1: "shift (1, 1)"},
        ),
    ],
)
def test_a_rule_that_is_too_careful_is_right_and_loose(fn, primitive, change, loose):
    program, op = traced(fn, primitive)
    wrong = change(rule_of(program, op))
    assert check_rule(program, op, wrong) == ()
    assert loose_factors(program, op, wrong) == loose


# -- the whole way -------------------------------------------------------------------


def annotated(fn):
    def run(w, x):
        return fn(w, ash.annotate(x, None, "wide"))

    return run


def verdict(fn):
    """Searched with a fixed strategy, lowered on eight devices, and compared."""
    strategy = Strategy(
        name="fixed", about="", mesh={"tensor": 8}, rules={"wide": ["tensor"]}
    )
    plan = ash.search(annotated(fn), *ARGS, cluster="cpu:8", strategy=strategy)
    step = ash.parallelize(annotated(fn), plan, *ARGS)
    return verify_collectives(plan, step.jitted.lower(*ARGS)).partitioned


@pytest.mark.parametrize(
    ("fn", "primitive", "part", "change"),
    [
        (product, "dot_general", "@", kind("reduce", "pass")),
        (largest, "reduce_max", ".max(", kind("reduce", "pass")),
        (summed, "reduce_sum", ".sum(", kind("reduce", "pass")),
        (ordered, "sort", "sort", kind("blocked", "pass")),
        (turned, "transpose", ".T", swap(1)),
    ],
)
def test_what_the_compiler_emits_tells_a_wrong_rule(fn, primitive, part, change):
    sound = verdict(fn)
    assert sound.fraction == 1.0
    assert not sound.differences
    program, op = traced(fn, primitive)
    right = rule_of(program, op)
    with planted(primitive, instead(right, change(right))):
        found = verdict(fn)
    assert found.fraction < 1.0
    lines = {e.source for d in found.unexplained for e in d.emitted}
    assert len(lines) == 1
    assert lines.pop().endswith(line_of(fn, part))


# -- rules that users write ----------------------------------------------------------


@pytest.fixture
def patterns(monkeypatch):
    """A registry of its own for the test."""
    module = sys.modules["autoshard.rules.foreign"]
    monkeypatch.setattr(module, "_PATTERNS", {})
    monkeypatch.setattr(module, "_CALLS", {})


def _kernel(x_ref, w_ref, out_ref, top_ref):
    x = x_ref[...]
    out_ref[...] = x @ w_ref[...]
    top_ref[...] = jax.nn.softmax(x)


def fused(x, w):
    shapes = (
        jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
    )
    call = pl.pallas_call(_kernel, out_shape=shapes, interpret=True, name="fused")
    return call(x, w)


RIGHT = "i k, k j -> i j, i k; blocked k"


def test_a_users_rule_that_is_right(patterns):
    register_rule("fused", RIGHT, call=fused)
    program, op = traced(fused, "pallas_call")
    assert check_rule(program, op) == ()
    whole, _ = fused(*np.ones((2, 16, 16), "float32"))
    assert np.all(whole == 16)  # the kernel is what the rule says


@pytest.mark.parametrize(
    ("text", "what"),
    [
        # Softmax needs all of its dim.
        ("i k, k j -> i j, i k", "factor j is pass and no dim of result 0"),
        # Two dims of the same size, taken for each other.
        ("k i, k j -> i j, i k; blocked k", "factor j is pass, but"),
        ("i k, j k -> i j, i k; blocked k", "factor k is pass, but"),
        ("i k, k j -> j i, i k; blocked k", "factor i is pass, but"),
        # Both results stand for themselves, and only one is a partial sum.
        ("i k, k j -> i j, i l; reduce k; blocked l", "factor j is reduce, but"),
    ],
)
def test_a_users_rule_that_is_wrong(text, what, patterns):
    register_rule("fused", text, call=fused)
    program, op = traced(fused, "pallas_call")
    with pytest.raises(InputError) as caught:
        check_rule(program, op)
    message = str(caught.value)
    assert message.startswith("the rule of 'fused' at ")
    assert line_of(fused, "call(x, w)") in message
    assert repr(text) in message
    assert what in message
    assert "Correct the text given to autoshard.register_rule('fused', ...)" in message


def test_a_halo_of_a_users_rule_is_not_tried_and_that_is_said(patterns):
    register_rule("fused", "i k, k j -> i j, i k; shift i(1,0); blocked k", call=fused)
    program, op = traced(fused, "pallas_call")
    [note] = check_rule(program, op)
    assert note.startswith("pallas_call, factor i: how a foreign call takes")


def test_a_kernel_that_cannot_run_here(patterns):
    def fails(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.ffi.ffi_call("nowhere", shape)(x)

    register_rule("nowhere", "i j -> i j", call=fails)
    program, op = traced(fails, "ffi_call", ARGS[:1])
    with pytest.raises(InputError, match=r"'ffi_call' at .* cannot be run here"):
        check_rule(program, op)


def test_what_is_too_large_to_be_tried():
    args = (jax.ShapeDtypeStruct((1 << 14, 1 << 13), "float32"),)
    program, op = traced(lax.sin, "sin", args)
    with pytest.raises(InputError, match="smaller arguments"):
        check_rule(program, op)
