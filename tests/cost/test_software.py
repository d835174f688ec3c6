"""Which software a framework's name stands for."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from pydantic import ValidationError

from autoshard.cost.software import SOFTWARE, entries, named

PUBLISHED = Path(__file__).parents[2] / "benchmarks/published"


@pytest.mark.parametrize(
    ("framework", "year", "name"),
    [
        ("MaxText", 2024, "xla"),
        ("NeMo + PaxML (JAX)", 2024, "xla"),
        ("NeMo/Megatron-Core", 2024, "megatron-core"),
        ("Megatron-Bridge", 2025, "megatron-core"),
        ("Megatron-LM", 2021, "megatron-2021"),
        ("Megatron-LM", 2022, "megatron-2021"),
        ("Megatron-LM", 2023, "megatron-core"),
        ("Megatron-DeepSpeed", 2022, "megatron-2021"),
        ("MEGATRON-LM", 2022, "megatron-2021"),
        ("Megatron-LM (zero-bubble)", 2023, "zero-bubble"),
        ("Composer", 2023, "composer"),
        ("PyTorch FSDP2/torchtitan", 2024, "torchtitan"),
    ],
)
def test_names(framework, year, name):
    found = named(framework, year)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("framework", ["", "DeepSpeed", "my trainer", "Meg atron"])
def test_a_name_that_is_not_known(framework):
    assert named(framework, 2024) is None


def test_a_year_that_no_entry_is_for():
    assert named("Megatron-DeepSpeed", 2024) is None


def test_every_entry_can_be_reached():
    """None stands behind another that takes all of its names."""
    for entry in entries():
        years = {entry.since, entry.until, 2024}
        found = [
            named(word, year)
            for word in entry.match
            for year in years
            if entry.since <= year <= entry.until
        ]
        assert entry in found


def test_a_name_stands_for_its_first_entry():
    for name, entry in SOFTWARE.items():
        assert entry == next(e for e in entries() if e.name == name)


def test_a_word_that_is_no_choice():
    with pytest.raises(ValidationError, match="fusion"):
        entries()[0].model_validate({**entries()[0].model_dump(), "fusion": "jit"})
    with pytest.raises(ValidationError, match="speed"):
        entries()[0].model_validate({**entries()[0].model_dump(), "speed": 2})


def test_an_entry_is_used_by_a_published_run():
    """An entry that nothing shows to be right has no place here."""
    found = set()
    for path in PUBLISHED.glob("*.csv"):
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                entry = named(row.get("framework") or "", 2024)
                found.add(entry.name if entry else None)
                entry = named(row.get("framework") or "", 2022)
                found.add(entry.name if entry else None)
    assert found >= set(SOFTWARE)
