"""A plan against what the compiler made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoshard.plan.schema import Plan
from autoshard.verify.comparison import Comparison
from autoshard.verify.emitted import compile_and_read
from autoshard.verify.match import compare


@dataclass(frozen=True, slots=True)
class Verdict:
    """Planned collectives against emitted ones, before and after optimization.

    Attributes:
        partitioned: Against the module right after SPMD partitioning.
        optimized: Against the module that runs.
        rematerialized: Warnings that an array was gathered whole on every device
            because there was no other way from one sharding to the next.
    """

    partitioned: Comparison
    optimized: Comparison
    rematerialized: tuple[str, ...]


def verify_collectives(plan: Plan, lowered: Any) -> Verdict:
    """Compiles a lowered step and holds its collectives against the plan.

    Args:
        plan: What the step was lowered from.
        lowered: The step after `.lower(...)`.

    Returns:
        Both comparisons, and the compiler's warnings.

    Raises:
        InputError: The compiler's output cannot be read.

    >>> import autoshard as ash, jax.numpy as jnp
    >>> args = jnp.ones((8, 4)), jnp.ones((16, 8))
    >>> fn = lambda w, x: (x @ w).sum()
    >>> plan = ash.search(fn, *args, cluster="cpu:1", strategy="dp")
    >>> step = ash.parallelize(fn, plan, *args)
    >>> verify_collectives(plan, step.jitted.lower(*args)).partitioned.fraction
    1.0
    """
    sizes = {axis.axis: axis.size for axis in plan.axes}
    emitted = compile_and_read(lowered, sizes)
    planned = plan.predicted.collectives
    return Verdict(
        partitioned=compare(planned, emitted.partitioned),
        optimized=compare(planned, emitted.optimized),
        rematerialized=emitted.rematerialized,
    )
