"""How many chips a program needs for a speed or a memory budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from autoshard.cost import fastest_s, tokens_per_step
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.plan.cluster import Cluster, cluster
from autoshard.plan.schema import Plan
from autoshard.search.solver import Solver

_MOST_CHIPS = 2**17


@dataclass(frozen=True)
class Tried:
    """A cluster that was tried.

    Attributes:
        cluster: Its name.
        num_chips: Its chips.
        reason: Why it does not do; empty for the one that does.
        plan: The best plan there, None where none was needed or none fits.
    """

    cluster: str
    num_chips: int
    reason: str
    plan: Plan | None = None


@dataclass(frozen=True)
class Sizing:
    """The smallest cluster that does, and what was tried before it.

    Attributes:
        plan: For the smallest cluster of those tried that does.
        tried: In rising order, the last of which does.
    """

    plan: Plan
    tried: tuple[Tried, ...]


def clusters_of(type_: str) -> Iterator[Cluster]:
    """Clusters of a chip type, the smallest first: powers of two, and 1.5 times those.

    Counts in which the type does not come are left out.

    >>> import itertools
    >>> [c.num_chips for c in itertools.islice(clusters_of("h100"), 8)]
    [1, 2, 3, 4, 6, 8, 16, 24]
    """
    count = 1
    while count <= _MOST_CHIPS:
        for chips in (count, count * 3 // 2) if count > 1 else (count,):
            try:
                yield cluster(f"{type_}:{chips}")
            except InputError:
                continue
        count *= 2


def size(
    solver_on: Callable[[Cluster], Solver],
    type_: str,
    *,
    target_tokens_per_s: float | None,
    budget_bytes: float | None,
    log: Callable[[str], None],
) -> Sizing:
    """Finds the fewest chips on which some plan is fast enough and small enough.

    Clusters are tried in rising order. One is left out without pricing where the
    program's matrix products alone, at the best rate of all chips, are too slow.

    Args:
        solver_on: Makes the solver of the program on a cluster.
        type_: Of the chips: a name of the catalogue, or a cluster file.
        target_tokens_per_s: Tokens (batch positions) per second to reach.
        budget_bytes: Bytes of a chip's memory to stay within.
        log: Called with progress in words.

    Raises:
        InfeasibleError: No cluster up to 131,072 chips does.
        InputError: Nothing is asked for, or a target is not positive.
    """
    for name, value in (
        ("target_tokens_per_s", target_tokens_per_s),
        ("budget_gib", budget_bytes),
    ):
        if value is not None and not value > 0:
            raise InputError(f"{name} = {value} was passed; it must be positive.")
    if target_tokens_per_s is None and budget_bytes is None:
        raise InputError(
            "how many chips are needed depends on what for: pass target_tokens_per_s, "
            "or budget_gib of a chip's memory, or both."
        )
    found: list[Tried] = []
    solver: Solver | None = None
    smallest = next(clusters_of(type_), None)
    if smallest is None:
        cluster(f"{type_}:1")  # says what is wrong with the name
    for chips in clusters_of(type_):
        solver = solver.on(chips) if solver else solver_on(chips)
        plain = solver.space.sketch("none")
        assert plain is not None
        tokens = tokens_per_step(plain.traced)
        shallow = plain.shallow
        floor_s = fastest_s(
            shallow.traced.program, shallow.classes, shallow.work, chips
        )
        if target_tokens_per_s and tokens / floor_s < target_tokens_per_s:
            most = f"matrix products alone allow {tokens / floor_s:.4g} tokens/s"
            found.append(Tried(chips.name, chips.num_chips, most))
            continue
        tried = _try(solver, target_tokens_per_s, budget_bytes)
        found.append(tried)
        log(f"{tried.cluster}: {tried.reason or 'does'}")
        if tried.plan is not None and not tried.reason:
            return Sizing(tried.plan, tuple(found))
    last = "; ".join(f"{t.cluster}: {t.reason}" for t in found[-3:])
    raise InfeasibleError(
        f"no cluster of {type_} up to {_MOST_CHIPS} chips does: {last}. Ask for less, "
        "or use a larger batch, which more chips can share."
    )


def _try(solver: Solver, target: float | None, budget: float | None) -> Tried:
    chips = solver.cluster
    name, count = chips.name, chips.num_chips
    try:
        if budget is None:
            plan = solver.plans()[0]
        elif (within := solver.smaller(budget)) is None:
            return Tried(name, count, "nothing stays within the budget of memory")
        else:
            plan = within
    except InfeasibleError as error:
        return Tried(name, count, re.split(": |; ", str(error))[0])
    speed = plan.predicted.tokens_per_s
    slow = f"{speed:.4g} tokens/s" if target and speed < target else ""
    return Tried(name, count, slow, plan)
