"""Cutting a program along a factor and joining the pieces gives the whole.

For every rule of the table and every factor that may be sharded: the operands are cut
into two halves along the factor, the primitive runs on each half as a device would run
it, and the results are joined (`pass`) or combined (`reduce`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import GatherScatterMode

from autoshard.ir import _jaxcompat
from autoshard.rules import rule_of
from rules.cases import CASES, program_of, values

# What a half computes depends on which half it is, or on nothing at all.
NOT_CUT = {
    "iota": "a device adds the offset of its half",
    "empty": "has no values",
    "link": "is no primitive",
    "random_bits": "a device makes the bits of its own positions",
    "random_gamma": "a device makes the samples of its own positions",
}

COMBINE = {
    "reduce_max": jnp.maximum,
    "reduce_min": jnp.minimum,
    "reduce_prod": jnp.multiply,
    "reduce_and": jnp.logical_and,
    "reduce_or": jnp.logical_or,
    "reduce_xor": jnp.logical_xor,
}


def _positions(dims, factor):
    """Index of the factor among the factors of a value, flattened, or None."""
    flat = [f for dim in dims for f in (dim or (-1,))]
    return flat.index(factor) if factor in flat else None


def _factored(x, dims, sizes):
    shape = [
        size
        for dim, n in zip(dims, x.shape, strict=True)
        for size in ([sizes[f] for f in dim] or [n])
    ]
    return x.reshape(shape)


def _half(x, dims, sizes, factor, which):
    at = _positions(dims, factor)
    if at is None:
        return x
    halves = jnp.split(_factored(x, dims, sizes), 2, at)
    shape = [n // (2 if factor in dim else 1) for dim, n in zip(dims, x.shape)]
    return halves[which].reshape(shape)


def _shape(dims, whole, factor):
    return tuple(
        n // 2 if factor in dim else n for dim, n in zip(dims, whole, strict=True)
    )


def _local(primitive, params, rule, operands, results, factor, which):
    """Parameters and operands of one half, where they name sizes or positions."""
    params, operands = dict(params), list(operands)
    if "out_sharding" in params or "sharding" in params:
        assert params.get("out_sharding", params.get("sharding")) is None
    if primitive == "broadcast_in_dim":
        params["shape"] = results[0]
    elif primitive == "reshape":
        params["new_sizes"] = results[0]
    elif primitive == "slice":
        params["limit_indices"] = tuple(
            lo + n for lo, n in zip(params["start_indices"], results[0], strict=True)
        )
    elif primitive == "dynamic_slice":
        params["slice_sizes"] = results[0]
    elif primitive == "gather" or primitive.startswith("scatter"):
        table = rule.operands[0]
        if primitive == "gather":
            windows = zip(params["slice_sizes"], operands[0].shape, strict=True)
            params["slice_sizes"] = tuple(min(s, n) for s, n in windows)
        # A device answers for the rows it holds and drops all others.
        params["mode"] = GatherScatterMode.FILL_OR_DROP
        if primitive == "gather":
            params["fill_value"] = 0
        indexed = params["dimension_numbers"]
        gone = (
            indexed.collapsed_slice_dims
            if primitive == "gather"
            else indexed.inserted_window_dims
        )
        if any(factor in table[d] for d in gone):
            operands[1] = operands[1] - which * operands[0].shape[gone[0]]
        elif rule.kinds[factor] == "reduce" and which:
            operands[0] = jnp.zeros_like(operands[0])  # counted by the first half
    return params, operands


def _factors():
    for case in CASES:
        if case.primitive in NOT_CUT:
            continue
        program, op = program_of(case)
        rule = rule_of(program, op)
        for factor, kind in enumerate(rule.kinds):
            if kind != "blocked":
                letter = "ijklmno"[factor]
                label = f"{case.primitive}: {rule.text}, {letter}"
                yield pytest.param(case, factor, id=label)


def _equation(jaxpr, args, name):
    """The first equation of a primitive, with the values of its operands."""
    opened, consts = _jaxcompat.open_jaxpr(jaxpr)
    env = dict(zip((*opened.invars, *opened.constvars), (*args, *consts), strict=True))
    for eqn in opened.eqns:
        operands = [a.val if _jaxcompat.is_literal(a) else env[a] for a in eqn.invars]
        if eqn.primitive.name == name:
            return eqn, [jnp.asarray(x) for x in operands]
        inner = _jaxcompat.CALL_JAXPR_PARAM.get(eqn.primitive.name)
        if inner:
            found = _equation(eqn.params[inner], operands, name)
            if found:
                return found
        env.update(
            zip(eqn.outvars, _jaxcompat.eval_equation(eqn, operands), strict=True)
        )
    return None


@pytest.mark.parametrize(("case", "factor"), _factors())
def test_halves_make_the_whole(case, factor):
    program, op = program_of(case)
    rule = rule_of(program, op)
    args = values(case)
    eqn, operands = _equation(jax.make_jaxpr(case.fn)(*args), args, case.primitive)
    whole = _jaxcompat.eval_equation(eqn, operands)
    halves = []
    for which in range(2):
        cut = [
            _half(x, dims, rule.sizes, factor, which)
            for x, dims in zip(operands, rule.operands, strict=True)
        ]
        shapes = [
            _shape(dims, x.shape, factor)
            for x, dims in zip(whole, rule.results, strict=True)
        ]
        params, cut = _local(
            case.primitive, eqn.params, rule, cut, shapes, factor, which
        )
        params = eqn.primitive.get_bind_params(params)
        out = eqn.primitive.bind(*cut, **params)
        out = list(out) if eqn.primitive.multiple_results else [out]
        assert [x.shape for x in out] == shapes
        halves.append(out)
    for a, b, expected, dims in zip(*halves, whole, rule.results, strict=True):
        at = _positions(dims, factor)
        if at is None:
            assert rule.kinds[factor] == "reduce"
            got = COMBINE.get(case.primitive, jnp.add)(a, b)
        else:
            sizes = list(rule.sizes)
            sizes[factor] //= 2
            parts = [_factored(x, dims, sizes) for x in (a, b)]
            got = jnp.concatenate(parts, at).reshape(expected.shape)
        np.testing.assert_allclose(
            np.asarray(got, np.complex64), np.asarray(expected, np.complex64),
            rtol=2e-5, atol=1e-6,
        )


def test_the_oracle_refuses_an_illegal_factor():
    """Cutting along a blocked factor changes the result: the oracle can fail."""
    [case] = [c for c in CASES if c.primitive == "cumsum"]
    args = values(case)
    eqn, [x] = _equation(jax.make_jaxpr(case.fn)(*args), args, "cumsum")
    [whole] = _jaxcompat.eval_equation(eqn, [x])
    parts = [_jaxcompat.eval_equation(eqn, [p])[0] for p in jnp.split(x, 2, 1)]
    assert not np.allclose(np.concatenate(parts, 1), whole)


def test_every_skipped_primitive_has_a_case():
    assert set(NOT_CUT) <= {case.primitive for case in CASES}
