"""Every primitive of JAX that a model can reach has a rule, or says why it has none."""

from __future__ import annotations

import jax.lax.linalg
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad

from autoshard.rules import covered
from autoshard.rules.structure import by_parts

# Each has no rule on purpose: a program that has one stops, with two ways out.
WITHOUT = {
    "arrays that change in place": {
        "accum_grad_in_ref", "addupdate", "empty_ref", "free_ref", "freeze", "get",
        "get_global", "masked_load", "masked_swap", "new_ref", "run_state", "swap",
    },
    "boxes and logs of JAX's own experiments": {
        "box_get", "box_set", "call_hi_primitive", "log_extend", "log_read", "new_box",
        "new_log",
    },
    "sparse formats of jax.experimental.sparse": {
        "bcoo_dot_general", "bcoo_dot_general_sampled", "bcoo_extract",
        "bcoo_fromdense", "bcoo_sort_indices", "bcoo_spdot_general",
        "bcoo_sum_duplicates", "bcoo_todense", "bcoo_transpose", "bcsr_dot_general",
        "bcsr_extract", "bcsr_fromdense", "bcsr_todense", "coo_fromdense", "coo_matmat",
        "coo_matvec", "coo_todense", "csr_fromdense", "csr_matmat", "csr_matvec",
        "csr_todense", "spsolve", "todense",
    },
    "arrays of several hosts, outside of any program": {
        "global_array_to_host_local_array", "host_local_array_to_global_array",
    },
    "variables of Flax's own experiments": {
        "get_variable", "new_variable", "set_variable",
    },
    "forward derivatives that a function does not define": {"custom_lin"},
    "functions whose parts only JAX can call": {
        "custom_vmap_call", "mpmd_map", "xla_metadata_call",
    },
}  # fmt: skip
_NAMES = {name for names in WITHOUT.values() for name in names}


def _read():
    return {*covered(), *by_parts()}


def test_every_differentiable_primitive_of_jax_is_read():
    tables = (*ad.primitive_jvps, *ad.primitive_transposes)
    assert {p.name for p in tables} - _read() - _NAMES == set()


def test_every_public_primitive_of_lax_is_read():
    found = {
        value.name
        for module in (lax, jax.lax.linalg)
        for value in vars(module).values()
        if isinstance(value, Primitive)
    }
    assert len(found) > 150
    assert found - _read() == {"select_and_scatter"}  # only `_add` has a public caller


def test_nothing_that_is_read_is_excused():
    assert not _read() & _NAMES


def test_nothing_has_both_a_rule_and_parts():
    assert not set(covered()) & set(by_parts())


# What the survey of 45 train steps met, and what its extra probes added.
_MET = [
    "mul", "add", "div", "broadcast_in_dim", "dot_general", "integer_pow",
    "reduce_sum", "reshape", "add_any", "transpose", "sqrt", "convert_element_type",
    "sub", "jit", "select_n", "neg", "slice", "pad", "squeeze", "eq", "square",
    "concatenate", "split", "rsqrt", "iota", "max", "pow", "logistic", "exp", "lt",
    "stop_gradient", "reduce_max", "cos", "sin", "conv_general_dilated", "gather",
    "ge", "tanh", "scatter-add", "and", "copy", "gt", "random_wrap",
    "random_unwrap", "random_bits", "random_fold_in", "ne", "rev", "or",
    "custom_jvp_call", "cumsum", "ragged_dot_general", "scatter", "remat2", "scan",
    "fft", "sort", "top_k", "approx_top_k", "shift_right_logical",
    "bitcast_convert_type", "sign", "log", "abs", "is_finite", "erfc", "name",
    "random_split", "random_seed", "random_clone", "min", "le", "reduce_prod",
    "dynamic_update_slice", "conj", "stack", "unstack", "reduce_window_max",
    "reduce_window_sum", "select_and_scatter_add", "tile", "floor", "rem", "cond",
    "empty2", "log1p", "argmax", "xor", "not", "scatter-max", "dynamic_slice",
    "erf_inv", "ppermute", "psum", "reduce_and", "reshard", "shard_map", "while",
    "sharding_constraint",
]  # fmt: skip


def test_every_primitive_that_real_train_steps_were_seen_to_have_is_read():
    assert set(_MET) - _read() == set()
