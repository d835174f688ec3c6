"""Finding the rule of an op, and what happens where there is none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import Primitive

from autoshard.ir.errors import RuleMissingError
from autoshard.ir.program import build
from autoshard.rules import register, registry, rule_of, rules_of
from autoshard.rules.core import RuleContext
from autoshard.rules.registry import Example


def test_a_primitive_has_one_rule():
    with pytest.raises(ValueError, match="'dot_general' already has a rule"):
        register("dot_general", example=Example((), ()))(lambda ctx: None)


def _mystery(x):
    primitive = Primitive("mystery")
    primitive.def_abstract_eval(lambda x: jax.core.ShapedArray((4,), x.dtype))
    return primitive.bind(x)


def test_a_primitive_without_a_rule_is_an_error_that_says_where_and_what_to_do():
    program = build(jax.make_jaxpr(_mystery)(jnp.ones((4, 6))), [])
    with pytest.raises(RuleMissingError) as caught:
        rules_of(program)
    message = str(caught.value)
    assert message.startswith("primitive 'mystery' at ")
    assert "test_registry.py" in message
    assert "shapes (4, 6) -> (4,)" in message
    assert "register_rule('mystery', " in message
    assert "--replicate mystery" in message
    assert 'replicate = ["mystery"]' in message


def test_the_opt_in_blocks_every_dim_and_ties_none():
    program = build(jax.make_jaxpr(_mystery)(jnp.ones((4, 6))), [])
    [rule] = rules_of(program, {"mystery"})
    assert rule.text == "i j -> k {i=4 j=6 k=4} blocked i j k replicated"
    assert rule.op_kind == "replicated"
    assert rule_of(program, program.ops[0], {"mystery"}) is rule


def test_the_opt_in_changes_no_rule_that_there_is():
    program = build(jax.make_jaxpr(lax.sin)(jnp.ones((4, 6))), [])
    assert rules_of(program, {"sin"}) == rules_of(program)


def test_equal_rules_are_one_object():
    """Also of different primitives, and across programs."""
    first = build(jax.make_jaxpr(lambda x: lax.cos(lax.sin(x)))(jnp.ones((4, 6))), [])
    other = build(jax.make_jaxpr(lambda y: lax.neg(y))(jnp.ones((4, 6))), [])
    assert len({id(rule) for rule in (*rules_of(first), *rules_of(other))}) == 1


def test_rules_of_a_program_are_those_of_its_ops():
    def fn(x, w):
        y = jnp.maximum(x @ w, 0.5)
        return y[:, :2].sum(1), jnp.where(y > 2, y, 1.0)

    program = build(jax.make_jaxpr(fn)(jnp.ones((4, 6)), jnp.ones((6, 8))), [])
    rules = rules_of(program)
    assert len(rules) == len(program.ops)
    for op, rule in zip(program.ops, rules, strict=True):
        assert rule_of(program, op) is rule


def test_shapes_of_literals_are_seen():
    program = build(jax.make_jaxpr(lambda x: x * 2.0)(jnp.ones((4, 6))), [])
    assert rules_of(program)[0].text == "i j, . -> i j {i=4 j=6}"


def test_a_rule_is_built_once():
    def fn(x, w):
        for _ in range(20):
            x = jnp.tanh(x @ w)[:, ::-1]
        return x

    program = build(jax.make_jaxpr(fn)(jnp.ones((5, 7)), jnp.ones((7, 7))), [])
    before = registry._built.cache_info().misses
    assert len(rules_of(program)) == 60
    # One matrix product, one tanh, one reversal; some may be known already.
    assert registry._built.cache_info().misses - before <= 3


def test_what_a_rule_does_not_read_does_not_matter_to_it():
    """An op with a big parameter that its rule does not read is found by shapes."""
    values = jnp.ones((4, 6))
    program = build(jax.make_jaxpr(lambda x: lax.sort(x, dimension=1))(values), [])
    [op] = program.ops
    entry = registry.entries()["sort"]
    assert entry.reads == ("dimension",)
    assert set(op.params) > {"dimension"}
    context = RuleContext("sort", {"dimension": 1}, ((4, 6),), ((4, 6),))
    assert rules_of(program)[0] == entry.fn(context)
