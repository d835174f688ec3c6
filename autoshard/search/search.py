"""The search: every candidate of the space is priced, the best that fits is planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from autoshard.cost import Pricer
from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.ir.mesh import AXES
from autoshard.ir.trace import abstract
from autoshard.ir.train_step import TrainStep
from autoshard.plan.cluster import Cluster
from autoshard.plan.schema import Certificate, ModelRef, Plan, Strategy
from autoshard.plan.sharded import Layout
from autoshard.propagate import propagate
from autoshard.search import space
from autoshard.search.divisible import divisible
from autoshard.search.finish import finish
from autoshard.search.reading import Sketch, fixed_sizes
from autoshard.search.remedy import explain_indivisible, explain_no_fit

Log = Callable[[str], None]


@dataclass(frozen=True)
class Candidates:
    """All candidates of one structure, priced."""

    strategy: Strategy
    pricer: Pricer
    sizes: np.ndarray
    cuts: np.ndarray
    step_s: np.ndarray
    peak_bytes: np.ndarray
    indivisible: int


@dataclass
class Space:
    """Prices the structures of a strategy for one program."""

    fn: Any
    args: tuple[Any, ...]
    log: Log
    strategy: Strategy

    def __post_init__(self) -> None:
        self._sketches: dict[str, Sketch | None] = {}
        self._pricers: dict[Any, Pricer] = {}

    def sketch(self, remat: str, *, required: bool = True) -> Sketch | None:
        """The program traced without microbatches, with or without remat."""
        if remat not in self._sketches:
            fn = self.fn
            if isinstance(fn, TrainStep):
                fn = fn.with_schedule(microbatches=1, remat=remat)
            elif remat != "none":
                if required:
                    raise InputError(
                        "the strategy fixes remat = 'full', but a plain function "
                        "cannot be rematerialised: build it with "
                        "autoshard.train_step(loss_fn, optimizer, model=...)."
                    )
                return None
            try:
                self._sketches[remat] = Sketch.of(fn, self.args, self.strategy)
            except InputError:
                if required or remat == "none":
                    raise
                self.log("remat 'full' left out: no block repeats in the loss function")
                self._sketches[remat] = None
        return self._sketches[remat]

    def batch(self) -> int:
        """Leading dim of the data inputs."""
        sketch = self.sketch("none")
        assert sketch is not None
        sizes = {
            i.shape[0] for i in sketch.traced.inputs if i.state == "data" and i.shape
        }
        if len(sizes) > 1:
            raise InputError(
                f"the data inputs disagree on the batch size: leading dims "
                f"{sorted(sizes)}; give every leaf of the batch the same leading dim."
            )
        return next(iter(sizes), 0)

    def with_batch_times(self, factor: int) -> Space:
        """The same program on a batch `factor` times as large."""
        *state, batch = self.args
        larger = jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct((x.shape[0] * factor, *x.shape[1:]), x.dtype)
                if x.shape
                else x
            ),
            abstract(batch),
        )
        return Space(self.fn, (*state, larger), self.log, self.strategy)

    def meshes(self, strategy: Strategy, cluster: Cluster) -> np.ndarray:
        """The meshes that the program's own manual regions allow, int64[mesh, axis].

        Raises:
            InfeasibleError: None.
        """
        rows = space.meshes(strategy, cluster)
        sketch = self.sketch("none")
        assert sketch is not None
        for axis, size in fixed_sizes(sketch).items():
            column = rows[:, AXES.index(axis)]
            if not (column == size).any():
                raise InfeasibleError(
                    f"a shard_map of the program is written for {size} devices along "
                    f"{axis!r}, but strategy {strategy.name!r} on {cluster.name} has "
                    f"it only in sizes {sorted(set(column.tolist()))}; set [mesh] "
                    f"{axis} = {size}, or change the shard_map."
                )
            rows = rows[column == size]
        return rows

    def candidates(
        self, strategy: Strategy, cluster: Cluster
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mesh sizes, int64[candidate, axis], and microbatches, int64[candidate]."""
        rows = self.meshes(strategy, cluster)
        cuts = space.microbatches(
            strategy, self.batch(), isinstance(self.fn, TrainStep)
        )
        pieces = np.tile(np.array(cuts, dtype=np.int64), len(rows))
        return np.repeat(rows, len(cuts), axis=0), pieces

    def price(self, strategy: Strategy, cluster: Cluster) -> list[Candidates]:
        """Prices every candidate of every structure."""
        required = strategy.schedule.remat != "auto"
        batch = self.batch()
        grid, cuts = self.candidates(strategy, cluster)
        found = []
        for structure in space.structures(strategy):
            remat = structure.schedule.remat
            sketch = self.sketch(remat, required=required)
            if sketch is None:
                continue
            layout = Layout.of(structure)
            key = (
                remat,
                layout.rules,
                layout.params,
                layout.gradients,
                layout.optimizer,
            )
            pricer = self._pricers.get(key)
            if pricer is None:
                sharded = propagate(sketch.traced, sketch.classes, layout)
                pricer = self._pricers[key] = Pricer(sharded, sketch.work)
            fits = divisible(pricer, grid, cuts, batch)
            sizes, pieces = grid[fits], cuts[fits]
            prices = pricer.price(cluster, sizes, pieces.astype(np.float64))
            found.append(
                Candidates(
                    structure,
                    pricer,
                    sizes,
                    pieces,
                    prices.step_s,
                    prices.peak_bytes,
                    int((~fits).sum()),
                )
            )
        return found


