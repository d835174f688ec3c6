"""From a strategy with holes to the best plans of its space."""

from __future__ import annotations

from typing import Any

from autoshard.plan.cluster import Cluster
from autoshard.plan.schema import ModelRef, Plan
from autoshard.plan.strategy import Strategy
from autoshard.search.solver import Log, Solver


def search_plans(
    fn: Any,
    args: tuple[Any, ...],
    cluster: Cluster,
    strategy: Strategy,
    *,
    top: int = 1,
    model_ref: ModelRef | None = None,
    log: Log | None = None,
    time_limit_s: float | None = None,
) -> list[Plan]:
    """Searches the space of a strategy and writes the best plans.

    Args:
        fn: A `TrainStep`, or a function whose last argument is the batch.
        args: Abstract arguments.
        cluster: Where to run.
        strategy: Which fields are fixed and which are holes.
        top: How many plans, each with another mesh, storage or rules.
        model_ref: Recorded in the plan.
        log: Called with progress in words.
        time_limit_s: After it, what was found so far is returned, with its true gap.

    Returns:
        Plans, the fastest first.

    Raises:
        InfeasibleError: Nothing divides, or nothing fits in memory.
        InputError: The strategy asks for what the function cannot do.
        RuleMissingError: A primitive has no rule.
    """
    solver = Solver(
        fn, args, cluster, strategy, model_ref=model_ref, log=log,
        time_limit_s=time_limit_s,
    )  # fmt: skip
    return solver.plans(top)
