"""Kernels: FLOPs and bytes counted by hand, and what no chip can beat."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.cost.constants import Constants
from autoshard.cost.kernels import (
    HBM_EFFICIENCY,
    fused_attention_s,
    product_s,
    share_of_peak,
    unfused_attention_s,
)

PEAK, HBM = 1e15, 3e12
dims = st.integers(1, 1 << 16)
shares = st.floats(0.05, 1.0)
halves = st.floats(0.0, 2000.0)


def product(m, k, n, share=1.0, half=0.0, peak=PEAK, hbm=HBM):
    return float(
        product_s(m, k, n, peak=peak, share=share, hbm=hbm, half_dim=half)
    )  # fmt: skip


# --- products ---


@given(dims, dims, dims, shares, halves)
def test_a_product_beats_neither_arithmetic_nor_memory(m, k, n, share, half):
    took = product(m, k, n, share, half) * (1 + 1e-12)
    assert took >= 2 * m * k * n / PEAK
    assert took >= 2 * (m * k + k * n + m * n) / HBM


@given(dims, dims, dims, shares, halves, st.integers(1, 4096), st.integers(0, 2))
def test_a_larger_product_is_no_faster(m, k, n, share, half, more, which):
    sizes = [m, k, n]
    sizes[which] += more
    rows, summed, columns = sizes
    took = product(m, k, n, share, half)
    assert product(rows, summed, columns, share, half) >= took * (1 - 1e-12)


@given(dims, dims, dims, shares, halves, shares, shares)
def test_a_lesser_chip_is_no_faster(m, k, n, share, half, slower, narrower):
    took = product(m, k, n, share, half)
    less = product(m, k, n, share, half, peak=PEAK * slower, hbm=HBM * narrower)
    assert less >= took * (1 - 1e-12)


@given(dims, dims, dims, shares, halves)
def test_the_operands_of_a_product_may_change_places(m, k, n, share, half):
    assert product(m, k, n, share, half) == pytest.approx(product(n, k, m, share, half))


@given(dims, dims, dims, shares, halves, st.integers(2, 8))
def test_parts_of_a_product_take_no_less_than_the_whole(m, k, n, share, half, parts):
    whole = product(m * parts, k, n, share, half)
    assert parts * product(m, k, n, share, half) >= whole * (1 - 1e-12)


def test_a_product_of_enough_arithmetic_runs_at_its_share_of_peak():
    assert product(8192, 8192, 8192, share=0.8) == pytest.approx(
        2 * 8192**3 / (0.8 * PEAK)
    )


def test_a_thin_product_runs_at_the_speed_of_memory():
    """A vector by a matrix reads the matrix: two bytes for two FLOPs."""
    bytes_ = 2 * (8192 * 8192 + 2 * 8192)
    assert product(1, 8192, 8192) == pytest.approx(bytes_ / (HBM * HBM_EFFICIENCY))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_half_dim_is_where_half_of_the_rate_is_reached(which):
    shape = [4096, 4096, 4096]
    shape[which] = 256
    at = product(*shape, half=256.0, hbm=1e30)
    assert at == pytest.approx(2 * product(*shape, half=0.0, hbm=1e30))


def test_a_faster_chip_needs_larger_tiles():
    """At twice the peak, twice the dim reaches half of the rate."""
    shape = (512, 4096, 4096)
    full = product(*shape, peak=2 * PEAK, hbm=1e30)
    at = product(*shape, half=256.0, peak=2 * PEAK, hbm=1e30)
    assert at == pytest.approx(2 * full)


def test_products_of_arrays_are_those_of_their_elements():
    m = np.array([1.0, 64.0, 4096.0])
    together = product_s(m, 512.0, 1024.0, peak=PEAK, share=1.0, hbm=HBM, half_dim=99.0)
    assert together.tolist() == [product(each, 512.0, 1024.0, half=99.0) for each in m]


# --- attention ---


def causal_flops(tokens, seq, heads, dim):
    """Scores and their sum of values, of the positions at or before each query."""
    flops = 0
    for start in range(0, tokens, seq):
        for query in range(min(seq, tokens - start)):
            flops += 2 * 2 * (query + 1) * heads * dim
    return flops


def test_fused_attention_skips_what_is_masked():
    tokens, seq, heads, dim = 4096, 1024, 8, 128
    took = fused_attention_s(
        tokens, seq, heads * dim, dim, peak=PEAK, share=0.5, half_head_dim=40.0
    )
    # Half of the square; the diagonal is one part in `seq` more.
    least = causal_flops(tokens, seq, heads, dim) / (0.5 * PEAK)
    assert took == pytest.approx(least, rel=1 / seq)


@given(st.sampled_from([32, 64, 128, 256]), st.floats(1.0, 200.0))
def test_narrow_heads_are_slower(dim, half):
    rates = {"peak": PEAK, "share": 0.5, "half_head_dim": half}
    wide = float(fused_attention_s(4096, 4096, 4096, 2 * dim, **rates))
    narrow = float(fused_attention_s(4096, 4096, 4096, dim, **rates))
    assert wide < narrow < 2 * wide


def test_half_head_dim_halves_the_rate_of_wide_heads():
    rates = {"peak": PEAK, "share": 0.5, "half_head_dim": 64.0}
    at = float(fused_attention_s(4096, 4096, 4096, 64, **rates))
    endless = float(fused_attention_s(4096, 4096, 4096, 1e12, **rates))
    assert at == pytest.approx(2 * endless)


def test_unfused_attention_skips_nothing_and_moves_its_scores():
    batch, seq, heads, dim = 2, 512, 8, 64
    flops = bytes_ = 0
    for _ in range(batch * heads):
        flops += 2 * (2 * seq * seq * dim)
        bytes_ += 4 * (2 * seq * seq)
    took = unfused_attention_s(
        batch * seq, seq, heads * dim, heads, peak=PEAK, share=0.5, hbm=HBM, traffic=1.5
    )  # fmt: skip
    assert took == pytest.approx(flops / (0.5 * PEAK) + 1.5 * bytes_ / HBM)


@given(dims, st.sampled_from([512, 4096, 32768]), shares)
def test_attention_is_linear_in_tokens_and_in_what_each_sees(tokens, seq, share):
    fused = {"peak": PEAK, "share": share, "half_head_dim": 40.0}
    one = float(fused_attention_s(tokens, seq, 4096, 128, **fused))
    assert float(fused_attention_s(3 * tokens, seq, 4096, 128, **fused)) == (
        pytest.approx(3 * one)
    )
    assert float(fused_attention_s(tokens, 2 * seq, 4096, 128, **fused)) == (
        pytest.approx(2 * one)
    )


# --- shares ---


def test_training_slows_gpus_alone():
    constants = Constants({"matmul.hopper": 0.8, "matmul.training": 0.5})
    assert share_of_peak("hopper", "gpu", constants) == pytest.approx(0.4)
    assert share_of_peak("hopper", "tpu", constants) == 0.8
