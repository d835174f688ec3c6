"""Words for the case that nothing fits: how much is missing, and what would help."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from autoshard.cost.offload import host_room_bytes
from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import AutoshardError, InfeasibleError
from autoshard.plan.cluster import Cluster
from autoshard.plan.files import load_strategy
from autoshard.plan.strategy import Strategy
from autoshard.search.candidates import Space
from autoshard.search.divisible import what_fails
from autoshard.search.explore import Explored
from autoshard.search.pinning import fixed_fields, opened
from autoshard.search.priced import Candidates
from autoshard.search.watch import Watch

_MAX_GROWTH = 4096
_STORED = "storage.params"


def _gib(bytes_: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if bytes_ >= size:
            return f"{bytes_ / size:.1f} {unit}"
    return f"{bytes_ / 1024:.1f} KiB"


def explain_indivisible(
    space: Space, groups: list[Candidates], cluster: Cluster, strategy: Strategy
) -> str:
    """Says which dims keep every mesh from dividing, with the parameters' paths."""
    batch = space.batch()
    grid, cuts = space.candidates(strategy, cluster)
    blame: Counter[str] = Counter()
    for group in groups:
        blame.update(what_fails(group.pricer, grid, cuts, batch))
    said = "; ".join(text for text, _ in blame.most_common(3))
    fields = {**strategy.mesh, "microbatches": strategy.schedule.microbatches}
    fixed = ", ".join(f"{key} = {value}" for key, value in fields.items())
    other = (
        "fix fewer fields"
        if strategy.name == "auto"
        else "take a strategy with more axes (such as 'auto')"
    )
    return (
        f"nothing divides: no mesh of the {cluster.num_chips} chips of {cluster.name} "
        f"suits strategy {strategy.name!r} ({fixed}): {said}. Choose a batch that is a "
        f"multiple of the devices it is spread over, or fewer chips, or {other}."
    )


def _smallest(explored: Explored) -> tuple[Candidates, int]:
    """The candidate that needs the least memory."""
    groups = [g for g in explored.groups if len(g.peak_bytes)]
    group = min(groups, key=lambda g: float(g.peak_bytes.min()))
    return group, int(np.argmin(group.peak_bytes))


def _least_on_host(explored: Explored) -> float:
    """Bytes in the host's memory, of the candidate that needs the least there."""
    return min(float(g.host_bytes.min()) for g in explored.groups if len(g.host_bytes))


def _fastest(space: Space, strategy: Strategy, cluster: Cluster) -> float | None:
    """Seconds a step of the best that fits, None if nothing does."""
    capacity = cluster.hbm_bytes * MEMORY_HEADROOM
    watch = Watch(1, capacity, capacity)
    try:
        for _ in space.priced(strategy, cluster, watch=watch):
            pass
    except AutoshardError:
        return None
    return watch.fastest_s if np.isfinite(watch.fastest_s) else None


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
    space: Space,
    explored: Explored,
    cluster: Cluster,
    strategy: Strategy,
    refused: Sequence[tuple[float, Strategy]] = (),
) -> str:
    """Says how much memory is missing, what is in conflict, and what would fit.

    Every change is priced: what it would make of the step.

    Args:
        space: Of the program.
        explored: What was priced of it.
        cluster: Where.
        strategy: Of which nothing fits.
        refused: Candidates that fit as the search prices them and do not with their
            microbatches traced, each with the bytes that it then needs.
    """
    group, k = _smallest(explored)
    capacity = explored.capacity
    least, smallest = min(
        refused or [(float(group.peak_bytes[k]), group.filled(k))],
        key=lambda found: found[0],
    )
    if np.isinf(least):
        held, room = _least_on_host(explored), host_room_bytes(cluster)
        return (
            f"no plan of strategy {strategy.name!r} fits {cluster.name}: what it "
            f"offloads needs {_gib(held)} or more of what a chip has in the host's "
            f"memory, of which {_gib(room)} can be used. Offload less, take "
            "offload = 'auto', more chips, or storage over more axes."
        )
    mesh = " x ".join(f"{a}={n}" for a, n in smallest.mesh.items() if n != 1)
    lines = [
        f"no plan of strategy {strategy.name!r} fits {cluster.name}: the smallest "
        f"({mesh or 'one chip'}, {smallest.schedule.microbatches} microbatches, remat "
        f"{smallest.schedule.remat}{_offloaded(smallest)}) needs {_gib(least)} a chip, "
        f"{_gib(capacity)} can be used, {_gib(least - capacity)} are missing."
    ]
    if explored.left:
        lines.append(
            f"{explored.left} structures were left unpriced ({explored.why}): more "
            "time may find one."
        )
    conflict, changes = conflicts(space, cluster, strategy)
    if conflict:
        lines.append(f"In conflict: {'; '.join(conflict)}.")
    auto = load_strategy("auto")
    chosen = [strategy] if strategy.name == "auto" else [strategy, auto]
    if not changes and strategy.name != "auto":
        step_s = _fastest(space, auto, cluster)
        if step_s is not None:
            changes.append(("--strategy auto on the same chips", step_s))
    changes += _more_chips(space, cluster, chosen)
    said = "; ".join(f"{text} ({step_s:.4g} s a step)" for text, step_s in changes)
    lines.append(
        f"What would fit: {said}."
        if changes
        else f"Nothing tried fits, up to {_MAX_GROWTH} times the chips; use a smaller "
        "batch, sequence or model, or chips with more memory."
    )
    return " ".join(lines)


