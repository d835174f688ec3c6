"""What every model of a plan or a strategy shares."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from autoshard.ir.mesh import Spec


class Record(BaseModel):
    """An immutable model that takes no field it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _spec_in(value: object) -> object:
    if isinstance(value, list):
        return Spec(tuple(tuple(dim) for dim in value))
    return value


PlanSpec = Annotated[
    Spec,
    BeforeValidator(_spec_in),
    PlainSerializer(lambda s: [list(dim) for dim in s.dims]),
]
"""A spec in a plan: for each dim the list of mesh axes that shard it."""
