"""A fit finds the constants that made the times."""

from __future__ import annotations

import dataclasses
import importlib
import math

import numpy as np
import pytest
from helpers.runs import LLAMA, run

from autoshard.cost.constants import Constants, table
from autoshard.cost.run import Layout, Recompute, Runs
from autoshard.cost.step import predict
from autoshard.validation.fit import fit, left_out
from autoshard.validation.rows import Row

SPREAD = {c.name: c.spread for c in table()}


def made(constants, *several, source="made"):
    """Rows of runs that took what the model says with some constants."""
    took = predict(Runs.of(several), constants).step_s
    return [
        Row(source, line, "a model", "h100", each, float(s), None, False, True, "")
        for line, (each, s) in enumerate(zip(several, took, strict=True), start=2)
    ]


def changed(**changes):
    named = {name.replace("__", "."): by for name, by in changes.items()}
    prior = Constants.priors().values
    assert set(named) <= set(prior)
    return Constants({name: v * named.get(name, 1.0) for name, v in prior.items()})


def varied():
    """Runs of one H100 software in which each of the constants below is seen."""
    small = dataclasses.replace(LLAMA, layers=16, embed=2048, heads=16, mlp=8192)
    found = []
    for decoder in (LLAMA, small):
        for seq, micro in ((1024, 8), (4096, 2), (32768, 1)):
            for layout in (
                Layout(data=8, shard=8, zero=1, microbatch=micro, microbatches=4),
                Layout(data=8, shard=8, zero=3, microbatch=micro),
                Layout(data=2, shard=2, zero=1, tensor=4, microbatch=micro),
                Layout(
                    data=8,
                    shard=8,
                    zero=3,
                    microbatch=micro,
                    recompute=Recompute.full(),
                ),
            ):
                found.append(run(layout, decoder=decoder, seq=seq, by="torchtitan"))
    return found


@pytest.fixture(scope="module")
def truth():
    return changed(
        attention__flash3_hopper=0.75,
        traffic__compiler=1.5,
        gather__interference=1.4,
        network__gpu=1.3,
        step__fixed_s=2.0,
    )


def test_a_fit_without_priors_finds_the_constants_that_made_the_times(
    truth, monkeypatch
):
    module = importlib.import_module("autoshard.validation.fit")
    monkeypatch.setattr(module, "PRIOR_WEIGHT", 0.003)
    found, priors = fit(made(truth, *varied())), Constants.priors()
    for name in truth.values:
        if truth[name] != priors[name]:
            assert found[name] == pytest.approx(truth[name], rel=0.01), name


def test_priors_hold_a_fit_back_less_the_more_rows_there_are(truth):
    """Of the constant that nothing else can stand in for."""
    name = "attention.flash3_hopper"
    prior = Constants.priors()[name]
    found = [prior, *(fit(made(truth, *varied() * n))[name] for n in (1, 8))]
    assert prior > found[1] > found[2] > truth[name]


def test_a_fit_predicts_better_than_the_priors(truth):
    rows = made(truth, *varied())
    runs = Runs.of([row.run for row in rows])
    measured = np.array([row.measured_s for row in rows])
    errors = [
        np.abs(np.log(predict(runs, constants).step_s / measured))
        for constants in (fit(rows), Constants.priors())
    ]
    assert np.median(errors[0]) < np.median(errors[1]) / 2


def test_what_no_row_depends_on_stays_at_its_prior(truth):
    found = fit(made(truth, *varied()))
    priors = Constants.priors()
    for name in ("matmul.v5e", "attention.tpu", "host.layer_s", "pipeline.zero_bubble"):
        assert found[name] == pytest.approx(priors[name], rel=1e-6)


def test_times_of_the_priors_leave_the_priors_alone():
    found = fit(made(Constants.priors(), *varied()))
    for name, prior in Constants.priors().values.items():
        assert found[name] == pytest.approx(prior, rel=1e-4), name


def test_a_fit_ends_where_it_ends_from_any_start(truth):
    rows = made(truth, *varied())
    one, other = fit(rows), fit(rows, truth)
    for name, spread in SPREAD.items():
        assert abs(math.log(one[name] / other[name])) < 0.05 * spread, name


def test_one_row_that_is_wrong_moves_little(truth):
    """Its pull does not grow with its error."""
    rows = made(truth, *varied() * 2)
    wrong = [dataclasses.replace(rows[0], measured_s=10 * (rows[0].measured_s or 0))]
    worse = [dataclasses.replace(rows[0], measured_s=1e6 * (rows[0].measured_s or 0))]
    clean, a, b = fit(rows), fit(wrong + rows[1:]), fit(worse + rows[1:])
    for name, spread in SPREAD.items():
        assert abs(math.log(a[name] / clean[name])) < 0.25 * spread, name
        assert abs(math.log(b[name] / a[name])) < 0.05 * spread, name


def test_a_source_is_predicted_by_the_others(truth):
    """Three sources agree; what the fourth says of itself changes nothing."""
    several = varied()[::3]
    sources = [
        row for name in ("a", "b", "c") for row in made(truth, *several, source=name)
    ]
    other = made(changed(traffic__compiler=0.3), *several, source="d")
    slower = [dataclasses.replace(r, measured_s=2 * (r.measured_s or 0)) for r in other]
    found = left_out(sources + other, truth)
    again = left_out(sources + slower, truth)
    own = slice(len(sources), None)
    assert found[own] == pytest.approx(again[own])
    alone = predict(Runs.of(several), fit(sources, truth)).step_s
    assert found[own] == pytest.approx(alone)
    assert not np.allclose(found[: len(sources)], again[: len(sources)], rtol=1e-3)


def test_the_only_source_is_predicted_by_the_priors(truth):
    rows = made(truth, *varied()[:4])
    expected = predict(Runs.of(varied()[:4]), Constants.priors()).step_s
    assert left_out(rows, truth) == pytest.approx(expected)
