"""Rules that users write for foreign calls."""

from __future__ import annotations

import sys
from math import prod

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import Primitive

from autoshard.ir.errors import InputError, RuleMissingError
from autoshard.ir.program import build
from autoshard.rules import foreign, register_rule, registered, rule_name, rules_of
from autoshard.rules.foreign import fit, parse


def text(rule, operands, results):
    return fit(parse("kernel", rule), operands, results, "model.py:3").text


def refusal(rule, operands=None, results=None):
    """The message of a rule that cannot be read, or not for these shapes."""
    with pytest.raises(InputError) as caught:
        fit(parse("kernel", rule), operands, results, "model.py:3 (f)")
    message = str(caught.value)
    assert message.startswith(f"the rule {rule!r} of 'kernel': ")
    assert 'as in "b s h, b t h -> b s h; blocked t"' in message
    return message


@pytest.mark.parametrize(
    ("rule", "operands", "results", "expected"),
    [
        (
            "b s h, b t h -> b s h; blocked t h",
            ((2, 8, 4), (2, 6, 4)),
            ((2, 8, 4),),
            "i j k, i l k -> i j k {i=2 j=8 k=4 l=6} blocked k l",
        ),
        ("i k, k j -> i j; reduce k", ((8, 4), (4, 2)), ((8, 2),),
         "i j, j k -> i k {i=8 j=4 k=2} reduce j"),
        # Several results, a scalar, a dim of one, names of more than one letter.
        ("batch feature, . -> batch 1, feature; blocked feature",
         ((8, 4), ()), ((8, 1), (4,)), "i j, . -> i 1, j {i=8 j=4} blocked j"),
        # Compound dims: the size of one part follows from the other.
        ("b (h d), h -> b h; blocked d", ((2, 12), (3,)), ((2, 3),),
         "i (jk), j -> i j {i=2 j=3 k=4} blocked k"),
        ("(a b) c -> a (b c)", ((6, 5), ), ((2, 15),),
         "(ij) k -> i (jk) {i=2 j=3 k=5}"),
        # A dim of one is read over and over.
        ("b s, b s -> b s", ((8, 4), (1, 4)), ((8, 4),),
         "i j, 1 j -> i j {i=8 j=4}"),
        # A name that is only ever of size one is no factor.
        ("b s -> b s", ((8, 1),), ((8, 1),), "i 1 -> i 1 {i=8}"),
        # Where sizes may differ the result's counts.
        ("b s -> b s; shift s(1,2)", ((8, 34),), ((8, 32),),
         "i j -> i j {i=8 j=32} shift j(1,2)"),
        ("b s -> b s; blocked s", ((8, 34),), ((8, 32),),
         "i j -> i j {i=8 j=32} blocked j"),
        # Clauses in any order, spaced in any way.
        (" b  s t,t->b s t ;shift  s ( 0 , 3 ) t(1,0); flops 2", ((2, 8, 6), (6,)),
         ((2, 8, 6),), "i j k, k -> i j k {i=2 j=8 k=6} shift j(0,3) k(1,0)"),
        ("-> a; blocked a", (), ((4,),), " -> i {i=4} blocked i"),
    ],
)  # fmt: skip
def test_text(rule, operands, results, expected):
    assert text(rule, operands, results) == expected


def test_a_foreign_rule_is_of_its_own_kind():
    rule = fit(parse("kernel", "i -> i; flops 3"), ((8,),), ((8,),), "model.py:3")
    assert rule.op_kind == "foreign"
    assert rule.flops_per_point * prod(rule.sizes) == 24


def test_flops_of_the_call_are_taken_where_the_rule_has_none():
    rule = fit(parse("kernel", "i j -> i j"), ((8, 2),), ((8, 2),), "here", 64.0)
    assert rule.flops_per_point == 4
    told = parse("kernel", "i j -> i j; flops 0")
    assert fit(told, ((8, 2),), ((8, 2),), "here", 64.0).flops_per_point == 0


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("b s, b s", "there is no '->' between operands and results"),
        ("b s ->", "no result stands behind '->'"),
        ("b s, -> b s", "a scalar is written '.'"),
        ("b s? -> b s", "'?' in 'b s?' is no name of a dim"),
        ("b 2 -> b", "'2' in 'b 2' is no name of a dim"),
        ("b b -> b", "'b' stands twice in 'b b'"),
        ("b s -> b s; keep s", "'keep' is none of blocked, reduce, shift and flops"),
        ("b s -> b s;", "'' is none of blocked, reduce, shift and flops"),
        ("b s -> b s; blocked", "'blocked' is followed by no name"),
        ("b s -> b s; blocked 3", "'3' behind 'blocked' is no name"),
        ("b s -> b s; blocked t", "'t' is blocked, but it is no dim of any array"),
        ("b s -> b s; blocked s; shift s(1,1)", "'s' is both blocked and shift"),
        ("b s -> b s; shift s", "'s': a shift, and only a shift, says how many"),
        ("b s -> b s; blocked s(1,1)", "'s(1,1)': a shift, and only a shift"),
        ("b s -> b s; flops", "'flops' is followed by '', not one number"),
        ("b s -> b s; flops two", "'flops' is followed by 'two', not one number"),
        ("b s -> b s; flops -1", "-1 operations per point are less than none"),
        ("b s -> b s; reduce s", "'s' is reduced, yet it is a dim of a result"),
        ("b s -> b", "is it summed up (reduce s), or needed whole (blocked s)?"),
        ("b -> b s", "'s' is a dim of no operand"),
    ],
)
def test_a_text_that_is_no_rule(rule, message):
    assert message in refusal(rule)


