"""The constants: each with a source, and near what one would take without a fit."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

import autoshard.cost
from autoshard.cost.constants import Constant, Constants, table
from autoshard.ir.errors import InputError
from autoshard.plan.chip import load_type

COST = Path(autoshard.cost.__file__).parent
CATALOGUE = COST.parent / "plan/catalogue"


def test_names_are_unique_and_grouped():
    names = [c.name for c in table()]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z]+\.[a-z0-9_]+", name) for name in names)


def test_each_has_words_and_a_source():
    for c in table():
        assert c.meaning.strip(), c.name
        assert c.source.strip(), c.name
        assert c.unit.strip(), c.name


def test_fitted_values_are_believable():
    """A value three standard deviations from its prior is a fit to something else."""
    for c in table():
        assert abs(math.log(c.value / c.prior)) <= 3 * c.spread, c.name


def test_shares_are_shares():
    for c in table():
        if c.unit.startswith("share"):
            assert c.value <= 1, c.name
            assert c.prior <= 1, c.name


def test_each_is_used_by_the_model():
    """By its name, or by a name made of a generation or an attention."""
    text = "".join(path.read_text() for path in COST.glob("*.py"))
    for c in table():
        group = c.name.partition(".")[0]
        made = rf'f"{group}\.{{\w+}}(_\w+)?"'
        assert f'"{c.name}"' in text or re.search(made, text), c.name


def test_each_generation_of_the_catalogue_has_a_share_of_peak():
    for path in CATALOGUE.glob("*.toml"):
        generation = load_type(path.stem).generation or "other"
        assert Constants.shipped()[f"matmul.{generation}"] > 0


def test_shipped_and_priors_name_the_same():
    assert set(Constants.shipped().values) == set(Constants.priors().values)
    first = table()[0]
    assert Constants.shipped()[first.name] == first.value
    assert Constants.priors()[first.name] == first.prior


def test_a_constant_that_is_not_there():
    with pytest.raises(InputError, match=r"no constant 'matmul\.abacus'"):
        Constants.shipped()["matmul.abacus"]


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "many"])
def test_a_value_must_be_positive(value):
    good = table()[0].model_dump()
    with pytest.raises(ValidationError, match="value"):
        Constant.model_validate({**good, "value": value})
