"""Seconds of kernels, counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cost.test_price import pricer
from propagate.programs import shape

from autoshard.cost import estimate
from autoshard.cost.collectives import Meshes
from autoshard.cost.rates import SCRATCH_BYTES, WINDOW_S, Rates
from autoshard.ir.errors import InputError
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import cluster

V5E = cluster("v5e:2x4")
HBM = 819e9
PEAK = 197e12


def times(fn, *args, rates):
    found = pricer(fn, args)
    meshes = Meshes(V5E, np.ones((1, len(AXES)), np.int64))
    return [
        (t.kernel.kind, float(t.total_s[0]))
        for t in found.compute.times(meshes, np.ones(1), rates)
    ]


def half(*dims):
    return shape(*dims, dtype=jnp.bfloat16)


def test_a_loop_takes_its_bytes():
    plain = Rates(1.0, 0.0, HBM, HBM)
    ((kind, found_s),) = times(
        lambda x, y: x * y + 1, half(8, 4), half(8, 4), rates=plain
    )
    assert kind == "loop"
    assert found_s == pytest.approx(3 * 8 * 4 * 2 / HBM)


def test_a_product_takes_the_larger_of_arithmetic_and_traffic_or_their_sum():
    shapes = half(512, 256), half(1024, 512)
    flops = 2 * 1024 * 512 * 256
    moved = 2 * (512 * 256 + 1024 * 512 + 1024 * 256)
    for exposed in (0.0, 1.0):
        rates = Rates(0.5, 0.0, HBM, HBM, exposed=exposed)
        ((_, found_s),) = times(lambda w, x: x @ w, *shapes, rates=rates)
        parts = sorted((flops / (0.5 * PEAK), moved / HBM))
        assert found_s == pytest.approx(parts[1] + exposed * parts[0])


def test_the_compiler_counts_a_float32_for_each_element_written_narrower():
    rates = Rates(1.0, 0.0, HBM, HBM, scratch_bytes=4.0)
    ((_, narrow_s),) = times(lambda x: x * 2 + 1, half(8, 4), rates=rates)
    ((_, wide_s),) = times(lambda x: x * 2 + 1, shape(8, 4), rates=rates)
    assert narrow_s == pytest.approx(8 * 4 * (2 + 2 + 4) / HBM)
    assert wide_s == pytest.approx(8 * 4 * (4 + 4) / HBM)
    ((_, summed_s),) = times(lambda x: (x * x).sum(axis=1), shape(8, 4), rates=rates)
    assert summed_s == pytest.approx((8 * 4 * (4 + 4) + 8 * 4) / HBM)


def test_a_kernel_of_one_op_pays_for_its_windows():
    rates = Rates(1.0, 0.0, HBM, HBM, window_s=1e-6, window_elements=16.0)
    ((_, one_s),) = times(jnp.exp, shape(8, 4), rates=rates)
    ((_, two_s),) = times(lambda x: jnp.exp(x) + 1, shape(8, 4), rates=rates)
    assert two_s == pytest.approx(2 * 8 * 4 * 4 / HBM)
    assert one_s == pytest.approx(two_s + 2e-6)


@pytest.mark.parametrize(
    ("fn", "args", "cycles"),
    [
        # What libtpu 0.0.42 notes for v5e, at 1.5 GHz.
        (lambda x: x + 1, [shape(8192, 8192)], 1_225_260),
        (lambda x: x + 1, [half(8192, 8192)], 1_208_896),
        (jnp.exp, [shape(8192, 8192)], 2_021_440),
        (lambda x: (x * x).sum(), [shape(8192, 8192)], 1_208_896),
        (lambda x, y: jax.nn.silu(x) * y, [half(8192, 8192)] * 2, 1_500_768),
    ],
)
def test_the_view_of_the_compiler_is_that_of_its_notes(fn, args, cycles):
    found = times(fn, *args, rates=Rates.compiler(V5E))
    assert sum(s for _, s in found) == pytest.approx(cycles / 1.5e9, rel=0.1)


def test_the_view_is_known_for_tpus_alone():
    assert Rates.compiler(V5E).scratch_bytes == SCRATCH_BYTES
    assert Rates.compiler(V5E).window_s == WINDOW_S
    with pytest.raises(InputError, match="how a compiler estimates cycles of h100"):
        Rates.compiler(cluster("h100:8"))


def test_an_estimate_says_what_the_compiler_counts_where_that_is_known():
    found = pricer(lambda w, x: x @ w, [shape(64, 32), shape(128, 64)])
    rates = Rates.compiler(V5E)
    moved = 4 * (64 * 32 + 128 * 64 + 128 * 32) / rates.hbm_bytes_per_s
    peak = V5E.peak_flops_per_s("float32") * rates.product_share
    done = estimate(found, V5E, {}, 1.0)
    assert done.counted_compute_s == pytest.approx(moved + 2 * 128 * 64 * 32 / peak)
    assert estimate(found, cluster("h100:8"), {}, 1.0).counted_compute_s is None