@pytest.mark.parametrize(
    ("rule", "operands", "results", "message"),
    [
        ("b -> b", ((8,), (8,)), ((8,),),
         "it has 1 operands, but the call at model.py:3 (f) has 2: (8,), (8,)"),
        ("b -> b", ((8,),), ((8,), (8,)), "it has 1 results, but the call"),
        ("b s -> b s", ((8, 4),), ((8,),),
         "number 0 of its results has 2 dims, but at model.py:3 (f) the shape is (8,)"),
        ("b s -> b s", ((8, 4),), ((8, 5),), "'s' is 5 and 4 at model.py:3 (f)"),
        ("b (h d), h -> b h; blocked d", ((2, 13), (3,)), ((2, 3),),
         "a dim of 13 at model.py:3 (f) does not hold 3"),
        ("b (h d), h, d -> b h; blocked d", ((2, 12), (3,), (5,)), ((2, 3),),
         "(h d) is not 12 at model.py:3 (f)"),
        ("(b h) -> (b h)", ((6,),), ((6,),),
         "the size of 'b' cannot be told at model.py:3 (f)"),
        ("b 1 -> b", ((8, 2),), ((8,),), "a dim written 1 is 2 at model.py:3 (f)"),
    ],
)  # fmt: skip
def test_a_rule_that_does_not_fit(rule, operands, results, message):
    assert message in refusal(rule, operands, results)


# -- registered rules in programs ----------------------------------------------------


@pytest.fixture
def patterns(monkeypatch):
    """A registry of its own for the test."""

    from autoshard.rules import foreign as _  # noqa: F401  the function, not the module

    module = sys.modules["autoshard.rules.foreign"]
    monkeypatch.setattr(module, "_PATTERNS", {})


def _kernel(x_ref, out_ref):
    out_ref[...] = x_ref[...] * 2


def _pallas(x, **how):
    return pl.pallas_call(
        _kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True, **how
    )(x)


def _ffi(x):
    return jax.ffi.ffi_call("my_target", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def _primitive(x):
    primitive = Primitive("theirs")
    primitive.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
    return primitive.bind(x)


CALLS = [
    (lambda x: _pallas(x, name="doubled"), "doubled"),
    (_pallas, "_kernel"),
    (_ffi, "my_target"),
    (_primitive, "theirs"),
]


def _program(fn):
    return build(jax.make_jaxpr(fn)(jnp.ones((4, 6))), [])


@pytest.mark.parametrize(("fn", "name"), CALLS)
def test_a_call_is_found_by_the_name_of_what_it_calls(fn, name, patterns):
    program = _program(fn)
    [op] = program.ops
    assert rule_name(op) == name
    with pytest.raises(RuleMissingError, match=rf"register_rule\('{name}', "):
        rules_of(program)
    register_rule(name, "b s -> b s; blocked s")
    [rule] = rules_of(program)
    assert rule.text == "i j -> i j {i=4 j=6} blocked j"
    assert foreign(op)
    assert registered() == {name: "b s -> b s; blocked s"}


@pytest.mark.parametrize(("fn", "name"), CALLS)
def test_the_opt_in_goes_by_the_same_name(fn, name, patterns):
    program = _program(fn)
    texts = {"i j -> k l {i=4 j=6 k=4 l=6} blocked i j k l replicated"}
    assert {r.text for r in rules_of(program, {name})} == texts
    assert {r.text for r in rules_of(program, {program.ops[0].primitive})} == texts


def test_a_call_without_a_rule_names_the_primitive_and_the_kernel(patterns):
    with pytest.raises(RuleMissingError) as caught:
        rules_of(_program(_pallas))
    message = str(caught.value)
    assert "primitive 'pallas_call', which calls '_kernel', at " in message
    assert "test_foreign.py" in message
    assert "--replicate _kernel" in message


def test_a_second_rule_replaces_the_first(patterns):
    program = _program(_ffi)
    register_rule("my_target", "b s -> b s; blocked s")
    register_rule("my_target", "b s -> b s; blocked b")
    assert rules_of(program)[0].text == "i j -> i j {i=4 j=6} blocked i"


def test_a_rule_that_does_not_fit_names_the_line(patterns):
    register_rule("my_target", "b -> b")
    with pytest.raises(InputError, match=r"has 1 dims, but at .*test_foreign\.py"):
        rules_of(_program(_ffi))


def test_a_kernel_says_its_own_cost(patterns):
    register_rule("doubled", "b s -> b s")
    cost = pl.CostEstimate(flops=48, transcendentals=0, bytes_accessed=0)
    [rule] = rules_of(
        _program(lambda x: _pallas(x, name="doubled", cost_estimate=cost))
    )
    assert rule.flops_per_point == 2


def test_only_foreign_calls_are_foreign(patterns):
    [op] = _program(jax.lax.sin).ops
    assert not foreign(op)
    [op] = _program(_ffi).ops
    assert foreign(op)
    [op] = _program(_primitive).ops
    assert not foreign(op)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dot_general", "it is built in, and every pass relies on it"),
        ("pallas_call", "name the kernel or target that it calls instead"),
        ("ffi_call", "name the kernel or target that it calls instead"),
    ],
)
def test_names_that_cannot_have_a_rule(name, why):
    with pytest.raises(InputError, match=f"registered for '{name}': {why}"):
        register_rule(name, "i -> i")
