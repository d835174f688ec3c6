"""Options that several commands share, and the model they describe."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from autoshard.plan.schema import ModelRef


class Dtype(StrEnum):
    """Compute dtypes, by the names the command line takes."""

    BF16 = "bf16"
    F32 = "f32"


DEFAULT_OPTIMIZER = "adamw"
DEFAULT_LEARNING_RATE = 3e-4
DEFAULT_DTYPE = Dtype.BF16

ClusterHelp = (
    "Chips and how many: h100:64, v5p:4x4x4, cpu:8, or own.toml:64. "
    "'autoshard clusters' lists the types."
)
StrategyHelp = (
    "A strategy's name, or a TOML file; 'autoshard strategies' lists them. "
    "'auto' leaves everything to the search."
)
SetHelp = (
    "Fix a field: tensor=8, microbatches=4, remat=full, storage.optimizer=data+fsdp, "
    "rules.vocab=none. The search fills the rest; can be repeated."
)
OptimizerHelp = "An optimizer of optax, such as adamw or sgd."
UnrolledHelp = "Keep the layers apart in the program, without a loop over them."

PlanFile = Annotated[
    str,
    typer.Argument(
        metavar="PLAN", help="A file that 'autoshard search ... -o FILE' wrote."
    ),
]


def model_ref(
    model: str,
    *,
    batch: int,
    seq: int,
    optimizer: str | None,
    learning_rate: float | None,
    dtype: Dtype | None,
    unrolled: bool,
) -> ModelRef:
    """The model that the options describe, with the defaults filled in."""
    return ModelRef(
        model=model,
        batch=batch,
        seq=seq,
        optimizer=optimizer or DEFAULT_OPTIMIZER,
        learning_rate=DEFAULT_LEARNING_RATE if learning_rate is None else learning_rate,
        dtype=(dtype or DEFAULT_DTYPE).value,
        scan_layers=not unrolled,
    )
