"""Predictions held against a directory of runs: what is counted, and how."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from helpers.published import published, write

import autoshard as ash
from autoshard import api
from autoshard.cost.constants import Constants
from autoshard.cost.run import Runs
from autoshard.cost.step import predict
from autoshard.ir.errors import InputError
from autoshard.validation import read, validate

PUBLISHED = Path(__file__).parents[2] / "benchmarks/published"


def predicted(folder):
    """Seconds of each row of a directory, each predicted by itself."""
    rows, _ = read(folder)
    return [float(predict(Runs.of([row.run])).step_s[0]) for row in rows]


PLANS = [
    {"tp": 1, "dp": 64},
    {"tp": 1, "dp": 64, "zero_stage": 3},
    {"tp": 1, "dp": 64, "zero_stage": 3, "recompute": "full"},
    {"tp": 2, "dp": 32},
    {"tp": 8, "dp": 8, "micro_batch": 2},
    {"tp": 8, "dp": 8, "pp": 1, "recompute": "full"},
]


def measured_as(folder, factors, name="runs", **more):
    """A table of plans that took so many times what is predicted of them."""
    rows = [published(**plan, **more) for plan in PLANS]
    apart = folder / "apart"
    apart.mkdir(exist_ok=True)
    times = predicted(write(apart, *rows))
    rows = [
        {**row, "step_time_s": repr(time / factor)}
        for row, time, factor in zip(rows, times, factors, strict=True)
    ]
    return write(folder, *rows, name=name), rows


def test_runs_that_took_what_is_predicted(tmp_path):
    folder, _ = measured_as(tmp_path, [1.0] * 6)
    found = validate(folder)
    assert (found.clean.time.rows, found.used, found.out) == (6, 1.0, ())
    assert found.clean.time.p90 == pytest.approx(0, abs=1e-12)
    assert found.kendall == pytest.approx(1)
    assert found.regret == pytest.approx(0)


def test_errors_are_of_predicted_over_measured(tmp_path):
    factors = [0.9, 1.1, 1.2, 0.8, 1.05, 1.5]
    folder, _ = measured_as(tmp_path, factors)
    found = validate(folder).clean
    sizes = sorted(abs(f - 1) for f in factors)
    assert found.time.median == pytest.approx((sizes[2] + sizes[3]) / 2)
    # Of six, the 90th percentile is half-way from the fifth to the sixth.
    assert found.time.p90 == pytest.approx((sizes[4] + sizes[5]) / 2)
    signed = sorted(f - 1 for f in factors)
    assert found.time.bias == pytest.approx((signed[2] + signed[3]) / 2)
    assert found.left_out is None


def test_regret_of_a_plan_that_is_predicted_fastest_and_is_not(tmp_path):
    rows = [published(**plan) for plan in PLANS]
    times = predicted(write(tmp_path, *rows))
    best = int(np.argmin(times))
    slowed = [0.5 if i == best else 1.0 for i in range(6)]
    folder, _ = measured_as(tmp_path, slowed)
    found = validate(folder)
    assert len(found.groups) == 1
    fastest = min(time / f for time, f in zip(times, slowed, strict=True))
    assert found.regret == pytest.approx(times[best] / 0.5 / fastest - 1)


def test_sources_and_chips_are_counted_apart(tmp_path):
    measured_as(tmp_path, [1.25] * 6, name="a")
    folder, _ = measured_as(tmp_path, [0.5] * 6, name="b", chip="H200")
    found = validate(folder)
    assert [(p.name, p.time.rows) for p in found.sources] == [("a", 6), ("b", 6)]
    assert [p.name for p in found.chips] == ["h100", "h200"]
    for parts in (found.sources, found.chips):
        assert [p.time.median for p in parts] == pytest.approx([0.25, 0.5])
        assert [p.time.bias for p in parts] == pytest.approx([0.25, -0.5])


def test_doubtful_rows_are_predicted_and_counted_apart(tmp_path):
    rows = [published(), published(precision="fp8"), published(notes="noise")]
    found = validate(write(tmp_path, *rows))
    assert len(found.rows) == 3
    assert found.clean.time.rows == 1
    assert found.doubtful.time.rows == 2
    assert [p.row.doubt for p in found.rows][1:] == [
        "eight bits",
        "its source warns of noise",
    ]
    assert sum(p.time.rows for p in found.sources) == 1


def test_rows_left_out_are_counted_by_reason(tmp_path):
    bad = published(chip="abacus")
    write(tmp_path, published(), bad, bad, published(n_layers=""), name="a")
    found = validate(write(tmp_path, published(framework="by hand"), name="b"))
    assert found.reasons()[0] == ("a", "chip 'abacus' is not in the catalogue", 2)
    assert sorted(found.reasons()[1:]) == [
        ("a", "not given: n_layers", 1),
        ("b", "software 'by hand' is not known", 1),
    ]
    assert [(p.name, p.time.rows, p.out) for p in found.sources] == [
        ("a", 1, 3),
        ("b", 0, 1),
    ]
    # One of the four rows that say everything is used.
    assert found.used == pytest.approx(1 / 4)


def test_out_of_memory_is_told_of_sources_that_mark_it(tmp_path):
    """One does not fit and failed, one fits and failed; of those that ran, all fit."""
    large = {"n_chips": 8, "dp": 8, "tp": 1, "zero_stage": 0, "global_batch_seqs": 8}
    wide = {**large, "micro_batch": 64, "global_batch_seqs": 512}
    failed = {"step_time_s": "", "notes": "OOM"}
    small = {
        "n_layers": 4, "d_model": 512, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64,
        "d_ff": 1024, "vocab": 1000, "params_b": "", "seq_len": 512,
    }  # fmt: skip
    write(
        tmp_path,
        published(**wide, **failed),
        published(**small, **failed),
        published(**small),
        published(**small),
        name="marks",
    )
    found = validate(write(tmp_path, published(**wide), name="does_not"))
    assert (found.fits.failed, found.fits.ran) == (2, 2)
    assert found.fits.recall == 0.5
    assert found.fits.precision == 1.0
    # What failed has no error.
    assert found.clean.time.rows == 3


def test_errors_of_memory(tmp_path):
    folder = write(tmp_path, published(peak_mem_gib=40), published())
    found = validate(folder)
    row = found.rows[0]
    assert found.clean.memory.rows == 1
    assert found.clean.memory.median == pytest.approx(
        abs(row.memory_bytes / (40 * 2**30) - 1)
    )


def test_the_order_of_rows_does_not_matter(tmp_path):
    factors = [0.9, 1.1, 1.2, 0.8, 1.05, 1.5]
    folder, rows = measured_as(tmp_path, factors)
    one = validate(folder)
    order = list(range(6))
    random.Random(0).shuffle(order)
    other = validate(write(folder, *(rows[i] for i in order)))
    assert other.clean.time == one.clean.time
    assert other.groups == one.groups
    steps = [p.step_s for p in one.rows]
    assert [p.step_s for p in other.rows] == [steps[i] for i in order]


def test_sources_do_not_change_each_other(tmp_path):
    folder, _ = measured_as(tmp_path, [1.1] * 6, name="a")
    alone = validate(folder).sources[0]
    measured_as(tmp_path, [0.3] * 6, name="b", chip="B200")
    both = validate(folder).sources[0]
    assert both.name == alone.name == "a"
    assert both.time.median == pytest.approx(alone.time.median)
    assert both.time.rows == alone.time.rows


def test_each_source_left_out(tmp_path):
    """What other sources say decides: constants of slower chips make slower runs."""
    measured_as(tmp_path, [0.5] * 6, name="a")
    folder, _ = measured_as(tmp_path, [1.0] * 6, name="b")
    told = []
    found = validate(folder, leave_one_out=True, log=told.append)
    assert told == [
        "12 rows to predict, 0 left out",
        "fitting 2 times, each without one source",
    ]
    a, b = found.sources
    assert a.left_out is not None
    assert b.left_out is not None
    assert (a.left_out.rows, b.left_out.rows) == (6, 6)
    by_a = [p.left_out_s or 0.0 for p in found.rows if p.row.source == "b"]
    by_b = [p.left_out_s or 0.0 for p in found.rows if p.row.source == "a"]
    assert all(slow > fast for slow, fast in zip(by_a, by_b, strict=True))


def test_other_constants(tmp_path):
    folder = write(tmp_path, published())
    one = validate(folder)
    other = validate(folder, constants=Constants.priors())
    assert one.rows[0].step_s == predicted(folder)[0]
    assert one.rows[0].step_s != other.rows[0].step_s


def test_plain_values(tmp_path):
    folder, _ = measured_as(tmp_path, [1.1] * 6)
    write(folder, published(chip="abacus"), published(), name="other")
    found = validate(folder)
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["clean"]["time"]["rows"] == 7
    assert plain["used"] == found.used
    assert plain["fits"]["recall"] is None
    assert len(plain["rows"]) == 7
    assert plain["rows"][0]["predicted_s"] == found.rows[0].step_s
    assert plain["rows"][0]["measured_s"] == found.rows[0].row.measured_s
    assert plain["left_out"] == [
        {
            "source": "other",
            "reason": "chip 'abacus' is not in the catalogue",
            "rows": 1,
        }
    ]
    assert plain["groups"][0]["plans"] == 6


# --- wrong input ---


def test_a_directory_without_a_usable_row(tmp_path):
    write(tmp_path, published(chip="abacus"), published(n_layers=""))
    with pytest.raises(InputError, match="no row that can be predicted; the first is"):
        validate(tmp_path)


def test_a_table_without_rows(tmp_path):
    with pytest.raises(InputError, match=r"holds no row that can be predicted$"):
        validate(write(tmp_path))


def test_only_failed_rows(tmp_path):
    found = validate(write(tmp_path, published(step_time_s="", notes="OOM")))
    assert found.clean.time.rows == 0
    assert np.isnan(found.kendall)
    assert np.isnan(found.used)
    assert found.fits.failed == 1
    json.dumps(found.as_dict(), allow_nan=False)


# --- the collection ---


@pytest.fixture(scope="module")
def collection():
    return validate(PUBLISHED)


def test_most_rows_of_the_collection_are_used(collection):
    assert collection.used >= 0.9


def test_errors_on_the_collection(collection):
    """A guard; what is aimed at is below it."""
    assert collection.clean.time.rows >= 600
    assert collection.clean.time.median < 0.06
    assert collection.clean.time.p90 < 0.22


def test_counts_of_the_collection_agree(collection):
    timed = [p for p in collection.rows if p.row.measured_s]
    parts = (collection.clean, collection.doubtful)
    assert sum(p.time.rows for p in parts) == len(timed)
    for several in (collection.sources, collection.chips):
        assert sum(p.time.rows for p in several) == collection.clean.time.rows
    assert sum(p.out for p in collection.sources) == len(collection.out)
    assert sum(n for *_, n in collection.reasons()) == len(collection.out)


def test_predictions_of_the_collection_are_times_and_bytes(collection):
    for p in collection.rows:
        assert 0 < p.step_s < 1e5
        assert 0 < p.memory_bytes < 1e15


def test_rows_of_the_collection_are_predicted_each_by_itself(collection):
    for p in collection.rows[::97]:
        alone = predict(Runs.of([p.row.run])).step_s[0]
        assert alone == pytest.approx(p.step_s)


# --- from above ---


def test_validate_of_the_api(tmp_path):
    folder = write(tmp_path, published())
    told = []
    found = api.validate(str(folder), log=told.append)
    assert told == ["1 rows to predict, 0 left out"]
    assert found.as_dict() == validate(folder).as_dict()
    with pytest.raises(InputError, match="is not a directory"):
        api.validate(str(tmp_path / "nowhere"))
    assert ash.validate is api.validate
