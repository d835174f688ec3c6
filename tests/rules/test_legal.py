"""Cutting an op along a factor and joining the pieces gives the whole.

For every rule of the table and every factor that may be sharded: the operands are cut
into pieces along the factor, the primitive runs on each piece as a device would run
it, and the results are joined (`pass`) or combined (`reduce`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import GatherScatterMode
from rules.cases import CASES, ELEMENTWISE, program_of, values

from autoshard.ir import _jaxcompat
from autoshard.rules import rule_of

# What a piece holds depends on which piece it is, or on nothing at all.
NOT_CUT = {
    "iota": "a device adds the offset of its piece",
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


def _pieces(size):
    return 2 if size % 2 == 0 else size


def _piece(x, dims, sizes, factor, which):
    at = _positions(dims, factor)
    if at is None:
        return x
    count = _pieces(sizes[factor])
    cut = jnp.split(_factored(x, dims, sizes), count, at)
    return cut[which].reshape(_shape(dims, x.shape, factor, count))


def _shape(dims, whole, factor, count):
    return tuple(
        n // count if factor in dim else n for dim, n in zip(dims, whole, strict=True)
    )


def _local(primitive, params, rule, operands, results, factor, which):
    """Parameters and operands of one piece, where they name sizes or positions."""
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
            operands[0] = jnp.zeros_like(operands[0])  # counted by the first piece
    return params, operands


def _factors():
    seen = set()
    for case in CASES:
        if case.primitive in NOT_CUT:
            continue
        program, op = program_of(case)
        rule = rule_of(program, op)
        for factor, kind in enumerate(rule.kinds):
            # All dims of a point-by-point op are alike.
            alike = case in ELEMENTWISE and case.primitive in seen
            seen.add(case.primitive)
            if kind != "blocked" and not alike:
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


@pytest.mark.parametrize(("case", "factor"), list(_factors()))
def test_pieces_make_the_whole(case, factor):
    program, op = program_of(case)
    rule = rule_of(program, op)
    args = values(case)
    eqn, operands = _equation(jax.make_jaxpr(case.fn)(*args), args, case.primitive)
    whole = _jaxcompat.eval_equation(eqn, operands)
    count = _pieces(rule.sizes[factor])
    shapes = [
        _shape(dims, x.shape, factor, count)
        for x, dims in zip(whole, rule.results, strict=True)
    ]
    pieces = []
    for which in range(count):
        cut = [
            _piece(x, dims, rule.sizes, factor, which)
            for x, dims in zip(operands, rule.operands, strict=True)
        ]
        params, cut = _local(
            case.primitive, eqn.params, rule, cut, shapes, factor, which
        )
        params = eqn.primitive.get_bind_params(params)
        out = eqn.primitive.bind(*cut, **params)
        out = list(out) if eqn.primitive.multiple_results else [out]
        assert [x.shape for x in out] == shapes
        pieces.append(out)
    sizes = list(rule.sizes)
    sizes[factor] //= count
    for *parts, expected, dims in zip(*pieces, whole, rule.results, strict=True):
        at = _positions(dims, factor)
        if at is not None:
            parts = [_factored(x, dims, sizes) for x in parts]
            got = jnp.concatenate(parts, at).reshape(expected.shape)
        elif rule.kinds[factor] == "reduce":
            got = functools.reduce(COMBINE.get(case.primitive, jnp.add), parts)
        else:  # a result that the factor does not reach is the same everywhere
            got = parts[0]
            assert all(np.array_equal(got, x) for x in parts)
        np.testing.assert_allclose(
            np.asarray(got, np.complex64),
            np.asarray(expected, np.complex64),
            rtol=2e-5,
            atol=1e-6,
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
