"""Building a train step from a model's name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from autoshard import models
from autoshard.ir.errors import InputError, NameUnknownError
from autoshard.ir.train_step import TrainStep, train_step
from autoshard.plan.schema import ModelRef

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adafactor": optax.adafactor,
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "rmsprop": optax.rmsprop,
    "sgd": optax.sgd,
}
"""Optimizers by name, each made from a learning rate."""

DTYPES = {"bf16": "bfloat16", "f32": "float32"}
"""Compute dtypes by name."""


class Resolved(NamedTuple):
    """A model reference made into something that can be searched.

    Attributes:
        step: The train step.
        batch: Its abstract batch.
        ref: What was resolved; goes into the plan.
        notes: What the model source says that the program does not do.
    """

    step: TrainStep
    batch: Any
    ref: ModelRef
    notes: tuple[str, ...] = ()


def optimizer(name: str, learning_rate: float) -> optax.GradientTransformation:
    """An optax optimizer by name.

    Raises:
        NameUnknownError: No such optimizer.
        InputError: The learning rate is not positive.
    """
    if name not in OPTIMIZERS:
        raise NameUnknownError(
            f"unknown optimizer {name!r}; known: {', '.join(OPTIMIZERS)}."
            f"{_meant(name, OPTIMIZERS)} Any other optax optimizer can be used from "
            "Python with autoshard.train_step."
        )
    if not learning_rate > 0:
        raise InputError(f"the learning rate must be positive; got {learning_rate}.")
    return OPTIMIZERS[name](learning_rate)


def _meant(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def token_batch(batch: int, seq: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract batch of a language model: int32 tokens and targets, [batch, seq].

    Raises:
        InputError: A size is not positive.
    """
    for name, size in (("batch", batch), ("seq", seq)):
        if size < 1:
            raise InputError(f"--{name} must be 1 or more; got {size}.")
    leaf = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    return {"tokens": leaf, "targets": leaf}


def resolve(ref: ModelRef, *, layers: int | None = None) -> Resolved:
    """Builds the train step a model reference names; nothing is computed.

    Args:
        ref: Its `model` is a name of the zoo, the path of a Hugging Face
            `config.json`, or `package.module:function`. The function returns a
            `TrainStep`, or an NNX module that maps tokens to logits (it may take
            `nnx.Rngs`).
        layers: Build a model of the zoo or of a config with so many blocks.

    Returns:
        The step and its abstract batch.

    Raises:
        NameUnknownError: Unknown model, dtype or optimizer.
        InputError: The reference cannot be used, or does not fit the sizes.

    >>> from autoshard.plan.schema import ModelRef
    >>> ref = ModelRef(model="llama3-tiny", batch=8, seq=64, optimizer="adamw",
    ...                learning_rate=1e-3, dtype="f32")
    >>> resolve(ref).batch["tokens"].shape
    (8, 64)
    """
    if ref.dtype not in DTYPES:
        raise NameUnknownError(
            f"unknown dtype {ref.dtype!r}; known: {', '.join(DTYPES)}."
        )
    batch = token_batch(ref.batch, ref.seq)
    update = optimizer(ref.optimizer, ref.learning_rate)
    if ":" in ref.model and not Path(ref.model).exists():
        step = _from_function(ref, update)
        return Resolved(step, batch, ref)
    config, notes = config_of(ref)
    if layers is not None:
        config = dataclasses.replace(config, layers=layers)
    if ref.seq > config.max_seq:
        raise InputError(
            f"--seq {ref.seq} is longer than model {config.name!r} allows "
            f"({config.max_seq} positions); choose a shorter sequence."
        )
    group = config.experts.group if config.experts else 1
    if ref.seq > group and ref.seq % group:
        raise InputError(
            f"--seq {ref.seq} does not divide into the groups of {group} tokens that "
            f"model {config.name!r} sends to its experts; choose a multiple of {group} "
            f"or no more than {group}."
        )
    config = dataclasses.replace(
        config, dtype=DTYPES[ref.dtype], scan_layers=ref.scan_layers
    )
    step = train_step(
        models.next_token_loss, update, model=lambda rngs: models.build(config, rngs)
    )
    return Resolved(step, batch, ref, notes)


def config_of(ref: ModelRef) -> tuple[models.DecoderConfig, tuple[str, ...]]:
    """The config that a model reference names, and notes on what it leaves out."""
    notes: tuple[str, ...] = ()
    if ref.model in models.PRESETS:
        config = models.get(ref.model)
    elif ref.model.endswith(".json") or os.sep in ref.model:
        try:
            imported = models.from_hf_config(ref.model)
        except (OSError, ValueError) as error:
            raise InputError(f"model {ref.model}: {error}") from None
        config, notes = imported.config, tuple(imported.notes)
    else:
        raise NameUnknownError(
            f"unknown model {ref.model!r}: neither one of "
            f"{', '.join(models.names())}, nor the path of a Hugging Face config.json, "
            f"nor package.module:function.{_meant(ref.model, models.names())}"
        )
    return config, notes


def _from_function(ref: ModelRef, update: optax.GradientTransformation) -> TrainStep:
    module_name, _, name = ref.model.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"model {ref.model!r}: cannot import {module_name!r}: {error}. Give "
            "package.module:function, importable from the current directory."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise NameUnknownError(
            f"model {ref.model!r}: module {module_name!r} has no function {name!r}."
            f"{_meant(name, public)}"
        )
    if isinstance(function, TrainStep):
        return function
    takes_rngs = any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in inspect.signature(function).parameters.values()
    )
    build = function if takes_rngs else (lambda rngs: function())
    found: list[Any] = []

    def probe() -> None:
        found.append(build(nnx.Rngs(0)))

    with nnx.use_eager_sharding(False):
        jax.eval_shape(probe)
    if isinstance(found[0], TrainStep):
        step = function()  # again, outside of the trace
        assert isinstance(step, TrainStep)
        return step
    if isinstance(found[0], nnx.Module):
        return train_step(models.next_token_loss, update, model=build)
    raise InputError(
        f"model {ref.model!r} returned {type(found[0]).__name__}; it must return an "
        "autoshard.TrainStep (from autoshard.train_step) or a flax.nnx.Module that "
        "maps int32 tokens [batch, seq] to logits [batch, seq, vocab]."
    )
