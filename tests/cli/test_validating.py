"""The command that holds predictions against published runs."""

from __future__ import annotations

import json

import pytest
from helpers.published import published, write
from typer.testing import CliRunner

from autoshard.cli.app import app
from autoshard.report import plots


def cli(*args):
    args = ["validate", *(str(a) for a in args)]
    return CliRunner().invoke(app, args, prog_name="autoshard")


def fails(exit_code, *args):
    """Runs the command, which must fail with one line and nothing on stdout."""
    result = cli(*args)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.stderr
    return last


@pytest.fixture
def folder(tmp_path):
    rows = [published(micro_batch=n, step_time_s=2.0 + n) for n in (1, 2, 4)]
    rows += [published(zero_stage=n, step_time_s=3.0 + n) for n in (0, 3)]
    bad = [published(chip="abacus"), published(n_layers="many")]
    write(tmp_path, *rows, *bad, name="paper")
    (tmp_path / "bandwidth.csv").write_text("chip,busbw_GBps\nH100,480\n")
    return tmp_path


def test_tables(folder):
    result = cli(folder)
    assert result.exit_code == 0, result.output
    assert result.stderr == "5 rows to predict, 2 left out\n"
    out = result.stdout
    for words in ("paper", "h100", "all clean rows", "doubtful rows"):
        assert words in out
    for words in ("chip 'abacus' is not in the catalogue", "not a number"):
        assert words in out
    assert "Llama-3-8B" in out
    assert "over 1 groups" in out
    # Of the seven rows that fill every column, five are used.
    assert "71.4 % of the rows with a full configuration" in out
    assert "nan" not in out


def test_json(folder):
    result = cli(folder, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["clean"]["time"]["rows"] == len(found["rows"]) == 5
    assert {each["reason"] for each in found["left_out"]} == {
        "chip 'abacus' is not in the catalogue",
        "n_layers is 'many', not a number",
    }
    assert found["clean"]["left_out"] is None


def test_leave_one_out(folder):
    write(folder, published(), name="other")
    result = cli(folder, "--leave-one-out", "--json")
    assert result.exit_code == 0, result.output
    assert "fitting 2 times" in result.stderr
    found = json.loads(result.stdout)
    assert found["clean"]["left_out"]["rows"] == 6
    assert all(row["left_out_s"] > 0 for row in found["rows"])


def test_plot(folder):
    path = folder / "errors.png"
    result = cli(folder, "--plot", path, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr.endswith(f"wrote {path}\n")
    assert path.read_bytes().startswith(b"\x89PNG")
    json.loads(result.stdout)


def test_clean_rows_are_drawn_by_source(folder, monkeypatch):
    rows = [published(step_time_s=7.5), published(step_time_s=9, precision="fp8")]
    write(folder, *rows, name="other")
    drawn = {}

    def draw(path, series):
        drawn.update(series)

    monkeypatch.setattr(plots, "save_scatter", draw)
    result = cli(folder, "--plot", "out.png", "--json")
    assert result.exit_code == 0, result.output
    assert [measured for measured, _ in drawn["paper"]] == [3, 4, 6, 3, 6]
    assert [measured for measured, _ in drawn["other"]] == [7.5]
    found = json.loads(result.stdout)["rows"]
    pairs = {(row["measured_s"], row["predicted_s"]) for row in found}
    assert pairs >= set(drawn["paper"] + drawn["other"])


def test_a_plot_that_cannot_be_written(folder):
    message = fails(6, folder, "--plot", folder / "nowhere" / "errors.png")
    assert "cannot be written" in message


def test_a_plot_of_an_unknown_format(folder):
    message = fails(3, folder, "--plot", folder / "errors.doc")
    assert "doc" in message


def test_no_directory(tmp_path):
    message = fails(3, tmp_path / "nowhere")
    assert message.endswith("name one with CSV files of runs")


def test_no_table(tmp_path):
    assert "no table of published runs" in fails(3, tmp_path)


def test_no_usable_row(tmp_path):
    write(tmp_path, published(chip="abacus"))
    message = fails(3, tmp_path)
    assert "the first is left out since chip 'abacus'" in message


def test_usage():
    assert cli().exit_code == 2
    assert cli("--fast").exit_code == 2
    help_ = cli("--help").stdout
    assert "$ autoshard validate" in help_
    for option in ("--leave-one-out", "--plot", "--json"):
        assert option in help_
