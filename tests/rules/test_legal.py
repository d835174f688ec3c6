"""Cutting an op along a factor and joining the pieces gives the whole.

For every rule of the table and every factor that may be sharded: the operands are cut
into pieces along the factor, the primitive runs on each piece as a device would run
it, and the results are joined (`pass`, `shift`) or combined (`reduce`). A factor with a
halo lends each piece so many rows of its neighbours, and no more.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rules.case import program_of, values
from rules.cases import CASES, ELEMENTWISE
from rules.piece import cut_op, host, pieces

from autoshard.ir import _jaxcompat
from autoshard.rules import rule_of

# What a piece holds depends on which piece it is, or it is no op of one device's.
NOT_CUT = {
    "after_all": "has no values",
    "create_token": "has no values",
    "dce_sink": "has no results",
    "empty": "has no values",
    "layout_constraint": "is the identity, and only compiles in a jit",
    "link": "is no primitive",
    "preduced": "is the identity of a manual region",
    "pvary": "is the identity of a manual region",
    "random_gamma": "a device makes the samples of its own positions",
    "reduced_vary_cast": "is the identity of a manual region",
    "reduced_vary_cast_p": "is the identity of a manual region",
    "reshard": "is the identity on the values",
    "rng_uniform": "gives other numbers at each call",
    "scaled_matmul_wrapper": "runs on a GPU only; it is a scaled_dot",
    "sharding_constraint": "is the identity on the values",
    "vary_unreduced_cast": "is the identity of a manual region",
    "vary_unreduced_cast_p": "is the identity of a manual region",
}
RUNS_ALONE = {"iota", "iota_2x32_shape", "random_bits"}
"""A device adds the offset of its piece to what stands in no operand."""

COMBINE = {
    "max": jnp.maximum,
    "min": jnp.minimum,
    "prod": jnp.multiply,
    "mul": jnp.multiply,
    "and": jnp.logical_and,
    "or": jnp.logical_or,
    "xor": jnp.logical_xor,
}


def _combine(primitive):
    """Reductions, windows and scatters end in the name of what they do."""
    return COMBINE.get(primitive.replace("-", "_").rpartition("_")[2], jnp.add)


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
            read = {f for dims in rule.operands for dim in dims for f in dim}
            made_alone = case.primitive in RUNS_ALONE and factor not in read
            if kind != "blocked" and not alike and not made_alone:
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
            return eqn, [_array(x) for x in operands]
        inner = _jaxcompat.CALL_JAXPR_PARAM.get(eqn.primitive.name)
        if inner:
            found = _equation(eqn.params[inner], operands, name)
            if found:
                return found
        env.update(
            zip(eqn.outvars, _jaxcompat.eval_equation(eqn, operands), strict=True)
        )
    return None


def _array(x):
    return x if hasattr(x, "dtype") else jnp.asarray(x)


def _numbers(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).astype(np.complex64)


@pytest.mark.parametrize(("case", "factor"), list(_factors()))
def test_pieces_make_the_whole(case, factor):
    program, op = program_of(case)
    rule = rule_of(program, op)
    args = values(case)
    eqn, operands = _equation(jax.make_jaxpr(case.fn)(*args), args, case.primitive)
    whole = _jaxcompat.eval_equation(eqn, operands)
    parts = [
        cut_op(eqn, rule, operands, whole, factor, which)
        for which in range(pieces(rule, factor))
    ]
    for *got, expected, dims in zip(*parts, whole, rule.results, strict=True):
        if any(factor in dim for dim in dims):
            made = _joined(got, expected, dims, rule, factor)
        elif rule.kinds[factor] == "reduce":
            made = functools.reduce(_combine(case.primitive), got)
        else:  # a result that the factor does not reach is the same everywhere
            made = got[0]
            assert all(np.array_equal(_numbers(made), _numbers(x)) for x in got)
        np.testing.assert_allclose(
            _numbers(made),
            _numbers(expected),
            # Elements of 8 bits are multiplied as such of 16.
            rtol=1e-2 if case.primitive == "scaled_dot" else 2e-5,
            atol=1e-6,
        )


def _joined(parts, whole, dims, rule, factor):
    """Pieces of a result, set side by side along a factor."""
    [d] = [d for d, dim in enumerate(dims) if factor in dim]
    sizes = [rule.sizes[f] for f in dims[d]]
    sizes = sizes if len(sizes) > 1 else [whole.shape[d]]
    at = dims[d].index(factor)
    sizes[at] //= len(parts)
    before, after = whole.shape[:d], whole.shape[d + 1 :]
    spread = [host(x).reshape(*before, *sizes, *after) for x in parts]
    join = np if isinstance(spread[0], np.ndarray) else jnp
    return join.concatenate(spread, d + at).reshape(whole.shape)


def test_the_oracle_refuses_an_illegal_factor():
    """Cutting along a blocked factor changes the result: the oracle can fail."""
    [case] = [c for c in CASES if c.primitive == "cumsum"]
    args = values(case)
    eqn, [x] = _equation(jax.make_jaxpr(case.fn)(*args), args, "cumsum")
    [whole] = _jaxcompat.eval_equation(eqn, [x])
    parts = [_jaxcompat.eval_equation(eqn, [p])[0] for p in jnp.split(x, 2, 1)]
    assert not np.allclose(np.concatenate(parts, 1), whole)


@pytest.mark.parametrize("lacking", ["low", "high"])
@pytest.mark.parametrize(
    "primitive",
    [
        "conv_general_dilated",
        "reduce_window_max",
        "select_and_gather_add",
        "select_and_scatter_add",
    ],
)
def test_the_oracle_refuses_a_halo_that_is_too_short(primitive, lacking):
    """With a row less, every op with a halo gives another result."""

    def found():
        for case in CASES:
            rule = rule_of(*program_of(case))
            for f, (low, high) in enumerate(rule.halos):
                if case.primitive == primitive and low and high:
                    return case, rule, f, (low, high)
        raise AssertionError(primitive)

    case, rule, factor, (low, high) = found()
    halo = (low - 1, high) if lacking == "low" else (low, high - 1)
    halos = tuple(halo if f == factor else h for f, h in enumerate(rule.halos))
    short = dataclasses.replace(rule, halos=halos)
    args = values(case)
    eqn, operands = _equation(jax.make_jaxpr(case.fn)(*args), args, primitive)
    # What a piece lacks is the largest of its window. Where a gradient goes tells two
    # rows apart only if what it has of the window is not the next best.
    at = -1 if "select" in primitive else 0
    rows = np.arange(1.0, 1 + operands[at].shape[-1], dtype=np.float32)
    rows = rows[::-1] if lacking == "low" else rows
    if (primitive, lacking) == ("select_and_scatter_add", "high"):
        rows = np.where(rows % 2 == 0, rows, -rows)
    operands[at] = np.broadcast_to(rows, operands[at].shape)
    [whole] = _jaxcompat.eval_equation(eqn, operands)
    parts = [
        cut_op(eqn, short, operands, [whole], factor, which)[0] for which in range(2)
    ]
    made = _joined(parts, whole, rule.results[0], rule, factor)
    assert not np.allclose(made, whole, rtol=2e-5, atol=1e-6)


def test_every_skipped_primitive_has_a_case():
    made = {case.primitive for case in CASES}
    absent = {"reduced_vary_cast", "vary_unreduced_cast"}
    absent |= {f"{name}_p" for name in absent}  # each JAX has one spelling
    assert set(NOT_CUT) - made <= absent
    assert made >= RUNS_ALONE
