"""Link figures from times of a network whose figures are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from autoshard.cost.network import Fabric, Group, time_s
from autoshard.measure.fit import Sample, fit_link
from autoshard.plan.cluster import cluster

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "permute")
GROUPS = (Group(2.0), Group(8.0))


def samples(fabric, noise=0.0):
    rng = np.random.default_rng(0)
    return [
        Sample(
            kind,
            group,
            4.0**n,
            float(time_s(kind, 4.0**n, group, fabric))
            * float(np.exp(noise * rng.standard_normal())),
        )
        for kind in KINDS
        for group in GROUPS
        for n in range(7, 15)
    ]


@pytest.mark.parametrize("name", ["h200:8", "a100-80g:8"])
def test_the_figures_of_a_node_are_found_again(name):
    true = Fabric.of(cluster(name))
    found = fit_link(samples(true), true)
    reached = true.inner_bytes_per_s * true.inner_efficiency
    assert found.bytes_per_s == pytest.approx(reached, rel=0.02)
    assert found.latency_s == pytest.approx(true.inner_latency_s, rel=0.05)
    assert found.launch_s == pytest.approx(true.launch_s, rel=0.05)
    assert found.half_bytes == pytest.approx(true.inner_half_bytes, rel=0.05)
    if true.switch_efficiency:
        in_switch = true.inner_bytes_per_s * true.switch_efficiency
        got = found.bytes_per_s * found.switch_efficiency
        assert got == pytest.approx(in_switch, rel=0.02)
    assert found.error < 0.01


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_noise_of_the_times_moves_the_figures_no_more_than_it_is(noise):
    true = Fabric("cpu", 8.0, 4e9, 2e-6, 4e9, 2e-6, 1.0, launch_s=1e-5)
    found = fit_link(samples(true, noise), true)
    assert found.bytes_per_s == pytest.approx(4e9, rel=noise)
    assert found.error == pytest.approx(0.67 * noise, rel=0.4)  # median of a normal


def test_one_disturbed_time_does_not_count():
    true = Fabric("cpu", 8.0, 4e9, 2e-6, 4e9, 2e-6, 1.0, launch_s=1e-5)
    held_up = samples(true)
    held_up[5] = dataclasses.replace(held_up[5], seconds=100 * held_up[5].seconds)
    found = fit_link(held_up, true)
    assert found.bytes_per_s == pytest.approx(4e9, rel=0.05)
    assert found.error < 0.02
