"""What a rule says beyond its text: operations, and the kind of op."""

from __future__ import annotations

from math import prod

import pytest
from rules import work
from rules.case import program_of
from rules.cases import CASES

from autoshard.rules import covered, rule_of
from autoshard.rules.core import RuleContext
from autoshard.rules.registry import entries, example_rule, shapes_of


@pytest.mark.parametrize(
    ("primitive", "operands", "results", "params", "flops"),
    [
        # 2 n_batch n_out c_out c_in n_window, with groups of features, and with a dim
        # that is blocked because it does not align.
        (
            "conv_general_dilated",
            ((2, 6, 10), (12, 2, 3)),
            ((2, 12, 8),),
            {"feature_group_count": 3, "padding": ((0, 0),)},
            2 * 2 * 8 * 12 * 2 * 3,
        ),
        # Batch groups: each result sums over all features of its third of the batch.
        (
            "conv_general_dilated",
            ((6, 5, 16), (12, 5, 3)),
            ((2, 12, 16),),
            {"batch_group_count": 3},
            2 * 2 * 16 * 12 * 5 * 3,
        ),
        # One feature only.
        (
            "conv_general_dilated",
            ((6, 5, 16), (1, 5, 3)),
            ((6, 1, 16),),
            {},
            2 * 6 * 16 * 5 * 3,
        ),
        ("dot_general", ((8, 4), (4, 2)), ((8, 2),), {}, 2 * 8 * 4 * 2),
        # Every row meets one group's matrix only.
        ("ragged_dot_general", ((16, 8), (4, 8, 2), (4,)), ((16, 2),), {}, 512),
        (
            "scaled_dot",
            ((8, 64), (64, 4), (8, 2), (2, 4)),
            ((8, 4),),
            {},
            2 * 8 * 64 * 4,
        ),
        ("reduce_window_sum", ((8, 32),), ((8, 32),), {}, 8 * 32 * 3),
        ("select_and_scatter_add", ((8, 32), (8, 32)), ((8, 32),), {}, 8 * 32 * 3),
        ("cholesky", ((3, 6, 6),), ((3, 6, 6),), {}, 3 * 6**3 / 3),
        ("qr", ((3, 6, 4),), ((3, 6, 4), (3, 4, 4)), {}, 3 * 4 * 6 * 4 * 4),
        ("svd", ((3, 6, 4),), ((3, 4),), {}, 3 * (4 * 6 * 16 + 22 * 64)),
        ("lu_pivots_to_permutation", ((3, 4),), ((3, 4),), {}, 0),
        # n^2 for each of 2 columns, or each of 5 rows.
        ("triangular_solve", ((3, 4, 4), (3, 4, 2)), ((3, 4, 2),), {}, 3 * 16 * 2),
        (
            "triangular_solve",
            ((3, 4, 4), (3, 5, 4)),
            ((3, 5, 4),),
            {"left_side": False},
            3 * 16 * 5,
        ),
        (
            "tridiagonal_solve",
            ((3, 4), (3, 4), (3, 4), (3, 4, 2)),
            ((3, 4, 2),),
            {},
            3 * 8 * 4 * 2,
        ),
        # 5 n log2 n.
        ("fft", ((8, 32),), ((8, 17),), {}, 8 * 5 * 32 * 5),
        ("add", ((8, 4), (8, 4)), ((8, 4),), {}, 32),
        ("copy", ((8, 4),), ((8, 4),), {}, 0),
        ("reduce_sum", ((8, 4),), ((8,),), {}, 32),
        ("top_k", ((8, 16),), ((8, 2), (8, 2)), {}, 8 * 16),
    ],
)
def test_flops(primitive, operands, results, params, flops):
    entry = entries()[primitive]
    params = {**{n: entry.example.params.get(n) for n in entry.reads}, **params}
    rule = entry.fn(RuleContext(primitive, params, operands, results))
    assert rule.flops_per_point * prod(rule.sizes) == pytest.approx(flops)


_FLOPS_OF_A_MATRIX = {
    "cholesky_update": 2 * 4**2,
    "eig": 25 * 4**3,
    "eigh": 9 * 4**3,
    "geqp3": 4 * 6 * 4**2,
    "geqrf": 2 * 6 * 4**2,
    "hessenberg": 10 * 4**3 / 3,
    "householder_product": 4 * 6 * 4**2,
    "lu": 6 * 4 * 4,
    "ormqr": 4 * 6 * 4**2,
    "schur": 25 * 4**3,
    "symmetric_product": 6**2 * 4,
    "tridiagonal": 4 * 4**3 / 3,
}


