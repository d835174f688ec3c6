import json
import os
import subprocess
import sys

import pytest
import typer
from helpers.plans import document, plan
from typer.testing import CliRunner

from autoshard.cli import running
from autoshard.cli.app import app
from autoshard.ir.version import VERSION
from autoshard.plan.files import plan_to_json
from autoshard.train import TrainResult


def cli(*args):
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="autoshard")


def fails(exit_code, *args):
    """Runs a command that must fail with one message and nothing on stdout."""
    result = cli(*args)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def output_of(*args):
    result = cli(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan_to_json(plan()))
    return path


COMMANDS = [
    *("search", "explain", "compare", "run", "calibrate", "validate"),
    *("models", "clusters", "strategies", "verify"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_name_the_command(command):
    assert f"$ autoshard {command}" in output_of(command, "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_json(command):
    assert "--json" in output_of(command, "--help")


def test_version():
    assert output_of("--version") == f"autoshard {VERSION}\n"


# -- lists ---------------------------------------------------------------------------


def test_models():
    rows = {row["name"]: row for row in json.loads(output_of("models", "--json"))}
    assert rows["llama3-8b"]["params"] == 8_030_261_248
    assert "8.03 B" in output_of("models")


def test_clusters():
    rows = {row["name"]: row for row in json.loads(output_of("clusters", "--json"))}
    assert rows["h100"]["hbm_bytes_per_s"]["value"] == 3.35e12
    assert "3.35 TB/s" in output_of("clusters")


def test_strategies():
    rows = {row["name"]: row for row in json.loads(output_of("strategies", "--json"))}
    assert rows["fsdp"]["storage"]["params"] == ["fsdp"]
    assert "arXiv:1909.08053" in output_of("strategies")


# -- plans ---------------------------------------------------------------------------


def test_explain(plan_file):
    assert json.loads(output_of("explain", plan_file, "--json"))["mesh"] == [
        {"axis": "data", "size": 2},
        {"axis": "tensor", "size": 4},
    ]
    assert "params/" in output_of("explain", plan_file)


def test_explain_tensor(plan_file):
    given = output_of("explain", plan_file, "--tensor", "params/w", "--json")
    assert json.loads(given)["local_shape"] == [8, 4]
    message = fails(3, "explain", plan_file, "--tensor", "params/ww")
    assert "params/w" in message


@pytest.fixture
def trail_file(tmp_path):
    """A plan in which a product at model.py:12 takes its batch from the tokens."""

    def step(what, source, shape, dim):
        return {
            "what": what,
            "source": source,
            "address": f"{what}#0" if source else "",
            "shape": shape,
            "dims": [dim, None],
        }

    origin = {"axes": ["data"], "origin": "rule batch = [data], role of tokens"}
    path = tmp_path / "trail.json"
    trail = [
        step("tokens", "", [4, 32], origin),
        step("dot_general", "pkg/model.py:12:8 (loss)", [4, 6], origin | {"step": 0}),
    ]
    trail[1]["dims"][0]["origin"] = ""
    path.write_text(plan_to_json(plan(trail=trail)))
    return path


@pytest.mark.parametrize("line", ["model.py:12", "pkg/model.py:12"])
def test_explain_line(trail_file, line):
    given = json.loads(output_of("explain", trail_file, "--tensor", line, "--json"))
    (value,) = given["values"]
    (way,) = value["ways"]
    assert [s["what"] for s in way["steps"]] == ["dot_general", "tokens"]
    assert way["origin"] == "rule batch = [data], role of tokens"
    text = output_of("explain", trail_file, "--tensor", line)
    assert text.index("dot_general") < text.index("tokens 4 x 32")
    assert "by   rule batch = [data], role of tokens" in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("model.py:13", "The nearest lines that make some: 12"),
        ("modex.py:12", "pkg/model.py"),
        ("model.py:", "file.py:LINE"),
        ("model.py:x", "file.py:LINE"),
        (":12", "file.py:LINE"),
        ("", "file.py:LINE"),
    ],
)
def test_explain_refuses_what_is_neither_a_tensor_nor_a_line(trail_file, given, said):
    assert said in fails(3, "explain", trail_file, "--tensor", given)


def test_explain_writes_html(plan_file, tmp_path):
    page = tmp_path / "report.html"
    output_of("explain", plan_file, "--html", page)
    assert page.read_text().startswith("<!doctype html>")
    assert "directory" in fails(6, "explain", plan_file, "--html", tmp_path)


def test_compare(plan_file, tmp_path):
    changed = document()
    changed["predicted"]["step_s"] = 0.020
    other = tmp_path / "other.json"
    other.write_text(plan_to_json(plan(**changed)))
    assert "100.0 % more time" in output_of("compare", plan_file, other)
    assert json.loads(output_of("compare", plan_file, plan_file, "--json"))["same"]


def test_a_plan_that_cannot_be_read(tmp_path, plan_file):
    assert "no.json" in fails(3, "explain", tmp_path / "no.json")
    plan_file.write_text(plan_file.read_text()[:100])
    assert "truncated" in fails(3, "explain", plan_file)
    plan_file.write_text(json.dumps(document() | {"schema_version": 99}))
    assert "99" in fails(5, "explain", plan_file)


# -- search --------------------------------------------------------------------------

SEARCH = ("search", "llama3-tiny", "--cluster", "cpu:8", "--batch", 16, "--seq", 32)


def test_search_writes_the_best_plan_and_lists_more(tmp_path):
    path = tmp_path / "plan.json"
    result = cli(*SEARCH, "--strategy", "dp", "--top", 2, "--json", "-o", path)
    assert result.exit_code == 0, result.output
    best, second = json.loads(result.stdout)
    assert best == json.loads(path.read_text())
    assert best["predicted"]["step_s"] <= second["predicted"]["step_s"]
    assert best["program"]["model"] == {
        "model": "llama3-tiny",
        "batch": 16,
        "seq": 32,
        "optimizer": "adamw",
        "learning_rate": 3e-4,
        "dtype": "bf16",
        "scan_layers": True,
    }
    assert "wrote" in result.stderr


@pytest.mark.parametrize(
    ("args", "exit_code", "said"),
    [
        (("--strategy", "fsdpp"), 3, "fsdp"),
        (("--optimizer", "adamx"), 3, "adamw"),
        (("--cluster", "h101:8"), 3, "h100"),
        (("--seq", 0), 3, "--seq"),
        (("--seq", 99_999), 3, "99999"),
        (("--learning-rate", -1), 3, "learning rate"),
    ],
)
def test_search_refuses(args, exit_code, said):
    assert said in fails(exit_code, *SEARCH, *args)


def test_search_of_an_unknown_model_names_the_close_one():
    args = ("--cluster", "cpu:8", "--batch", 8, "--seq", 32)
    assert "'llama3-tiny'" in fails(3, "search", "llama3-tini", *args)


def test_output_is_checked_before_the_search(tmp_path):
    # An unknown model would exit with 3, had the search begun.
    args = ("--cluster", "cpu:8", "--batch", 8, "--seq", 32)
    fails(6, "search", "no-model", *args, "-o", tmp_path / "no" / "plan.json")


def test_usage_error_has_its_own_code():
    assert cli("search", "llama3-tiny").exit_code == 2
    assert cli(*SEARCH, "--dtype", "f8").exit_code == 2


# -- run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "neither"), ("[1]", "neither"), ("{", "truncated"), (None, "No such file")],
)
def test_run_refuses_json_that_is_no_plan(tmp_path, content, said):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert said in fails(3, "run", path)


