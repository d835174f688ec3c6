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

import dataclasses
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from autoshard import models
from autoshard.ir.annotations.paths import SpecMap
from autoshard.ir.errors import InputError, NameUnknownError, OutputError
from autoshard.ir.trace import trace
from autoshard.ir.train_step import TrainStep, train_step
from autoshard.lower import ParallelFunction, ParallelStep, batch_of, parallelize
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
from autoshard.plan.schema import Constraint, ModelRef, Plan, Strategy
from autoshard.rules import register_rule
from autoshard.rules.check import check_rule
from autoshard.rules.registry import rules_of
from autoshard.search import constraints_at, search_plans
from autoshard.validate import Validation
from autoshard.validate import validate as hold_against
from autoshard.verify import (
    Target,
    Verification,
    beyond,
    target_of,
    unplanned,
    verify_lowered,
)

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
    config, notes = _config(ref)
    if layers is not None:
        config = dataclasses.replace(config, layers=layers)
    if ref.seq > config.max_seq:
        raise InputError(
            f"--seq {ref.seq} is longer than model {config.name!r} allows "
            f"({config.max_seq} positions); choose a shorter sequence."
        )
    config = dataclasses.replace(
        config, dtype=DTYPES[ref.dtype], scan_layers=ref.scan_layers
    )
    step = train_step(
        models.next_token_loss, update, model=lambda rngs: models.build(config, rngs)
    )
    return Resolved(step, batch, ref, notes)


def _config(ref: ModelRef) -> tuple[models.DecoderConfig, tuple[str, ...]]:
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


@overload
def search(
    fn: Callable[..., Any],
    *abstract_args: Any,
    cluster: str | Cluster,
    strategy: str | Strategy = ...,
    top: None = ...,
    specs: SpecMap | None = ...,
    aliases: Mapping[str, str] | None = ...,
    replicate: Iterable[str] = ...,
    model_ref: ModelRef | None = ...,
    log: Callable[[str], None] | None = ...,
) -> Plan: ...


@overload
def search(
    fn: Callable[..., Any],
    *abstract_args: Any,
    cluster: str | Cluster,
    strategy: str | Strategy = ...,
    top: int,
    specs: SpecMap | None = ...,
    aliases: Mapping[str, str] | None = ...,
    replicate: Iterable[str] = ...,
    model_ref: ModelRef | None = ...,
    log: Callable[[str], None] | None = ...,
) -> list[Plan]: ...


def search(
    fn: Callable[..., Any],
    *abstract_args: Any,
    cluster: str | Cluster,
    strategy: str | Strategy = "auto",
    top: int | None = None,
    specs: SpecMap | None = None,
    aliases: Mapping[str, str] | None = None,
    replicate: Iterable[str] = (),
    model_ref: ModelRef | None = None,
    log: Callable[[str], None] | None = None,
) -> Plan | list[Plan]:
    """Searches the best plan for a step on a cluster.

    Args:
        fn: A `TrainStep`, or any function whose last argument is the batch and whose
            others are state.
        *abstract_args: Its arguments, arrays or `jax.ShapeDtypeStruct`s. A `TrainStep`
            needs the batch alone.
        cluster: A `Cluster`, or its name such as `"h100:64"`.
        strategy: A `Strategy`, the name of a shipped one, or a TOML file.
        top: Return this many different plans, the fastest first.
        specs: Regular expression over the paths of arguments to what fixes them: a
            `PartitionSpec`, or one entry per dim (an axis, several, `""` for whole,
            `"*"` for open). The first that matches a path holds, before those of the
            strategy.
        aliases: Canonical axis per name that the program gives a mesh axis, where it is
            none of the well-known ones (`dp`, `tp`, `model`, ...).
        replicate: Primitives, or kernels, without a factor rule that every device may
            compute whole; each use is listed in the plan.
        model_ref: Recorded in the plan, so that the command line can run it.
        log: Called with progress in words.

    Returns:
        The plan predicted to be the fastest of those that fit, or a list of plans.

    Raises:
        InfeasibleError: Nothing divides or fits; the message says what would.
        NameUnknownError: Unknown cluster or strategy.
        InputError: The arguments do not fit the function or the strategy.
        RuleMissingError: A primitive of the program has no factor rule.

    >>> import optax
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
    chips = cluster if isinstance(cluster, Cluster) else _cluster(cluster)
    policy = strategy if isinstance(strategy, Strategy) else load_strategy(strategy)
    policy = policy.with_wishes(specs or {}, aliases or {}, replicate)
    plans = search_plans(
        fn, abstract_args, chips, policy, top=top or 1, model_ref=model_ref, log=log
    )
    return plans if top is not None else plans[0]


_cluster = cluster


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

    >>> w, x = jnp.ones((8, 4)), jnp.ones((2, 8))
    >>> check_rules(lambda w, x: jax.nn.relu(x @ w).sum(0), w, x)
    ()
    """
    program = trace(fn, abstract_args).program
    rules = rules_of(program)
    once = {(op.primitive, id(rules[op.index])): op for op in program.ops}
    skipped = [check_rule(program, op, rules[op.index]) for op in once.values()]
    return tuple(dict.fromkeys(reason for each in skipped for reason in each))


