"""A few cases of `benchmarks/against_xla.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def suite():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(
            "against_xla", BENCHMARKS / "against_xla.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        import _suite

        yield module, _suite
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    "number", [1, 2, 3, *(pytest.param(k, marks=pytest.mark.slow) for k in (0, 4))]
)
def test_what_was_planned_is_emitted(suite, number):
    against_xla, programs = suite
    name, strategy, sizes = against_xla.CI[number]
    [case] = [
        case
        for case in programs.cases(programs.zoo()[name])
        if (case.strategy, against_xla.active(case)) == (strategy, sizes)
        and case.schedule == "plain"
    ]
    found = against_xla.run(case)
    assert "failed" not in found, found["failed"]
    for stage in against_xla.STAGES:
        assert found[stage]["fraction"] >= against_xla.BAR, found[stage]["differences"]
        assert against_xla.UNEXPLAINED not in found[stage]["causes_bytes"]
    assert found["rematerialized"] == []


def test_every_listed_case_exists(suite):
    against_xla, programs = suite
    known = {
        (case.program.name, case.strategy, against_xla.active(case))
        for program in programs.zoo().values()
        for case in programs.cases(program)
    }
    assert set(against_xla.CI) <= known
