"""`autoshard rules`: which primitives are covered."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from autoshard.cli.app import app
from autoshard.rules import covered, register_rule


def cli(*args):
    return CliRunner().invoke(app, ["rules", *args], prog_name="autoshard")


def output(*args):
    result = cli(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_primitive_with_a_rule_is_listed_once():
    listed = json.loads(output("--json"))
    names = [row["primitive"] for row in listed["rules"]]
    assert names == sorted(set(names))
    assert set(names) >= set(covered())
    assert sum(listed["counts"].values()) == len(names)


def test_a_row_has_family_rule_and_origin():
    rows = {row["primitive"]: row for row in json.loads(output("--json"))["rules"]}
    assert rows["transpose"] == {
        "primitive": "transpose",
        "family": "shape",
        "rule": "i j k -> k i j {i=8 j=4 k=2}",
        "registered": False,
    }
    assert rows["scan"]["family"] == "structure"
    assert rows["scan"]["rule"] == "its body, as often as the loop runs"
    assert rows["shard_map"]["rule"] == "its body, on one device's part"


def test_a_family_alone_keeps_the_counts_of_all():
    listed = json.loads(output("--family", "window", "--json"))
    assert {row["family"] for row in listed["rules"]} == {"window"}
    assert len(listed["rules"]) == listed["counts"]["window"]
    assert set(listed["counts"]) > {"elementwise", "shape", "structure", "window"}


def test_the_table_has_a_line_per_rule_and_their_number():
    table, summary = output("--family", "random").rstrip().split("\n\n")
    assert len(table.splitlines()) == 2 + 11
    assert table.splitlines()[-1].split() == (
        ["rng_uniform", "random", ".,", ".", "->", "i", "j", "{i=8", "j=4}"]
    )
    counts = json.loads(output("--json"))["counts"]
    assert summary.startswith(f"{sum(counts.values())} primitives: collective ")
    assert " random 11, " in summary.replace("\n", " ")


def test_a_registered_rule_is_marked(monkeypatch):
    monkeypatch.setattr(sys.modules["autoshard.rules.foreign"], "_PATTERNS", {})
    register_rule("their_kernel", "b s -> b s; blocked s")
    [row] = json.loads(output("--family", "registered", "--json"))["rules"]
    assert row == {
        "primitive": "their_kernel",
        "family": "registered",
        "rule": "b s -> b s; blocked s",
        "registered": True,
    }


def test_an_unknown_family_names_those_there_are():
    result = cli("--family", "windows")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "no rule is of the family 'windows'" in result.stderr
    assert "structure, window." in result.stderr


@pytest.mark.parametrize("word", ["$ autoshard rules --family window", "--json"])
def test_help(word):
    assert word in output("--help")
