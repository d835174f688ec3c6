"""Programs, strategies and meshes that plans are held against the compiler on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from autoshard import models
from autoshard.ir.train_step import TrainStep, train_step
from autoshard.lower import parallelize
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy, strategy_names
from autoshard.plan.schema import Plan
from autoshard.plan.strategy import Strategy
from autoshard.search import search_plans
from autoshard.verify import Comparison, Verdict, verify_collectives

BATCH, SEQ = 16, 32
MESHES = ((2, 4), (4, 2), (8,))
"""Sizes of the last axes of a strategy's mesh; those before them have size 1."""

SCHEDULES = {"plain": (1, "none"), "accumulated": (2, "full")}
"""Microbatches and remat."""

ZOO = ("gpt2-tiny", "llama3-tiny")


@dataclass(frozen=True)
class Program:
    """A train step to plan.

    Attributes:
        name: Name in the record.
        make: Builds the step and its abstract arguments, as `search` takes them.
        ours: Whether it is of the zoo.
    """

    name: str
    make: Callable[[], tuple[Any, tuple[Any, ...]]]
    ours: bool = True


@dataclass(frozen=True)
class Case:
    """One program under one strategy on one mesh."""

    program: Program
    strategy: str
    mesh: tuple[tuple[str, int], ...]
    schedule: str

    @property
    def name(self) -> str:
        """Everything that tells it from other cases."""
        mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh)
        return f"{self.program.name} {self.strategy} {mesh} {self.schedule}"


def zoo() -> dict[str, Program]:
    """Tiny models of the zoo, layers in a loop and unrolled."""

    def program(name: str, layers: str) -> Program:
        return Program(f"{name}-{layers}", lambda: _zoo_step(name, layers == "scanned"))

    pairs = itertools.product(ZOO, ("scanned", "unrolled"))
    return {p.name: p for p in (program(name, layers) for name, layers in pairs)}


def _zoo_step(name: str, scan: bool) -> tuple[TrainStep, tuple[Any, ...]]:
    config = dataclasses.replace(
        models.get(name), scan_layers=scan, dtype="float32", param_dtype="float32"
    )
    step = train_step(
        models.next_token_loss,
        optax.adamw(1e-3),
        model=lambda rngs: models.build(config, rngs),
    )
    leaf = jax.ShapeDtypeStruct((BATCH, SEQ), jnp.int32)
    return step, ({"tokens": leaf, "targets": leaf},)


def third_party() -> dict[str, Program]:
    """Small sizes of other people's models whose packages are installed here."""
    from clients import clients

    def program(client: Any) -> Program:
        def make() -> tuple[Any, tuple[Any, ...]]:
            case = client.small(optax.adamw(1e-3))
            return case.step, case.abstract_args

        return Program(client.name, make, ours=False)

    return {c.name: program(c) for c in clients().values() if not c.missing()}


def cases(program: Program) -> Iterator[Case]:
    """Every strategy on every mesh; for the zoo once with accumulation and remat."""
    for strategy in strategy_names():
        meshes = list(dict.fromkeys(_laid_over(strategy, sizes) for sizes in MESHES))
        for mesh in meshes:
            yield Case(program, strategy, mesh, "plain")
        if program.ours:
            yield Case(program, strategy, meshes[0], "accumulated")


def _laid_over(strategy: str, sizes: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    axes = list(load_strategy(strategy).mesh)
    if len(axes) < len(sizes):
        sizes = (8,)
    padded = (1,) * (len(axes) - len(sizes)) + sizes
    return tuple(zip(axes, padded, strict=True))


def filled(case: Case) -> Strategy:
    """The case's strategy with its mesh and schedule fixed."""
    strategy = load_strategy(case.strategy)
    microbatches, remat = SCHEDULES[case.schedule]
    schedule = {"microbatches": microbatches, "remat": remat}
    return strategy.model_copy(
        update={
            "mesh": {**strategy.mesh, **dict(case.mesh)},
            "schedule": strategy.schedule.model_copy(update=schedule),
        }
    )


@functools.lru_cache(maxsize=1)
def _made(program: Program) -> tuple[Any, tuple[Any, ...]]:
    return program.make()


def plan_and_verify(case: Case) -> tuple[Plan, Verdict]:
    """Searches, lowers, compiles and compares one case.

    Raises:
        InfeasibleError: A dim of the program does not divide over the mesh.
    """
    step, args = _made(case.program)
    [plan] = search_plans(step, args, cluster("cpu:8"), filled(case))
    if isinstance(step, TrainStep):
        parallel = parallelize(step, plan)
        given = (parallel.abstract_state, parallel.abstract_batch)
    else:
        parallel = parallelize(step, plan, *args)
        given = args
    return plan, verify_collectives(plan, parallel.jitted.lower(*given))


def figures(comparison: Comparison) -> dict[str, Any]:
    """A comparison as it is recorded."""
    lines: dict[str, int] = {}
    for difference in comparison.differences:
        lines[str(difference)] = lines.get(str(difference), 0) + 1
    return {
        "planned_bytes": comparison.planned_bytes,
        "emitted_bytes": comparison.emitted_bytes,
        "matched_bytes": comparison.matched_bytes,
        "steps_bytes": comparison.steps_bytes,
        "fraction": comparison.fraction,
        "forms_bytes": comparison.by_form(),
        "causes_bytes": comparison.by_cause(),
        "differences": [f"{n} x {text}" for text, n in sorted(lines.items())],
    }
