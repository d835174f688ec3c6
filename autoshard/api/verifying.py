"""Plans against the compilers: verified, repaired, ranked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from autoshard.api.building import Resolved, config_of, resolve
from autoshard.ir.errors import InputError
from autoshard.ir.train_step import TrainStep
from autoshard.lower import ParallelStep, batch_of, parallelize
from autoshard.plan.cluster import cluster
from autoshard.plan.schema import Constraint, Plan
from autoshard.search import constraints_at, search_plans
from autoshard.verify import (
    Target,
    Verification,
    beyond,
    target_of,
    unplanned,
    verify_lowered,
)


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

    >>> import jax.numpy as jnp
    >>> import autoshard as ash
    >>> args = jnp.ones((16, 8)), jnp.ones((8, 4))
    >>> plan = ash.search(jnp.matmul, *args, cluster="cpu:1", strategy="dp")
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
    return config_of(ref)[0].layers


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
    if few == 1 and plan.remat != "none":
        raise InputError(
            f"--blocks 1 leaves no block that repeats, and the plan's remat = "
            f"{plan.remat!r} is of repeated blocks; verify it with --blocks 2."
        )
    # A loop of one turn is none: compilers treat what is in it otherwise. Nor is there
    # anything to rematerialise where nothing repeats.
    alone = not ref.scan_layers and plan.remat == "none"
    return (1,) if few == 1 else (1, 2) if alone else (2, 3)


def _shallow(plan: Plan, layers: int) -> tuple[Plan, Resolved]:
    """The plan of the same model with fewer blocks, decided alike."""
    assert plan.program.model is not None
    resolved = resolve(plan.program.model, layers=layers)
    chips = cluster(plan.cluster.name)
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

    >>> import jax.numpy as jnp
    >>> import autoshard as ash
    >>> args = jnp.ones((16, 8)), jnp.ones((8, 4))
    >>> plan = ash.search(jnp.matmul, *args, cluster="cpu:1", strategy="dp")
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

    >>> import jax.numpy as jnp
    >>> import autoshard as ash
    >>> args = jnp.ones((16, 8)), jnp.ones((8, 4))
    >>> plans = ash.search(jnp.matmul, *args, cluster="cpu:1", strategy="dp", top=1)
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