def conflicts(
    space: Space, cluster: Cluster, strategy: Strategy
) -> tuple[list[str], list[tuple[str, float]]]:
    """The smallest set of fixed fields in conflict, and the nearest changes that fit.

    All of the strategy's fields are made holes and the space is priced once. A fitting
    candidate breaks some of the fixed fields; those that break the fewest are the
    nearest changes. A set of fields is in conflict if every fitting candidate breaks
    one of them: the smallest hitting set of what the candidates break.

    Returns:
        The fields in conflict, in words with the place that fixed them; changes with
        the seconds a step that they lead to, the fastest first. Nothing, where no
        other filling of the fields fits.
    """
    fixed = fixed_fields(strategy)
    capacity = cluster.hbm_bytes * MEMORY_HEADROOM
    fastest: dict[frozenset[str], float] = {}

    @cache
    def meshes(keys: frozenset[str]) -> set[tuple[int, ...]]:
        """Of the strategy with some fields made holes."""
        try:
            rows = space.meshes(opened(strategy, keys), cluster)
        except InfeasibleError:  # none that the program's own shard_maps allow
            return set()
        return {tuple(row) for row in rows.tolist()}

    watch, auto = Watch(None, capacity, capacity), opened(strategy, fixed)
    for group in space.priced(auto, cluster, keep=strategy, watch=watch):
        fits = group.peak_bytes <= capacity
        if not fits.any():
            continue
        broken = {key: ~group.meets(key, value)[fits] for key, value in fixed.items()}
        sizes = group.sizes[fits]
        for k, step_s in enumerate(group.step_s[fits].tolist()):
            keys = frozenset(key for key, mask in broken.items() if mask[k])
            # What is to be stored over some axes is not where these have one device,
            # unless all meshes are like that.
            if _STORED in fixed and tuple(sizes[k].tolist()) not in meshes(keys):
                keys |= {_STORED}
            if keys:  # else it was tried, and with its microbatches traced it is larger
                fastest[keys] = min(fastest.get(keys, step_s), step_s)
    if not fastest:
        return [], []
    fewest = min(map(len, fastest))
    near = sorted(
        (s, sorted(keys)) for keys, s in fastest.items() if len(keys) == fewest
    )
    changes = [
        (" and ".join(f"{key} = 'auto'" for key in keys), s) for s, keys in near[:3]
    ]
    smallest = next(
        keys
        for size in range(1, len(fixed) + 1)
        for keys in itertools.combinations(fixed, size)
        if all(not broken.isdisjoint(keys) for broken in fastest)
    )
    texts = [f"{key} = {_text(fixed[key])}{strategy.where(key)}" for key in smallest]
    return texts, changes


def _offloaded(strategy: Strategy) -> str:
    kinds = strategy.schedule.offload
    return f", {' and '.join(kinds)} offloaded" if kinds else ""


def _text(value: Any) -> str:
    return str(value if isinstance(value, int | str) else list(value))


def _more_chips(
    space: Space, cluster: Cluster, chosen: list[Strategy]
) -> list[tuple[str, float]]:
    """The fewest chips that fit: with this batch, else with a batch grown alike."""
    for grow_batch in (False, True):
        factor = 2
        while factor <= _MAX_GROWTH:
            larger = _grown(cluster, factor)
            there = space.with_batch_times(factor) if grow_batch else space
            for strategy in chosen:
                if larger is None:
                    break
                step_s = _fastest(there, strategy, larger)
                if step_s is None:
                    continue
                how = "" if strategy is chosen[0] else " with --strategy auto"
                if grow_batch:
                    how += f" and a batch of {there.batch()}"
                return [(f"{larger.num_chips} chips ({larger.name}){how}", step_s)]
            factor *= 2
    return []
