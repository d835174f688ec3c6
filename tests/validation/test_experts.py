"""Published layouts against what is found for their model, chips and batch."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autoshard.cost.memory import memory, too_large
from autoshard.cost.run import Layout, Recompute, Runs
from autoshard.cost.step import predict
from autoshard.validation import read

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import _expert_grid  # noqa: E402
import _expert_plans  # noqa: E402
import experts  # noqa: E402

TRACED = (
    ("alpa_gpt_moe", 48),
    ("internevo", 18),  # optimizer state sharded in groups of replicas
    ("llm_foundry", 62),
)
"""Rows whose layouts fit on few chips."""


@pytest.fixture(scope="module")
def published():
    rows, _ = read(BENCHMARKS / "published")
    return {(row.source, row.line): row for row in rows}


def test_what_is_found_is_never_slower_than_published(published):
    rows = [published[name] for name in TRACED]
    found = list(_expert_plans.compare(rows, [1.0] * len(rows)))
    for each in found:
        assert each.fits, each.row
        assert experts.outcome(each).startswith("never slower"), each
    figures = experts.plans_figures(found)
    assert figures["compared"] == figures["never_slower"] == len(TRACED)
    assert not figures["violations"]


def test_a_layout_becomes_the_fields_that_make_it():
    layout = Layout(
        data=8, shard=4, zero=1, tensor=4, sequence=True, microbatches=2,
        recompute=Recompute.full(),
    )  # fmt: skip
    assert _expert_plans.pins_of(layout, ("data", "fsdp", "context", "tensor")) == {
        "data": 2,
        "fsdp": 4,
        "context": 1,
        "tensor": 4,
        "microbatches": 2,
        "remat": "full",
        "storage.params": (),
        "storage.gradients": (),
        "storage.optimizer": ("fsdp",),
        "rules.heads": ("tensor",),
        "rules.mlp": ("tensor",),
        "rules.seq.residual": ("tensor",),
    }


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout(stage=2), "pipeline stages"),
        (Layout(recompute=Recompute(attention=1.0)), "parts of a block"),
        (Layout(recompute=Recompute(offloaded=1.0)), "the host's memory"),
        (Layout(data=4, microbatch=0.5), "fewer sequences"),
        (Layout(data=6, shard=4, zero=3), "state sharded 4 ways over 6 x 1"),
    ],
)
def test_what_no_plan_expresses_is_said(layout, reason):
    with pytest.raises(_expert_plans.NotExpressedError, match=reason):
        _expert_plans.pins_of(layout, ("data", "fsdp", "context", "tensor"))


def test_a_row_left_out_is_given_back_with_its_reason(published):
    row = published[TRACED[0]]
    frozen = replace(row.run, layout=replace(row.run.layout, frozen=True))
    row = replace(row, run=frozen)
    told = [(row, "frozen weights (LoRA)")]
    assert list(_expert_plans.compare([row], [1.0])) == told


def test_a_pipeline_becomes_the_fields_that_make_it():
    axes = ("stage", "data", "fsdp", "context", "tensor")
    for schedule, virtual, name in [
        ("1f1b", 1, "1f1b"),
        ("interleaved", 2, "interleaved"),
        ("zb-2p", 1, "zb-h2"),
    ]:
        layout = Layout(stage=4, schedule=schedule, virtual=virtual, microbatches=8)
        pins = _expert_plans.pins_of(layout, axes)
        assert (pins["stage"], pins["pipeline"]) == (4, name)
        assert pins["virtual"] == virtual
    with pytest.raises(_expert_plans.NotExpressedError, match="zb-1p"):
        _expert_plans.pins_of(Layout(stage=4, schedule="zb-1p"), axes)


def test_the_grid_is_priced_as_its_layouts_are(published):
    run = published["dgxc_benchmarking", 8].run
    kept = _expert_grid.policies([run])
    cells = np.array(list(_expert_grid.cells(run, len(kept))), dtype=np.float64)
    some = cells[np.random.default_rng(0).choice(len(cells), 200, replace=False)]
    layouts = [_expert_grid.layout_of(run, cell, kept) for cell in some]
    assert len({layout.stage for layout in layouts}) > 3
    assert all(layout.chips == run.layout.chips for layout in layouts)
    one_by_one = Runs.of([replace(run, layout=layout) for layout in layouts])
    assert {round(r.tokens) for r in one_by_one.runs} == {round(run.tokens)}
    at_once = _expert_grid.gathered(run, some, kept)
    np.testing.assert_array_equal(predict(at_once).step_s, predict(one_by_one).step_s)
    np.testing.assert_array_equal(
        memory(at_once).peak_bytes, memory(one_by_one).peak_bytes
    )
    np.testing.assert_array_equal(too_large(at_once), too_large(one_by_one))


def test_the_best_of_the_grid_is_never_slower(published):
    row = published["zero_bubble", 2]
    [best] = _expert_grid.compare([row])
    assert best.inside
    assert best.fits
    assert best.found_s <= best.published_s
    assert sum(best.terms_s.values()) == pytest.approx(best.found_s - best.published_s)
