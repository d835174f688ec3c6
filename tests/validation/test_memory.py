"""Constants of memory from runs that were made with known ones; published peaks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autoshard.cost.constants import Constants, table
from autoshard.cost.decoder import Decoder
from autoshard.cost.memory import too_large
from autoshard.cost.run import Layout, Recompute, Run, Runs
from autoshard.cost.software import SOFTWARE
from autoshard.plan.cluster import cluster
from autoshard.validation.fit import fit_memory
from autoshard.validation.memory import printed_bytes
from autoshard.validation.metrics import Errors, Fits
from autoshard.validation.rows import Row, read

PUBLISHED = Path(__file__).parents[2] / "benchmarks/published"
SMALL = Decoder(16, 2048, 16, 16, 128, 8192, 128000)


def rows(true, noise=0.0):
    """Runs of each software, with the memory that they have by some constants."""
    made = []
    for name, zero, microbatch, full in itertools.product(
        ("nanotron", "internevo", "torchtitan", "megatron-2021", "alpa"),
        (0, 1),
        (1, 4, 16),
        (False, True),
    ):
        layout = Layout(
            data=8,
            shard=8 if zero else 1,
            zero=zero,
            microbatch=microbatch,
            recompute=Recompute.full() if full else Recompute(),
        )
        run = Run(SMALL, cluster("h100:8"), layout, 2048, SOFTWARE[name])
        made.append(
            Row(
                source=str(len(made)),
                line=2,
                model="small",
                chip="h100",
                run=run,
                measured_s=None,
                memory_bytes=1.0,
                out_of_memory=False,
                clean=True,
                doubt="",
            )
        )
    rng = np.random.default_rng(0)
    found = printed_bytes(made, true) * np.exp(noise * rng.standard_normal(len(made)))
    return [replace(r, memory_bytes=float(b)) for r, b in zip(made, found, strict=True)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory.logits_copied", 18.0),
        ("memory.logits_in_place", 9.0),
        ("memory.update", 14.0),
    ],
)
def test_a_constant_is_found_again(name, value):
    priors = Constants.priors()
    true = Constants({**priors.values, name: value})
    found = fit_memory(rows(true))
    # Nearer to it than a fifth of the way to the prior, which pulls.
    assert abs(np.log(found[name] / value)) < 0.2 * abs(np.log(priors[name] / value))


def test_one_bad_figure_in_sixty_changes_little():
    true = Constants({**Constants.priors().values, "memory.logits_copied": 18.0})
    made = rows(true, noise=0.01)
    made[0] = replace(made[0], memory_bytes=10 * made[0].memory_bytes)
    assert fit_memory(made)["memory.logits_copied"] == pytest.approx(18.0, rel=0.06)


def test_other_constants_stay():
    start = Constants.shipped()
    found = fit_memory(rows(Constants.priors())[:10], start)
    for c in table():
        if not c.name.startswith("memory."):
            assert found[c.name] == start[c.name]


# --- published rows: the bars that the project holds itself to ---


@pytest.fixture(scope="module")
def published():
    return read(PUBLISHED)[0]


def test_published_peaks(published):
    found = [
        r
        for r in published
        if r.memory_bytes
        and not r.out_of_memory
        and (r.clean or r.source != "ultrascale_playbook" or "pipeline" in r.doubt)
    ]
    errors = Errors.of(printed_bytes(found), [r.memory_bytes for r in found])
    assert errors.rows > 700
    assert errors.median < 0.1
    assert abs(errors.bias) < 0.05


def test_published_failures(published):
    marked = {r.source for r in published if r.out_of_memory}
    assert marked == {"alpa_gpt_moe", "bigscience"}
    found = [r for r in published if r.source in marked]
    fits = Fits.of(
        too_large(Runs.of([r.run for r in found])), [r.out_of_memory for r in found]
    )
    assert fits.recall >= 0.95
    assert fits.precision >= 0.95


def test_no_rows_have_no_memory():
    assert printed_bytes([]).shape == (0,)
