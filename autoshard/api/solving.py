"""Searching again and again: with fields fixed, on more chips, and asking why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Unpack

from autoshard.api.inputs import Wishes, passing_on
from autoshard.ir.annotations.paths import SpecMap
from autoshard.ir.errors import InputError
from autoshard.plan.cluster import Cluster, cluster
from autoshard.plan.files import load_strategy
from autoshard.plan.schema import ModelRef, Plan
from autoshard.plan.strategy import Strategy
from autoshard.search import Sizing, Solver, size_of, with_pins
from autoshard.search.space import executable as only_executable

GIB = 2.0**30


def solver(
    fn: Callable[..., Any],
    *abstract_args: Any,
    cluster: str | Cluster,
    strategy: str | Strategy = "auto",
    pins: Mapping[str, Any] | None = None,
    specs: SpecMap | None = None,
    aliases: Mapping[str, str] | None = None,
    replicate: Iterable[str] = (),
    model_ref: ModelRef | None = None,
    executable: bool = False,
    time_limit_s: float | None = None,
    log: Callable[[str], None] | None = None,
) -> Solver:
    """A program on a cluster, traced once and solved as often as one likes.

    Args:
        fn: A `TrainStep`, or any function whose last argument is the batch and whose
            others are state.
        *abstract_args: Its arguments, arrays or `jax.ShapeDtypeStruct`s. A `TrainStep`
            needs the batch alone.
        cluster: A `Cluster`, or its name such as `"h100:64"`.
        strategy: A `Strategy`, the name of a shipped one, or a TOML file.
        pins: Fields fixed by hand beyond the strategy's, such as `{"tensor": 8,
            "remat": "full", "storage.optimizer": "data+fsdp", "rules.vocab": "none"}`.
        specs: Regular expression over the paths of arguments to what fixes them: a
            `PartitionSpec`, or one entry per dim (an axis, several, `""` for whole,
            `"*"` for open). The first that matches a path holds, before those of the
            strategy.
        aliases: Canonical axis per name that the program gives a mesh axis, where it is
            none of the well-known ones (`dp`, `tp`, `model`, ...).
        replicate: Primitives, or kernels, without a factor rule that every device may
            compute whole; each use is listed in the plan.
        model_ref: Recorded in the plan, so that the command line can run it.
        executable: Leave out what is priced but cannot be run yet: pipeline stages,
            attention by a ring or by heads, what is kept in the host's memory.
        time_limit_s: Seconds after which no more candidates are begun with. What was
            found until then, or until Ctrl-C, is returned; its certificate says how far
            from the best it may be.
        log: Called with progress in words.

    Returns:
        A `Solver`: `plans(top)` are the best ones, `front(most)` those that nothing
        beats in both time and memory, `pinned({...})` is a solver with more fields
        fixed that shares the trace.

    Raises:
        NameUnknownError: Unknown cluster, strategy or field.
        InputError: The arguments do not fit the function or the strategy.
        RuleMissingError: A primitive of the program has no factor rule.

    >>> import jax, jax.numpy as jnp, optax
    >>> import autoshard as ash
    >>> step = ash.train_step(
    ...     lambda w, x: ((x @ w) ** 2).mean(),
    ...     optax.sgd(0.1),
    ...     model=lambda key: jax.random.normal(key, (64, 32)),
    ... )
    >>> batch = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    >>> program = solver(step, batch, cluster="cpu:8")
    >>> [plan] = program.pinned({"data": 4, "fsdp": 2}).plans()
    >>> plan.sizes["data"], plan.sizes["fsdp"]
    (4, 2)
    """
    if time_limit_s is not None and not time_limit_s >= 0:
        raise InputError(f"time_limit_s = {time_limit_s} was passed; it is 0 or more.")
    chips = cluster if isinstance(cluster, Cluster) else _cluster(cluster)
    policy = strategy if isinstance(strategy, Strategy) else load_strategy(strategy)
    policy = with_pins(policy, pins or {})
    policy = policy.with_wishes(specs or {}, aliases or {}, replicate)
    policy = only_executable(policy) if executable else policy
    return Solver(
        fn,
        abstract_args,
        chips,
        policy,
        model_ref=model_ref,
        log=log,
        time_limit_s=time_limit_s,
    )


_cluster = cluster


@passing_on(Wishes, solver)
def size(
    fn: Callable[..., Any],
    *abstract_args: Any,
    cluster: str,
    target_tokens_per_s: float | None = None,
    budget_gib: float | None = None,
    log: Callable[[str], None] | None = None,
    **wishes: Unpack[Wishes],
) -> Sizing:
    """Finds how few chips are fast enough, or have memory enough.

    Args:
        fn: As in `solver`.
        *abstract_args: As in `solver`.
        cluster: A type of chips, `"h100"` or `"own.toml"`, without their number.
        target_tokens_per_s: Tokens (batch positions) a second that are wanted.
        budget_gib: GiB of each chip's memory that may be used; all of it when None.
        log: Called with what came of each cluster.
        **wishes: As in `solver`: `strategy`, `pins` and so on.

    Returns:
        The best plan on the smallest cluster that does, and what was tried.

    Raises:
        InfeasibleError: No number of chips up to 131,072 does.
        InputError: Nothing is asked for, or a target is not positive.
        NameUnknownError: Unknown type of chips, or strategy.

    >>> import jax, jax.numpy as jnp, optax
    >>> import autoshard as ash
    >>> step = ash.train_step(
    ...     lambda w, x: ((x @ w) ** 2).mean(),
    ...     optax.sgd(0.1),
    ...     model=lambda key: jax.random.normal(key, (64, 32)),
    ... )
    >>> batch = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    >>> size(step, batch, cluster="h100", budget_gib=1).plan.cluster.num_chips
    1
    """

    def on(chips: Cluster) -> Solver:
        return solver(fn, *abstract_args, cluster=chips, **wishes)

    if ":" in cluster:
        raise InputError(
            f"how many chips are needed is what is asked: pass the type alone, "
            f"{cluster.split(':')[0]!r}, not {cluster!r}."
        )
    return size_of(
        on,
        cluster,
        target_tokens_per_s=target_tokens_per_s,
        budget_bytes=None if budget_gib is None else budget_gib * GIB,
        log=log or (lambda _: None),
    )


def why_not(
    fn: Callable[..., Any],
    plan: Plan,
    *abstract_args: Any,
    pins: Mapping[str, Any],
    strategy: str | Strategy = "auto",
    executable: bool = False,
    log: Callable[[str], None] | None = None,
) -> Plan:
    """The best plan with some fields fixed otherwise, to hold against a plan.

    Everything that is not fixed is chosen anew, so that what differs is the least that
    the change costs. `autoshard compare`, or `autoshard why-not`, shows the two term by
    term.

    Args:
        fn: What the plan is for.
        plan: The plan in question; its cluster is used.
        *abstract_args: As in `solver`.
        pins: The change, as in `solver`.
        strategy: In which the rest is chosen.
        executable: As in `solver`.
        log: As in `solver`.

    Raises:
        InfeasibleError: Nothing fits with the change; the message says why.
        NameUnknownError: No field has this name.
        InputError: A value does not suit its field.

    >>> import jax, jax.numpy as jnp, optax
    >>> import autoshard as ash
    >>> step = ash.train_step(
    ...     lambda w, x: ((x @ w) ** 2).mean(),
    ...     optax.sgd(0.1),
    ...     model=lambda key: jax.random.normal(key, (64, 32)),
    ... )
    >>> batch = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    >>> plan = ash.search(step, batch, cluster="cpu:8")
    >>> other = why_not(step, plan, batch, pins={"data": 2, "fsdp": 4})
    >>> other.predicted.step_s >= plan.predicted.step_s
    True
    """
    if not pins:
        raise InputError(
            "what should be otherwise? Pass pins such as {'tensor': 8}, or --set "
            "tensor=8."
        )
    program = solver(
        fn,
        *abstract_args,
        cluster=plan.cluster.name,
        strategy=strategy,
        pins=pins,
        model_ref=plan.program.model,
        executable=executable,
        log=log,
    )
    return program.plans()[0]