def validate(
    directory: str,
    *,
    leave_one_out: bool = False,
    log: Callable[[str], None] | None = None,
) -> Validation:
    """Predicts every usable row of a directory of published training runs.

    Args:
        directory: Of CSV files with the columns of `benchmarks/published`.
        leave_one_out: Also predict each source by constants fitted without it; takes
            some minutes.
        log: Told what is done.

    Returns:
        Errors of step time and memory by source and chip, ranking of plans, recognition
        of what does not fit, and each row left out with its reason.

    Raises:
        InputError: There is no such directory, no table, or no usable row in it.

    >>> validate("no such directory")
    Traceback (most recent call last):
    autoshard.ir.errors.InputError: no such directory is not a directory; ...
    """
    return hold_against(directory, leave_one_out=leave_one_out, log=log)


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


def verify_plan(
    fn: Callable[..., Any],
    plan: Plan,
    *abstract_args: Any,
    target: str | None = None,
    blocks: str | int = "full",
    log: Callable[[str], None] | None = None,
) -> Verification:
    """Compiles a planned step for the plan's own chips, and holds it against the plan.

    No TPU or GPU is needed, only its compiler: `pip install 'autoshard[tpu]'` or
    `'autoshard[gpu]'`.

    Args:
        fn: The `TrainStep`, or the plain function, that the plan was made for.
        plan: From `search` or a file.
        *abstract_args: For a plain function, the arguments given to `search`.
        target: `"tpu"`, `"gpu"` or `"host"`, which is so many virtual CPU devices; by
            default what the plan's chips are.
        blocks: `"full"` compiles the plan's program. 1 or 2 compiles that of the same
            model with so many blocks; with 2 the figures of the full one are reckoned
            from both. `"auto"` does so where the blocks are unrolled and many.
        log: Called with progress in words.

    Returns:
        Planned against emitted collectives, memory and time.

    Raises:
        PlanMismatchError: The plan is for another program.
        InputError: A plain function came without its arguments, the compiler is not
            installed or does not know the topology, or `blocks` asks for a model that
            the plan does not name.

    >>> args = jnp.ones((16, 8)), jnp.ones((8, 4))
    >>> plan = search(jnp.matmul, *args, cluster="cpu:1", strategy="dp")
    >>> verify_plan(jnp.matmul, plan, *args).unexplained
    0
    """
    where = target_of(plan, target)
    log = log or (lambda _: None)
    depth = _depth(plan)
    wanted = _blocks(plan, blocks, depth)
    if not wanted:
        return _verify(fn, plan, abstract_args, where, log)
    found = []
    for layers in wanted:
        shallow, resolved = _shallow(plan, layers)
        log(f"{layers} of {depth} blocks")
        found.append(_verify(resolved.step, shallow, (), where, log))
    if len(found) == 1:
        return dataclasses.replace(found[0], blocks=wanted)
    assert depth is not None
    return beyond(plan, found[0], found[1], (wanted[0], wanted[1], depth))


def _verify(
    fn: Callable[..., Any],
    plan: Plan,
    abstract_args: tuple[Any, ...],
    target: Target,
    log: Callable[[str], None],
) -> Verification:
    step = parallelize(fn, plan, *abstract_args, devices=target.devices())
    if isinstance(step, ParallelStep):
        abstract_args = step.abstract_state, step.abstract_batch
    else:
        abstract_args = tuple(step.args)
    log(f"compiling for {target.kind} {target.name}")
    return verify_lowered(plan, step.jitted.lower(*abstract_args), target)


UNROLLED_AT_MOST = 8
"""Unrolled blocks beyond which a program is not compiled whole unless asked to."""


def _depth(plan: Plan) -> int | None:
    """Blocks of the model that a plan names, None where it names none."""
    ref = plan.program.model
    if ref is None or (":" in ref.model and not Path(ref.model).exists()):
        return None
    return _config(ref)[0].layers


def _blocks(plan: Plan, blocks: str | int, depth: int | None) -> tuple[int, ...]:
    """How many blocks to compile; none for the plan's own program."""
    if blocks not in ("auto", "full", "1", "2", 1, 2):
        raise InputError(f"--blocks must be auto, full, 1 or 2; got {blocks}.")
    if blocks == "full":
        return ()
    ref = plan.program.model
    if depth is None or ref is None:
        if blocks == "auto":
            return ()
        raise InputError(
            f"--blocks {blocks} needs a model by its name or config.json, whose number "
            "of blocks can be changed; this plan's program is a function. Verify it "
            "with --blocks full."
        )
    if blocks == "auto" and (ref.scan_layers or depth <= UNROLLED_AT_MOST):
        return ()  # a loop compiles as fast whatever its turns are
    few = 1 if str(blocks) == "1" else 2
    if depth <= few:
        return ()
    # A loop of one turn is none: compilers treat what is in it otherwise.
    pair = (2, 3) if ref.scan_layers else (1, 2)
    return (1,) if few == 1 else pair


