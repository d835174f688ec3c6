"""Plan and strategy files: round trips, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os

import pytest
from helpers.plans import document

from autoshard.ir.errors import (
    InputError,
    NameUnknownError,
    OutputError,
    PlanMismatchError,
)
from autoshard.plan.files import (
    load_plan,
    load_strategy,
    plan_from_json,
    plan_to_json,
    save_plan,
    strategy_names,
    write_atomically,
)
from autoshard.plan.schema import Plan


@pytest.fixture
def text():
    return plan_to_json(Plan.model_validate(document()))


def test_saved_loaded_and_saved_again_is_byte_identical(text, tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    save_plan(plan_from_json(text), first)
    load_plan(first).save(second)
    assert first.read_bytes() == second.read_bytes() == text.encode()


def test_keys_are_sorted(text):
    keys = list(json.loads(text))
    assert keys == sorted(keys)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_at_any_point(text, share):
    with pytest.raises(InputError, match="may be truncated"):
        plan_from_json(text[: int(len(text.rstrip()) * share)])


def test_another_schema_version():
    with pytest.raises(PlanMismatchError, match="has schema version 2"):
        plan_from_json(json.dumps(document(schema_version=2)))


def test_json_that_is_no_plan():
    with pytest.raises(InputError, match="no 'schema_version'"):
        plan_from_json("[1, 2]")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"axes": [{"axis": "data", "size": "two"}]}, "axes.0.size"),
        ({"surprise": 1}, "surprise"),
        ({"constraints": [{"address": "add#0"}]}, "constraints.0.slot"),
        ({"notes": None}, "notes"),
    ],
)
def test_broken_by_hand_names_the_field(change, said):
    with pytest.raises(InputError) as caught:
        plan_from_json(json.dumps(document(**change)), "plan p.json")
    assert said in str(caught.value)
    assert "plan p.json" in str(caught.value)


def test_a_missing_field_is_named():
    plan = document()
    del plan["certificate"]
    with pytest.raises(InputError, match="certificate"):
        plan_from_json(json.dumps(plan))


def test_a_plan_has_no_holes():
    plan = document()
    plan["strategy"]["mesh"]["data"] = "auto"
    with pytest.raises(InputError, match=r"mesh\.data is 'auto'"):
        plan_from_json(json.dumps(plan))
    plan = document()
    plan["strategy"]["schedule"]["remat"] = "mix"
    with pytest.raises(InputError, match=r"no holes, but its remat is 'mix'"):
        plan_from_json(json.dumps(plan))


def test_an_axis_twice_in_one_tensor():
    plan = document()
    plan["tensors"][0]["storage"] = [["data"], ["data"]]
    with pytest.raises(InputError, match="used twice"):
        plan_from_json(json.dumps(plan))


def test_a_plan_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_plan(tmp_path / "no.json")


def test_writing_fails_without_leaving_anything(tmp_path, monkeypatch):
    target = tmp_path / "plan.json"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="it is a directory"):
        write_atomically(tmp_path, "x")
    with pytest.raises(OutputError, match="does not exist"):
        write_atomically(tmp_path / "no" / "plan.json", "x")


@pytest.mark.parametrize("name", strategy_names())
def test_shipped_strategies_load_and_are_cited(name):
    strategy = load_strategy(name)
    assert strategy.name == name
    assert strategy.about.endswith(".")
    assert strategy.cite


def test_unknown_strategy_names_the_close_one():
    with pytest.raises(NameUnknownError, match="Did you mean 'fsdp'"):
        load_strategy("fdsp")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("mesh = [", "cannot be read"),
        ("[mesh]\nfoo = 2\n", "unknown mesh axis 'foo'"),
        ("[mesh]\ndata = 0\n", "mesh.data"),
        ('[mesh]\ndata = 2\n[rules]\nbatch = ["tensor"]\n', "[mesh] does not name"),
        ('[mesh]\ndata = 2\n[rules]\nbatch = ["data", "data"]\n', "an axis twice"),
        ('[mesh]\ndata = 2\n[storage]\nweights = ["data"]\n', "storage.weights"),
        ('[mesh]\ndata = 2\n[schedule]\nremat = "half"\n', "schedule.remat"),
        ('[mesh]\ndata = 2\n[schedule]\npipeline = "1f2b"\n', "schedule.pipeline"),
    ],
)
def test_strategy_files_that_cannot_be_used(tmp_path, body, said):
    path = tmp_path / "mine.toml"
    path.write_text(f'name = "mine"\nabout = "Mine."\n{body}')
    with pytest.raises((InputError, NameUnknownError)) as caught:
        load_strategy(str(path))
    assert said in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_a_strategy_of_ones_own_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nabout = "Mine."\n[mesh]\ndata = 2\ntensor = "auto"\n'
        '[rules]\nbatch = ["data"]\nseq.residual = ["tensor"]\n'
    )
    strategy = load_strategy(str(path))
    assert [r.logical for r in strategy.rules] == ["batch", "seq.residual"]
