"""`autoshard verify` and `search --verify`, compiled for virtual CPU devices."""

from __future__ import annotations

import json

import pytest
from helpers.plans import plan as toy_plan
from typer.testing import CliRunner

from autoshard.cli.app import app
from autoshard.plan.files import load_plan, plan_to_json, save_plan
from autoshard.plan.schema import ClusterRef
from autoshard.verify import targets


def cli(*args):
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="autoshard")


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "plan.json"
    found = cli(
        *("search", "llama3-tiny", "--cluster", "cpu:8", "--batch", 8, "--seq", 16),
        *("--strategy", "megatron-sp", "--dtype", "f32", "-o", path),
    )
    assert found.exit_code == 0, found.output
    return path


def test_tables_for_people(plan_file):
    result = cli("verify", plan_file)
    assert result.exit_code == 0, result.output
    for words in ("host host:8", "memory at the peak", "as planned", "of them alike"):
        assert words in result.stdout
    assert "compiling for host host:8" in result.stderr


def test_json_for_programs(plan_file):
    result = cli("verify", plan_file, "--target", "host", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    moved = found["collectives"]
    assert moved["unexplained"] == 0
    assert moved["planned_bytes"] == sum(r["planned_bytes"] for r in moved["rows"])
    assert moved["emitted_bytes"] <= sum(r["emitted_bytes"] for r in moved["rows"])
    assert 0 < moved["exact_fraction"] <= moved["fraction"] <= 1
    assert found["fits"] is None
    memory = found["memory"]["compiled"]
    given = memory["argument_bytes"] + memory["output_bytes"] - memory["alias_bytes"]
    assert memory["peak_bytes"] == given + memory["temp_bytes"]
    assert found["blocks_compiled"] == []


def test_one_block_alone(plan_file):
    result = cli("verify", plan_file, "--blocks", 1, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["blocks_compiled"] == [1]


def test_a_plan_is_repaired_and_written(plan_file, tmp_path):
    bare, mended = tmp_path / "bare.json", tmp_path / "mended.json"
    save_plan(load_plan(plan_file).model_copy(update={"constraints": ()}), bare)
    result = cli("verify", bare, "--repair", "-o", mended, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["repaired"]
    assert len(load_plan(mended).constraints) == found["constraints_added"] > 0


def test_what_needs_no_repair_is_not_written(plan_file, tmp_path):
    out = tmp_path / "new.json"
    result = cli("verify", plan_file, "--repair", "-o", out)
    assert result.exit_code == 0, result.output
    assert "moves nothing that is not planned" in result.stderr
    assert not out.exists()


def moved_to(plan_file, tmp_path, name):
    plan = load_plan(plan_file)
    where = ClusterRef(name=name, fingerprint="0", num_chips=8)
    path = tmp_path / "moved.json"
    save_plan(plan.model_copy(update={"cluster": where}), path)
    return path


@pytest.mark.parametrize(
    ("cluster", "options", "words"),
    [
        ("cpu:8", ("--target", "npu"), "unknown target 'npu'"),
        ("cpu:8", ("--target", "tpu"), "use --target host"),
        ("cpu:8", ("--blocks", "7"), "--blocks must be auto, full, 1 or 2"),
        ("cpu:8", ("--repair",), "--repair writes to -o NEW"),
        ("cpu:8", ("-o", "x.json"), "-o is for --repair"),
        ("v5e:3x5", (), "does not come as 3x5"),
        ("mine:8", (), "no compiler knows"),
        ("v100-16g:1x8", (), "cannot be asked about"),
    ],
)
def test_wrong_input(cluster, options, words, plan_file, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "require_compiler", lambda kind: None)
    path = moved_to(plan_file, tmp_path, cluster)
    result = cli("verify", path, *options)
    assert result.exit_code == 3, result.output
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("cluster", "kind"), [("v5e:2x4", "tpu"), ("h100:1x8", "gpu")])
def test_a_missing_extra(cluster, kind, plan_file, tmp_path, monkeypatch):
    monkeypatch.setitem(targets._PLUGINS, kind, ("no_such_package",))
    result = cli("verify", moved_to(plan_file, tmp_path, cluster))
    assert result.exit_code == 3, result.output
    assert f"pip install 'autoshard[{kind}]'" in result.stderr


def test_a_plan_that_does_not_say_its_program(tmp_path):
    path = tmp_path / "toy.json"
    nameless = toy_plan().program.model_copy(update={"model": None})
    path.write_text(plan_to_json(toy_plan().model_copy(update={"program": nameless})))
    result = cli("verify", path)
    assert result.exit_code == 3
    assert "autoshard.verify_plan" in result.stderr


def test_search_ranks_what_it_compiled():
    result = cli(
        *("search", "llama3-tiny", "--cluster", "cpu:8", "--batch", 8, "--seq", 16),
        *("--strategy", "megatron-tp", "--verify", 2, "--top", 2, "--json"),
    )
    assert result.exit_code == 0, result.output
    plans = json.loads(result.stdout)
    assert len(plans) == 2
    assert result.stderr.count("compiling for host host:8") == 2