def search_plans(
    fn: Any,
    args: tuple[Any, ...],
    cluster: Cluster,
    strategy: Strategy,
    *,
    top: int = 1,
    model_ref: ModelRef | None = None,
    log: Log | None = None,
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

    Returns:
        Plans, the fastest first.

    Raises:
        InfeasibleError: Nothing divides, or nothing fits in memory.
        InputError: The strategy asks for what the function cannot do.
        RuleMissingError: A primitive has no rule.
    """
    log = log or (lambda _: None)
    everything = Space(fn, args, log, strategy)
    log(f"tracing and analysing the step for {cluster.name}")
    plain = everything.sketch("none")
    assert plain is not None
    for remark in plain.remarks:
        log(remark)
    groups = everything.price(strategy, cluster)
    indivisible = sum(g.indivisible for g in groups)
    enumerated = sum(len(g.sizes) for g in groups)
    if not enumerated:
        raise InfeasibleError(explain_indivisible(everything, groups, cluster))
    capacity = cluster.hbm_bytes * MEMORY_HEADROOM
    order = []
    infeasible = 0
    for number, group in enumerate(groups):
        fits = group.peak_bytes <= capacity
        infeasible += int((~fits).sum())
        order += [
            (float(group.step_s[k]), float(group.peak_bytes[k]), number, int(k))
            for k in np.flatnonzero(fits)
        ]
    log(
        f"{enumerated} candidates priced, {infeasible} do not fit, {indivisible} left "
        "out because a dim does not divide"
    )
    if not order:
        raise InfeasibleError(explain_no_fit(everything, groups, cluster, strategy))
    order.sort()
    plans: list[Plan] = []
    seen: set[Any] = set()
    for step_s, _, number, k in order:
        group = groups[number]
        identity = _identity(group, k)
        if identity in seen:
            continue
        seen.add(identity)
        certificate = Certificate(
            lower_bound_s=order[0][0],
            gap=0.0,
            enumerated=enumerated,
            indivisible=indivisible,
            infeasible=infeasible,
            complete=True,
        )
        plan = finish(
            fn,
            args,
            cluster,
            _filled(group, k),
            certificate,
            model_ref,
            plain,
        )
        if plan.predicted.memory.total > plan.predicted.memory.capacity:
            continue  # priced exactly, with its microbatches traced, it does not fit
        plans.append(plan)
        log(f"plan {len(plans)}: {step_s:.4g} s per step")
        if len(plans) == top:
            break
    if not plans:
        raise InfeasibleError(explain_no_fit(everything, groups, cluster, strategy))
    return plans


def _identity(group: Candidates, k: int) -> Any:
    """What makes a candidate a different plan: axes of size one do nothing."""
    sizes: dict[str, int] = dict(zip(AXES, group.sizes[k].tolist(), strict=True))

    def active(axes: Any) -> tuple[str, ...]:
        return tuple(a for a in axes if sizes[a] > 1)

    storage = group.strategy.storage
    return (
        tuple(group.sizes[k].tolist()),
        int(group.cuts[k]),
        group.strategy.schedule.remat,
        tuple((r.logical, active(r.axes)) for r in group.strategy.rules),
        active(storage.params),
        active(storage.gradients),
        active(storage.optimizer),
    )


def _filled(group: Candidates, k: int) -> Strategy:
    sizes: dict[str, int] = dict(zip(AXES, group.sizes[k].tolist(), strict=True))
    schedule = group.strategy.schedule.model_copy(
        update={"microbatches": int(group.cuts[k])}
    )
    mesh = {axis: sizes[axis] for axis in group.strategy.mesh}
    return group.strategy.model_copy(update={"mesh": mesh, "schedule": schedule})
