"""Words for the case that nothing fits: how much is missing, and what would help."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import AutoshardError
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import Cluster
from autoshard.plan.files import load_strategy
from autoshard.plan.schema import Schedule, Strategy
from autoshard.search.divisible import what_fails

_MAX_GROWTH = 4096


def _gib(bytes_: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if bytes_ >= size:
            return f"{bytes_ / size:.1f} {unit}"
    return f"{bytes_ / 1024:.1f} KiB"


def explain_indivisible(space: Any, groups: list[Any], cluster: Cluster) -> str:
    """Says which dims keep every mesh from dividing, with the parameters' paths."""
    strategy, batch = groups[0].strategy, space.batch()
    grid, cuts = space.candidates(strategy, cluster)
    blame: Counter[str] = Counter()
    for group in groups:
        blame.update(what_fails(group.pricer, grid, cuts, batch))
    said = "; ".join(text for text, _ in blame.most_common(3))
    fixed = ", ".join(f"{a} = {n}" for a, n in strategy.mesh.items())
    return (
        f"nothing divides: no mesh of the {cluster.num_chips} chips of {cluster.name} "
        f"suits strategy {strategy.name!r} ({fixed}): {said}. Choose a batch that is a "
        f"multiple of the devices it is spread over, fewer chips, or a strategy with "
        "more axes (such as 'auto')."
    )


def _smallest(groups: list[Any]) -> tuple[float, Any, int]:
    best: tuple[float, Any, int] | None = None
    for group in groups:
        if len(group.peak_bytes):
            k = int(np.argmin(group.peak_bytes))
            if best is None or group.peak_bytes[k] < best[0]:
                best = (float(group.peak_bytes[k]), group, k)
    assert best is not None
    return best


def _fits(space: Any, strategy: Strategy, cluster: Cluster) -> bool:
    try:
        groups = space.price(strategy, cluster)
    except AutoshardError:
        return False
    capacity = cluster.hbm_bytes * MEMORY_HEADROOM
    return any((g.peak_bytes <= capacity).any() for g in groups)


def _grown(cluster: Cluster, factor: int) -> Cluster | None:
    """The same cluster with `factor` times as many chips."""
    shape = list(cluster.shape)
    if cluster.kind == "tpu":
        left = factor
        while left > 1:
            shape[shape.index(min(shape))] *= 2
            left //= 2
        shape.sort()
    elif (
        cluster.kind == "gpu" and cluster.num_chips < cluster.chip.chips_per_node.value
    ):
        shape[1] *= factor
        whole = int(cluster.chip.chips_per_node.value)
        if shape[1] > whole:
            if shape[1] % whole:
                return None
            shape = [shape[1] // whole, whole]
    else:
        shape[0] *= factor
    try:
        return Cluster(chip=cluster.chip, shape=tuple(shape))
    except ValueError:
        return None


def explain_no_fit(
    space: Any, groups: list[Any], cluster: Cluster, strategy: Strategy
) -> str:
    """Says how much memory is missing and the smallest change that would fit."""
    least, group, k = _smallest(groups)
    capacity = cluster.hbm_bytes * MEMORY_HEADROOM
    sizes = dict(zip(AXES, group.sizes[k].tolist(), strict=True))
    mesh = " x ".join(f"{a}={n}" for a, n in sizes.items() if n > 1) or "one chip"
    missing = least - capacity
    lines = [
        f"no plan of strategy {strategy.name!r} fits {cluster.name}: the smallest "
        f"({mesh}, {int(group.cuts[k])} microbatches, remat "
        f"{group.strategy.schedule.remat}) needs {_gib(least)} a chip, "
        f"{_gib(capacity)} can be used, {_gib(missing)} are missing."
    ]
    change = _smallest_change(space, cluster, strategy)
    lines.append(
        f"The smallest change that fits: {change}."
        if change
        else f"Nothing tried fits, up to {_MAX_GROWTH} times the chips; use a smaller "
        "batch, sequence or model, or chips with more memory."
    )
    return " ".join(lines)


def _smallest_change(space: Any, cluster: Cluster, strategy: Strategy) -> str | None:
    schedule = strategy.schedule
    if schedule.remat == "none":
        eased = schedule.model_copy(update={"remat": "full"})
        if _fits(space, strategy.model_copy(update={"schedule": eased}), cluster):
            return "remat = 'full' in the strategy's [schedule]"
    if schedule.microbatches != "auto":
        eased = schedule.model_copy(update={"microbatches": "auto"})
        if _fits(space, strategy.model_copy(update={"schedule": eased}), cluster):
            return "microbatches = 'auto' in the strategy's [schedule]"
    open_schedule = strategy.model_copy(
        update={"schedule": Schedule(microbatches="auto", remat="auto")}
    )
    if _fits(space, open_schedule, cluster):
        return "microbatches = 'auto' and remat = 'auto' in the strategy's [schedule]"
    auto = load_strategy("auto")
    if strategy.name != "auto" and _fits(space, auto, cluster):
        return "--strategy auto on the same chips"
    return _more_chips(space, cluster, strategy, auto)


def _more_chips(
    space: Any, cluster: Cluster, strategy: Strategy, auto: Strategy
) -> str | None:
    """The fewest chips that fit: with this batch, else with a batch grown alike."""
    for grow_batch in (False, True):
        factor = 2
        while factor <= _MAX_GROWTH:
            larger = _grown(cluster, factor)
            there = space.with_batch_times(factor) if grow_batch else space
            for chosen in (strategy, auto)[: 1 if strategy.name == "auto" else 2]:
                if larger is None or not _fits(there, chosen, larger):
                    continue
                how = "" if chosen is strategy else " with --strategy auto"
                if grow_batch:
                    how += f" and a batch of {there.batch()}"
                return f"{larger.num_chips} chips ({larger.name}){how}"
            factor *= 2
    return None
