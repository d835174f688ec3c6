"""How many chips are needed, against pricing every cluster."""

from __future__ import annotations

import pytest
from helpers.spaces import floats, mlp_step, of_mesh

from autoshard.ir.errors import AutoshardError, InfeasibleError, InputError
from autoshard.search.sizing import clusters_of, size
from autoshard.search.solver import Solver

STEP, BATCH = mlp_step(layers=2), floats(16, 32)
STRATEGY = of_mesh(
    "data", "fsdp", storage={"params": "auto", "gradients": "auto", "optimizer": "auto"}
)


def on(chips):
    return Solver(STEP, (BATCH,), chips, STRATEGY)


def sized(type_="cpu", tokens=None, bytes_=None):
    return size(
        on, type_, target_tokens_per_s=tokens, budget_bytes=bytes_, log=lambda _: None
    )


def smallest_peaks():
    """Chips and least bytes of every cluster that divides, the smallest first."""
    found = []
    for chips in clusters_of("cpu"):
        if chips.num_chips > 16:
            return found
        try:
            ranked = on(chips).explored().ranked
        except InfeasibleError:
            continue
        found.append((chips.num_chips, min(entry[1] for entry in ranked)))
    return found


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_the_smallest_cluster_within_a_budget(at):
    peaks = smallest_peaks()
    budget = peaks[at][1] * 1.001
    expected = next(chips for chips, peak in peaks if peak <= budget)
    found = sized(bytes_=budget)
    assert found.plan.cluster.num_chips == expected
    assert found.plan.predicted.memory.total <= budget
    counts = [tried.num_chips for tried in found.tried]
    assert counts == sorted(counts)
    assert all(tried.reason for tried in found.tried[:-1])
    assert not found.tried[-1].reason


def test_the_smallest_cluster_that_is_fast_enough():
    alone = sized(bytes_=1e12).plan.predicted.tokens_per_s
    found = sized(tokens=alone * 0.99)
    assert found.plan.cluster.num_chips == 1
    with pytest.raises(InfeasibleError, match=r"no cluster of cpu up to"):
        sized(tokens=alone * 1e9)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({}, "pass target_tokens_per_s, or budget_gib"),
        ({"tokens": 0}, "target_tokens_per_s = 0 .*positive"),
        ({"tokens": -1.0}, "positive"),
        ({"bytes_": 0.0}, "budget_gib = 0.0 .*positive"),
        ({"tokens": float("nan")}, "positive"),
    ],
)
def test_wrong_wishes(wanted, said):
    with pytest.raises(InputError, match=said):
        sized(**wanted)


def test_clusters_that_a_fixed_axis_does_not_suit_are_passed_over():
    def fixed(chips):
        return on(chips).pinned({"data": 4})

    found = size(
        fixed, "cpu", target_tokens_per_s=None, budget_bytes=1e12, log=lambda _: None
    )
    assert found.plan.cluster.num_chips == 4
    reasons = {tried.num_chips: tried.reason for tried in found.tried}
    assert "data = 4" in reasons[2]
    assert "2 chips of cpu:2" in reasons[2]


def test_a_type_that_does_not_exist():
    with pytest.raises(AutoshardError, match="h1000"):
        sized("h1000", tokens=1.0)