@pytest.mark.parametrize(("primitive", "flops"), _FLOPS_OF_A_MATRIX.items())
def test_flops_of_factorizations(primitive, flops):
    """Each example has a batch of 8, but the update of a single factor."""
    rule = example_rule(primitive)
    batch = 1 if primitive == "cholesky_update" else 8
    assert rule.flops_per_point * prod(rule.sizes) == pytest.approx(batch * flops)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.primitive}: {c.text}")
def test_flops_of_every_case(case):
    program, op = program_of(case)
    rule = rule_of(program, op)
    counted = work.flops(case.primitive, *shapes_of(program, op), op.params)
    assert rule.flops_per_point * prod(rule.sizes) == pytest.approx(counted)


@pytest.mark.parametrize("primitive", covered())
def test_flops_of_every_example(primitive):
    rule, example = example_rule(primitive), entries()[primitive].example
    counted = work.flops(primitive, example.operands, example.results, example.params)
    assert rule.flops_per_point * prod(rule.sizes) == pytest.approx(counted)


def test_what_is_counted_has_a_rule():
    assert {*work.COUNTS, *work.PER_NUMBER} <= set(covered())
    assert not set(work.COUNTS) & work.PER_NUMBER


# -- kinds of ops --------------------------------------------------------------------

_OP_KINDS = {
    "collective": {
        "all_gather", "all_gather_invariant", "all_gather_reduced", "all_to_all",
        "pbroadcast", "pbroadcast_dynamic", "pmax", "pmin", "ppermute", "precv",
        "psend", "psum", "psum_invariant", "ragged_all_to_all", "reduce_scatter",
        "unreduced_pmax", "unreduced_pmin", "unreduced_psum",
        "unreduced_reduce_scatter",
    },
    "data": {
        "after_all", "axis_index", "broadcast_in_dim", "create_token", "dce_sink",
        "empty", "empty2", "iota", "iota_2x32_shape", "platform_index", "rng_uniform",
    },
    "foreign": {
        "check", "debug_callback", "debug_print", "inspect_sharding", "io_callback",
        "pure_callback",
    },
    "gather": {"gather"},
    "link": {"link"},
    "matmul": {
        "conv_general_dilated", "dot_general", "ragged_dot_general", "scaled_dot",
        "scaled_matmul", "scaled_matmul_wrapper",
    },
    "move": {
        "concatenate", "dynamic_slice", "dynamic_update_slice", "pad", "random_bits",
        "random_clone", "random_fold_in", "random_gamma", "random_seed",
        "random_split", "random_unwrap", "random_wrap", "reshape", "rev",
        "rng_bit_generator", "slice", "split", "squeeze", "stack", "tile",
        "transpose", "unstack",
    },
    "reduce": {
        "approx_top_k", "argmax", "argmin", "cholesky", "cholesky_update",
        "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "eig", "eigh", "fft",
        "geqp3", "geqrf", "hessenberg", "householder_product", "lu",
        "lu_pivots_to_permutation", "ormqr", "qr", "reduce", "reduce_and",
        "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
        "reduce_window", "reduce_window_max", "reduce_window_min",
        "reduce_window_sum", "reduce_xor", "schur", "select_and_gather_add",
        "select_and_scatter_add", "sort", "svd", "symmetric_product", "top_k",
        "triangular_solve", "tridiagonal", "tridiagonal_solve",
    },
    "scatter": {
        "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul",
        "scatter-sub",
    },
}  # fmt: skip


_KIND_OF = {name: kind for kind, names in _OP_KINDS.items() for name in names}


def test_what_kind_of_op_each_is():
    """All others work point by point."""
    assert set(_KIND_OF) <= set(covered())
    assert {name: example_rule(name).op_kind for name in covered()} == {
        name: _KIND_OF.get(name, "elementwise") for name in covered()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.primitive}: {c.text}")
def test_what_kind_of_op_each_case_is(case):
    """Parameters and shapes change nothing about it."""
    rule = rule_of(*program_of(case))
    assert rule.op_kind == _KIND_OF.get(case.primitive, "elementwise")