def test_json_with_a_model_type_is_a_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama"}')
    assert not running.is_plan_file(str(path))
    assert not running.is_plan_file("llama3-tiny")


def test_run_refuses_options_that_the_plan_fixes(plan_file):
    message = fails(3, "run", plan_file, "--batch", 8, "--dtype", "f32")
    assert "--batch, --dtype" in message


def test_run_refuses_a_plan_made_from_python(tmp_path):
    path = tmp_path / "plan.json"
    program = document()["program"] | {"model": None}
    path.write_text(plan_to_json(plan(program=program)))
    assert "autoshard.parallelize" in fails(3, "run", path)


def test_run_refuses_chips_that_are_not_here(tmp_path):
    path = tmp_path / "plan.json"
    cluster = {"name": "h100:8x8", "fingerprint": "c1", "num_chips": 64}
    path.write_text(plan_to_json(plan(cluster=cluster)))
    message = fails(5, "run", path)
    assert "needs 64 gpus" in message
    assert "8 cpu devices" in message
    assert "--cluster cpu:8" in message


def test_run_refuses_another_cluster_than_the_plans(plan_file):
    assert "cpu:8" in fails(5, "run", plan_file, "--cluster", "cpu:4")


def test_run_resume_needs_a_checkpoint():
    assert "--checkpoint" in fails(3, "run", "llama3-tiny", "--resume")


@pytest.mark.slow
def test_run_trains_with_a_plan(tmp_path):
    path, metrics = tmp_path / "plan.json", tmp_path / "metrics.jsonl"
    made = cli(*SEARCH, "--strategy", "fsdp", "--dtype", "f32", "-o", path)
    assert made.exit_code == 0, made.output
    result = cli("run", path, "--steps", 3, "--metrics", metrics, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["first_step"], summary["last_step"]) == (0, 3)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert losses[0] == summary["first_loss"]
    assert losses[-1] == summary["last_loss"] < losses[0]


def _stopped(signal_number):
    return TrainResult(
        losses=[5.0, 4.0],
        first_step=0,
        last_step=2,
        stopped_by_signal=signal_number,
        tokens_per_s=None,
        mfu=None,
    )


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_gives_128_and_its_number(number, capsys, monkeypatch):
    argv = ["autoshard", "run", "p.json", "--checkpoint", "my dir"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(typer.Exit) as info:
        running._finish(_stopped(number), as_json=True, checkpoint="my dir")
    assert info.value.exit_code == 128 + number
    streams = capsys.readouterr()
    assert json.loads(streams.out)["stopped_by_signal"] == number
    assert "autoshard run p.json --checkpoint 'my dir' --resume" in streams.err


def test_a_signal_without_a_checkpoint_says_that_nothing_was_kept(capsys):
    with pytest.raises(typer.Exit):
        running._finish(_stopped(15), as_json=False, checkpoint=None)
    streams = capsys.readouterr()
    assert "loss 5.0000 -> 4.0000" in streams.out
    assert "nothing was kept" in streams.err


# -- the process ---------------------------------------------------------------------


def test_search_loads_neither_orbax_nor_matplotlib():
    code = (
        "import sys\n"
        "from autoshard.cli import main\n"
        "sys.argv[1:] = 'search gpt2-tiny --cluster cpu:2 --batch 2 --seq 16 "
        "--strategy dp --json'.split()\n"
        "try:\n    main()\n"
        "except SystemExit as e:\n    assert not e.code, e.code\n"
        "heavy = {'orbax', 'matplotlib', 'jinja2', 'tensorstore'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cluster"]["name"] == "cpu:2"
