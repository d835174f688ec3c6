"""The constants of the cost model, each with its meaning, its prior and its source."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from autoshard.ir.errors import InputError

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Constant(BaseModel):
    """One constant.

    Attributes:
        name: Group and what it is of: "matmul.hopper".
        value: As fitted to published runs.
        prior: What one would take without them.
        spread: Standard deviation of the logarithm around the prior.
        unit: Of the value.
        meaning: What it is, in words.
        source: Where the prior comes from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: _Positive
    prior: _Positive
    spread: _Positive
    unit: str
    meaning: str
    source: str


@cache
def table() -> tuple[Constant, ...]:
    """All constants, in the order of the file.

    >>> table()[0].name
    'matmul.volta'
    """
    text = resources.files("autoshard.cost").joinpath("constants.toml")
    data = tomllib.loads(text.read_text(encoding="utf-8"))["constant"]
    return tuple(Constant.model_validate(entry) for entry in data)


@dataclass(frozen=True, slots=True)
class Constants:
    """Values by name.

    >>> 0.5 < Constants.shipped()["matmul.hopper"] < 1
    True
    """

    values: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        """Value of a constant."""
        try:
            return self.values[name]
        except KeyError:
            raise InputError(f"the cost model has no constant {name!r}") from None

    @classmethod
    def shipped(cls) -> Constants:
        """As fitted to the published runs."""
        return cls({c.name: c.value for c in table()})

    @classmethod
    def priors(cls) -> Constants:
        """Before any fit."""
        return cls({c.name: c.prior for c in table()})
