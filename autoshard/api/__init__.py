"""The public functions: the flat list of passes from a model to a running step.

resolve      name, path or module:function  ->  TrainStep, abstract batch
trace        TrainStep                      ->  Traced (a Program with named inputs)
find_classes Traced                         ->  DimClasses
propagate    Traced, classes, layout        ->  ShardedProgram
price        ShardedProgram, meshes         ->  Prices
search       TrainStep, cluster, strategy   ->  Plan
parallelize  TrainStep, Plan                ->  ParallelStep
calibrate    devices                        ->  Cluster
validate     published runs                 ->  errors
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

from autoshard import models
from autoshard.api.building import (
    DTYPES,
    OPTIMIZERS,
    Resolved,
    optimizer,
    resolve,
    token_batch,
)
from autoshard.api.inputs import Asked, passing_on
from autoshard.api.solving import size, solver, why_not
from autoshard.api.verifying import Repair, rank_verified, repair_plan, verify_plan
from autoshard.ir.errors import InputError, OutputError
from autoshard.ir.trace import trace
from autoshard.ir.train_step import TrainStep, train_step
from autoshard.lower import ParallelFunction, ParallelStep, parallelize
from autoshard.measure import FULL, QUICK, Effort
from autoshard.measure import calibrate as measure
from autoshard.plan.cluster import Cluster, cluster
from autoshard.plan.cluster import names as cluster_names
from autoshard.plan.files import (
    check_writable,
    load_plan,
    load_strategy,
    save_plan,
    save_type,
    strategy_names,
)
from autoshard.plan.schema import ModelRef, Plan
from autoshard.plan.strategy import Strategy
from autoshard.rules import register_rule
from autoshard.rules.check import check_rule
from autoshard.rules.registry import rules_of
from autoshard.validation import Validation, validate


@overload
def search(
    fn: Callable[..., Any], *abstract_args: Any, top: None = ..., **asked: Unpack[Asked]
) -> Plan: ...


@overload
def search(
    fn: Callable[..., Any], *abstract_args: Any, top: int, **asked: Unpack[Asked]
) -> list[Plan]: ...


@passing_on(Asked, solver)
def search(
    fn: Callable[..., Any],
    *abstract_args: Any,
    top: int | None = None,
    **asked: Unpack[Asked],
) -> Plan | list[Plan]:
    """Searches the best plan for a step on a cluster.

    Args:
        fn: As in `solver`.
        *abstract_args: As in `solver`.
        top: Return this many truly different plans, the fastest first: of another mesh,
            storage, rules or remat.
        **asked: As in `solver`: the `cluster`, and what else is wished for.

    Returns:
        The plan predicted to be the fastest of those that fit, or a list of plans.

    Raises:
        InfeasibleError: Nothing divides or fits; the message says what would.
        NameUnknownError: Unknown cluster or strategy.
        InputError: The arguments do not fit the function or the strategy.
        RuleMissingError: A primitive of the program has no factor rule.

    >>> import jax, jax.numpy as jnp, optax
    >>> step = train_step(
    ...     lambda w, x: ((x @ w) ** 2).mean(),
    ...     optax.sgd(0.1),
    ...     model=lambda key: jax.random.normal(key, (64, 32)),
    ... )
    >>> batch = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    >>> plan = search(step, batch, cluster="cpu:8", strategy="dp")
    >>> plan.sizes["data"]
    8
    """
    if top is not None and top < 1:
        raise InputError(f"top must be 1 or more; got {top}.")
    program = solver(fn, *abstract_args, **asked)
    plans = program.plans(top or 1)
    return plans if top is not None else plans[0]


def check_rules(fn: Callable[..., Any], *abstract_args: Any) -> tuple[str, ...]:
    """Holds the factor rule of every op of a function against what the op computes.

    Each op is run whole and in pieces, on random numbers; a rule is right if the pieces
    joined are the whole. Do this once for a rule given to `register_rule`.

    Args:
        fn: A `TrainStep`, or any function.
        *abstract_args: Its arguments, arrays or `jax.ShapeDtypeStruct`s; small ones.

    Returns:
        What could not be tried, and why; empty if all was.

    Raises:
        InputError: A rule is wrong; the message says where and how.
        RuleMissingError: A primitive of the function has no factor rule.

    >>> import jax, jax.numpy as jnp
    >>> w, x = jnp.ones((8, 4)), jnp.ones((2, 8))
    >>> check_rules(lambda w, x: jax.nn.relu(x @ w).sum(0), w, x)
    ()
    """
    program = trace(fn, abstract_args).program
    rules = rules_of(program)
    once = {(op.primitive, id(rules[op.index])): op for op in program.ops}
    skipped = [check_rule(program, op, rules[op.index]) for op in once.values()]
    return tuple(dict.fromkeys(reason for each in skipped for reason in each))


def calibrate(
    output: str | Path | None = None,
    *,
    name: str | None = None,
    base: str | None = None,
    quick: bool = False,
    overwrite: bool = False,
    devices: Sequence[Any] | None = None,
    effort: Effort | None = None,
    log: Callable[[str], None] | None = None,
) -> Cluster:
    """Measures this host's devices and describes them as a cluster.

    Matrix products per dtype, memory, and collectives over all devices are timed, all
    devices at work. What one host cannot show (the network between hosts, the memory of
    an accelerator, the limits of a torus) is taken from a chip type of the catalogue,
    and each figure's source says which it is.

    Args:
        output: A cluster file to write, for `cluster("./mine.toml:8")`.
        name: Of the chip type; the file's, or made from the kind of the devices.
        base: The chip type to take from; found by the kind of the devices when None.
        quick: Fewer and smaller measurements.
        overwrite: Whether the file may exist already.
        devices: Of this host; all of this process's when None.
        effort: What is measured and how long, in place of `quick`.
        log: Called with each result in words.

    Returns:
        The devices as a cluster.

    Raises:
        InputError: There is no device, no chip type to take from, or the times cannot
            be told from noise.
        OutputError: The file exists or cannot be written. Nothing was measured then.

    >>> import dataclasses, jax
    >>> from autoshard.measure import QUICK
    >>> tiny = dataclasses.replace(
    ...     QUICK, min_s=1e-3, cpu_matmul_sizes=(16,), cpu_stream_bytes=4096,
    ...     cpu_message_bytes=(1024, 8192))
    >>> here = calibrate(effort=tiny)
    >>> here.kind, here.num_chips == jax.local_device_count()
    ('cpu', True)
    """
    if output is not None:
        check_writable(output)
        if Path(output).exists() and not overwrite:
            raise OutputError(
                f"cannot write {output}: the file exists; name another one, or say "
                "that it may be overwritten (--overwrite)."
            )
        if not str(output).endswith(".toml"):
            raise OutputError(
                f"cannot write {output}: the name of a cluster file ends in .toml."
            )
        name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(output).stem)
    found = measure(
        devices,
        name=name,
        base=base,
        effort=effort or (QUICK if quick else FULL),
        log=log,
    )
    if output is not None:
        save_type(found.chip, output)
    return found


def model_names() -> list[str]:
    """Names of the models of the zoo.

    >>> "llama3-8b" in model_names()
    True
    """
    return list(models.names())


__all__ = [
    "DTYPES",
    "OPTIMIZERS",
    "Cluster",
    "ModelRef",
    "ParallelFunction",
    "ParallelStep",
    "Plan",
    "Repair",
    "Resolved",
    "Strategy",
    "TrainStep",
    "Validation",
    "calibrate",
    "check_rules",
    "check_writable",
    "cluster",
    "cluster_names",
    "load_plan",
    "load_strategy",
    "model_names",
    "optimizer",
    "parallelize",
    "rank_verified",
    "register_rule",
    "repair_plan",
    "resolve",
    "save_plan",
    "search",
    "size",
    "solver",
    "strategy_names",
    "token_batch",
    "train_step",
    "validate",
    "verify_plan",
    "why_not",
]