def _shallow(plan: Plan, layers: int) -> tuple[Plan, Resolved]:
    """The plan of the same model with fewer blocks, decided alike."""
    assert plan.program.model is not None
    resolved = resolve(plan.program.model, layers=layers)
    chips = _cluster(plan.cluster.name)
    [shallow] = search_plans(resolved.step, (resolved.batch,), chips, plan.strategy)
    return shallow, resolved


class Repair(NamedTuple):
    """What came of constraining a plan where the compiler did otherwise.

    Attributes:
        plan: With the constraints that were added, or as it was.
        added: These constraints.
        before: The verification of the plan as it was.
        after: That of the repaired one; `before` where it is no better.
        better: Whether the compiler moves less that is not planned.
        why: Why it is not better.
    """

    plan: Plan
    added: tuple[Constraint, ...]
    before: Verification
    after: Verification
    better: bool
    why: str


def repair_plan(
    fn: Callable[..., Any],
    plan: Plan,
    *abstract_args: Any,
    target: str | None = None,
    log: Callable[[str], None] | None = None,
) -> Repair:
    """Adds constraints to a plan where the compiler moves what the plan does not.

    The values computed on the lines of these collectives are pinned to the specs that
    the plan has for them, and the step is compiled again.

    Args:
        fn: As for `verify_plan`.
        plan: As for `verify_plan`.
        *abstract_args: As for `verify_plan`.
        target: As for `verify_plan`.
        log: As for `verify_plan`.

    Returns:
        The repaired plan if it is better, and both verifications.

    Raises:
        PlanMismatchError: As `verify_plan`.
        InputError: As `verify_plan`.

    >>> args = jnp.ones((16, 8)), jnp.ones((8, 4))
    >>> plan = search(jnp.matmul, *args, cluster="cpu:1", strategy="dp")
    >>> repair_plan(jnp.matmul, plan, *args).why
    'the compiler moves nothing that is not planned'
    """
    say = log or (lambda _: None)
    before = verify_plan(fn, plan, *abstract_args, target=target, log=log)
    lines = unplanned(before).lines
    if not lines:
        nothing = "the compiler moves nothing that is not planned"
        return Repair(plan, (), before, before, False, nothing)
    args = (batch_of(plan),) if isinstance(fn, TrainStep) else abstract_args
    added = constraints_at(fn, args, plan, lines)
    if not added:
        full = f"all values on {', '.join(sorted(lines))} are constrained already"
        return Repair(plan, (), before, before, False, full)
    say(f"{len(added)} constraints on {', '.join(sorted(lines))}")
    both = sorted((*plan.constraints, *added), key=lambda c: (c.address, c.slot))
    mended = plan.model_copy(update={"constraints": tuple(both)})
    after = verify_plan(fn, mended, *abstract_args, target=target, log=log)
    had, has = unplanned(before).bytes_, unplanned(after).bytes_
    say(f"bytes moved and not planned: {had} before, {has} after")
    if has >= had or after.unexplained > before.unexplained:
        worse = f"{len(added)} more constraints leave {has} of {had} bytes unplanned"
        return Repair(plan, (), before, before, False, worse)
    return Repair(mended, added, before, after, True, "")


def rank_verified(
    fn: Callable[..., Any],
    plans: Iterable[Plan],
    *abstract_args: Any,
    target: str | None = None,
    log: Callable[[str], None] | None = None,
) -> list[tuple[Plan, Verification]]:
    """Compiles plans and ranks them by what the compiler says.

    Args:
        fn: As for `verify_plan`.
        plans: Of one search.
        *abstract_args: As for `verify_plan`.
        target: As for `verify_plan`.
        log: As for `verify_plan`.

    Returns:
        Each plan and its verification: those that fit first, then the fastest. The time
        is the compiler's, and the planned one of collectives where the compiler
        estimates none; a plan that the compiler refuses comes last.

    Raises:
        PlanMismatchError: As `verify_plan`.
        InputError: As `verify_plan`.

    >>> args = jnp.ones((16, 8)), jnp.ones((8, 4))
    >>> plans = search(jnp.matmul, *args, cluster="cpu:1", strategy="dp", top=1)
    >>> [found.fits for _, found in rank_verified(jnp.matmul, plans, *args)]
    [None]
    """
    found = [
        (
            plan,
            verify_plan(
                fn, plan, *abstract_args, target=target, blocks="auto", log=log
            ),
        )
        for plan in plans
    ]
    return sorted(found, key=lambda pair: (pair[1].fits is False, pair[1].step_s))


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
    "strategy_names",
    "token_batch",
    "train_step",
    "validate",
    "verify_plan",
]
