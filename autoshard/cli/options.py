"""Options that several commands share, and the model they describe."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from autoshard.plan.schema import ModelRef


class Dtype(StrEnum):
    """Compute dtypes, by the names the command line takes."""

    BF16 = "bf16"
    F32 = "f32"


DEFAULT_OPTIMIZER = "adamw"
DEFAULT_LEARNING_RATE = 3e-4
DEFAULT_DTYPE = Dtype.BF16

DEFAULT_CLUSTER = "cpu:8"
DEFAULT_BATCH = 16
DEFAULT_SEQ = 128
"""Of `run`, which also trains a model of which only the name is given."""

_STRATEGY = (
    "A strategy's name, or a TOML file; 'autoshard strategies' lists them. "
    "'auto' leaves everything to the search."
)
_UNROLLED = "Keep the layers apart in the program, without a loop over them."


def _cluster(text: str, metavar: str = "C") -> Any:
    return typer.Option("--cluster", metavar=metavar, help=text)


def _strategy(text: str) -> Any:
    return typer.Option("--strategy", metavar="S", help=text)


def _batch(text: str) -> Any:
    return typer.Option("--batch", metavar="N", help=text)


def _seq(text: str) -> Any:
    return typer.Option("--seq", metavar="N", help=text)


def _optimizer(text: str) -> Any:
    return typer.Option("--optimizer", metavar="NAME", help=text)


def _learning_rate(text: str) -> Any:
    return typer.Option("--learning-rate", metavar="X", help=text)


def _dtype(text: str) -> Any:
    return typer.Option("--dtype", help=text)


def _unrolled(text: str) -> Any:
    return typer.Option("--unrolled", help=text)


def model(text: str) -> Any:
    """The argument that names a model."""
    return typer.Argument(metavar="MODEL", help=text)


def output(text: str, metavar: str = "FILE") -> Any:
    """The option that names the file to write."""
    return typer.Option("-o", "--output", metavar=metavar, help=text)


# What a search needs.

Model = Annotated[
    str,
    model(
        "A model of 'autoshard models', a Hugging Face config.json, or "
        "package.module:function."
    ),
]
ModelAsInSearch = Annotated[str, model("As in 'autoshard search'.")]
Cluster = Annotated[
    str,
    _cluster(
        "Chips and how many: h100:64, v5p:4x4x4, cpu:8, or own.toml:64. "
        "'autoshard clusters' lists the types."
    ),
]
ClusterType = Annotated[
    str, _cluster("A type of chips alone: h100, own.toml.", metavar="TYPE")
]
Batch = Annotated[int, _batch("Sequences per step, all chips.")]
Seq = Annotated[int, _seq("Tokens per sequence.")]
Strategy = Annotated[str, _strategy(_STRATEGY)]
Optimizer = Annotated[str, _optimizer("An optimizer of optax, such as adamw or sgd.")]
LearningRate = Annotated[float, _learning_rate("Its learning rate.")]
DtypeOfActivations = Annotated[Dtype, _dtype("Type of the activations.")]
Unrolled = Annotated[bool, _unrolled(_UNROLLED)]

# The same where they may be left out, as a plan may come in place of a model.

ClusterOfModel = Annotated[
    str | None,
    _cluster(
        f"Where to run a MODEL; {DEFAULT_CLUSTER} when not given. cpu:N sets up N "
        "virtual devices."
    ),
]
StrategyOfModel = Annotated[str | None, _strategy(f"MODEL: {_STRATEGY}")]
BatchOfModel = Annotated[
    int | None, _batch(f"MODEL: sequences a step; {DEFAULT_BATCH}.")
]
SeqOfModel = Annotated[int | None, _seq(f"MODEL: tokens a sequence; {DEFAULT_SEQ}.")]
OptimizerOfModel = Annotated[
    str | None, _optimizer(f"MODEL: an optimizer of optax; {DEFAULT_OPTIMIZER}.")
]
LearningRateOfModel = Annotated[
    float | None,
    _learning_rate(f"MODEL: its learning rate; {DEFAULT_LEARNING_RATE:g}."),
]
DtypeOfModel = Annotated[
    Dtype | None, _dtype(f"MODEL: type of activations; {DEFAULT_DTYPE}.")
]
UnrolledOfModel = Annotated[bool, _unrolled(f"MODEL: {_UNROLLED}")]

# Fields fixed by hand: `Pins` where there may be none.

_SET = typer.Option(
    "--set",
    metavar="KEY=VALUE",
    help="Fix a field: tensor=8, microbatches=4, remat=full, "
    "storage.optimizer=data+fsdp, rules.vocab=none. The search fills the rest; can be "
    "repeated.",
)
Pins = Annotated[list[str] | None, _SET]
SomePins = Annotated[list[str], _SET]

Executable = Annotated[
    bool,
    typer.Option(
        "--executable",
        help="Leave out what is priced but cannot be run yet: pipeline stages, "
        "attention by a ring or by heads, and offloading.",
    ),
]

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
    optimizer: str | None = None,
    learning_rate: float | None = None,
    dtype: Dtype | None = None,
    unrolled: bool = False,
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
