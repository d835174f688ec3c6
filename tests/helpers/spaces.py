"""Spaces of strategies written out by plain loops, and programs to search them for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autoshard.cost import Pricer
from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.cost.work import analyse
from autoshard.ir.errors import InputError
from autoshard.ir.mesh import AXES
from autoshard.ir.train_step import TrainStep, train_step
from autoshard.plan.cluster import Cluster
from autoshard.plan.sharded import Layout
from autoshard.plan.strategy import Rule, Schedule, Storage, Strategy
from autoshard.propagate import propagate
from autoshard.search.divisible import divisible
from autoshard.search.reading import Sketch

STATES = ("params", "gradients", "optimizer")


def mlp_step(width=32, hidden=64, layers=3):
    """A step of residual MLPs: their hidden dim is `mlp`, their leading dim `batch`."""

    def loss(params, x):
        for up, down in zip(params["up"], params["down"], strict=True):
            x = x + jnp.tanh(x @ up) @ down
        return (x**2).mean()

    def model(key):
        keys = jax.random.split(key, 2)
        shapes = {"up": (layers, width, hidden), "down": (layers, hidden, width)}
        return {
            name: list(0.1 * jax.random.normal(k, shape))
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    return train_step(loss, optax.adamw(1e-3), model=model)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    """An abstract array."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def small_memory(chips: Cluster, bytes_: float) -> Cluster:
    """The same cluster whose chips have less memory."""
    hbm = chips.chip.hbm_bytes.model_copy(update={"value": float(bytes_)})
    return chips.model_copy(
        update={"chip": chips.chip.model_copy(update={"hbm_bytes": hbm})}
    )


def of_mesh(*axes: str, **fields: Any) -> Strategy:
    """A strategy with holes for some axes and, unless they are given, all else fixed.

    Rules are a dict of logical axis to mesh axes.
    """
    sizes = fields.pop("sizes", {})
    order = fields.pop("order", ())
    rules = fields.pop("rules", {"batch": "auto"})
    return Strategy(
        name="small",
        about="",
        mesh={a: sizes.get(a, "auto") for a in axes},
        order=order,
        rules=tuple(Rule(logical=k, axes=v) for k, v in rules.items()),
        storage=Storage(**fields.pop("storage", {})),
        schedule=Schedule(**fields),
    )


def _stored(strategy: Strategy) -> Iterator[tuple[tuple[str, ...], ...]]:
    """What parameters, gradients and optimizer state may be stored over.

    Of a state that is a hole: the axes before it, or more. With all three holes only
    two sets of axes are used: those of the parameters, and all; and `fsdp` alone for
    the optimizer, or it and the gradients, of parameters that are whole.
    """

    def of(*names: str) -> tuple[str, ...]:
        return tuple(n for n in names if n in strategy.mesh)

    shared = "fsdp", "expert", "context"
    sharded = of("fsdp"), of(*shared), of(*shared, "data")
    given = {s: getattr(strategy.storage, s) for s in STATES}
    holes = [s for s in STATES if given[s] == "auto"]
    choices = [
        sorted(set(sharded[:2] if s == "params" else sharded), key=len)
        if s in holes
        else [given[s]]
        for s in STATES
    ]
    for chosen in itertools.product(*choices):
        by = dict(zip(STATES, map(set, chosen), strict=True))
        rising = all(by[a] <= by[b] for a, b in itertools.pairwise(holes))
        between = len(holes) == 3 and not all(
            by[s] in (by["params"], set(sharded[2])) for s in STATES
        )
        if rising and not between:
            yield chosen
    if len(holes) == 3 and "fsdp" in strategy.mesh:
        yield (), (), ("fsdp",)
        yield (), ("fsdp",), ("fsdp",)


def _ruled(strategy: Strategy) -> Iterator[dict[str, tuple[str, ...]]]:
    """What rules may say, without those that leave devices to do the same work."""
    mesh = strategy.mesh
    options: dict[str, list[Any]] = {}
    for rule in strategy.rules:
        over = [("tensor",), ()] if "tensor" in mesh else [()]
        if rule.axes != "auto":
            over = [rule.axes]
        elif rule.logical == "batch":
            over = [tuple(a for a in ("data", "fsdp", "expert") if a in mesh)]
        elif rule.logical == "seq":
            over = [tuple(a for a in ("context",) if a in mesh)]
        elif rule.logical == "expert" and "expert" in mesh:
            over = [("expert",), *[("tensor", "expert")] * ("tensor" in mesh)]
        options[rule.logical] = over
    holes = {rule.logical for rule in strategy.rules if rule.axes == "auto"}
    # An axis of one device is best not used at all: such rules stand for their likes.
    spread = sorted(
        itertools.product(*options.values()),
        key=lambda rules: any("tensor" in over for over in rules),
    )
    for chosen in spread:
        axes = dict(zip(options, chosen, strict=True))
        used = any("tensor" in over for over in chosen)
        lone = {"heads", "kv_heads"} <= holes and axes["kv_heads"] > axes["heads"]
        together = {"heads", "mlp"} <= holes and "tensor" in mesh
        parted = "tensor" in axes.get("expert", ())
        both = axes.get("heads") and (axes.get("mlp") or parted)
        twice = parted and axes.get("mlp") and {"expert", "mlp"} & holes
        if not lone and not twice and not (together and used and not both):
            yield axes


def _ordered(strategy: Strategy, size: dict[str, int]) -> Iterator[tuple[str, ...]]:
    """Every order of the axes of several devices, where it is a hole."""
    if strategy.order != "auto":
        yield strategy.order
        return
    yield from itertools.permutations(a for a in AXES if size[a] > 1)


def rows_of(order: tuple[str, ...]) -> np.ndarray:
    """The order of one candidate, int64[1, place], written out place by place."""
    places = [k for k, axis in enumerate(AXES) if axis in order]
    row = np.arange(len(AXES))
    for place, axis in zip(places, order, strict=True):
        row[place] = AXES.index(axis)
    return row[None]


def _kinds(strategy: Strategy) -> tuple[Any, ...]:
    """What attention may do with a sequence that is in parts."""
    kind = strategy.schedule.context_kind
    return ("all_gather", "ring", "ulysses", "usp") if kind == "auto" else (kind,)


def written_out(
    strategy: Strategy, chips: Cluster, batch: int, remats: tuple[str, ...]
) -> Iterator[Strategy]:
    """Every filling of a strategy's holes, those of indivisible dims included.

    Args:
        strategy: With holes.
        chips: Where.
        batch: Its leading dim.
        remats: What `remat` may be where it is a hole.
    """
    n, mesh = chips.num_chips, strategy.mesh
    sizes = [
        range(1, n + 1) if mesh.get(a, 1) == "auto" else [mesh.get(a, 1)] for a in AXES
    ]
    meshes = [row for row in itertools.product(*sizes) if np.prod(row) == n]
    if isinstance(over := strategy.storage.params, tuple) and over:
        # A fixed storage is meant: where it can be, it is over more than one device.
        real = [row for row in meshes if any(row[AXES.index(a)] > 1 for a in over)]
        meshes = real or meshes
    cuts = strategy.schedule.microbatches
    pieces = [c for c in range(1, batch + 1) if batch % c == 0 and cuts in ("auto", c)]
    if not strategy.schedule.remat_is_open:
        remats = (strategy.schedule.remat,)
    kept = [strategy.schedule.offload]
    if kept == ["auto"]:
        kinds = ("optimizer", "params", "activations") if chips.kind == "gpu" else ()
        kept = [
            tuple(k for k, here in zip(kinds, chosen, strict=True) if here)
            for chosen in itertools.product((False, True), repeat=len(kinds))
        ]
    for row, cut, remat, axes, stored, kind, offload in itertools.product(
        meshes,
        pieces,
        remats,
        list(_ruled(strategy)),
        list(_stored(strategy)),
        _kinds(strategy),
        kept,
    ):
        size = dict(zip(AXES, row, strict=True))
        if kind != "all_gather" and size["context"] == 1:
            continue  # there is nothing to go round
        for order in _ordered(strategy, size):
            # Keys and values are kept in parts in the first order alone.
            if kind != "all_gather" and order not in (
                (),
                tuple(sorted(order, key=AXES.index)),
            ):
                continue
            yield strategy.model_copy(
                update={
                    "mesh": {axis: size[axis] for axis in mesh},
                    "order": order,
                    "rules": tuple(Rule(logical=k, axes=v) for k, v in axes.items()),
                    "storage": Storage(**dict(zip(STATES, stored, strict=True))),
                    "schedule": Schedule(
                        microbatches=cut,
                        remat=remat,
                        context_kind=kind,
                        offload=offload,
                    ),
                }
            )


@dataclasses.dataclass(frozen=True)
class Priced:
    """A candidate and its price."""

    strategy: Strategy
    step_s: float
    peak_bytes: float


def active(strategy: Strategy) -> tuple[Any, ...]:
    """A strategy without the axes of one device: equal ones run the same program."""
    mesh = strategy.mesh

    def of(axes: Any) -> tuple[str, ...]:
        return tuple(a for a in axes if mesh[a] != 1)

    return (
        tuple((a, n) for a, n in mesh.items() if n > 1),
        tuple((r.logical, of(r.axes)) for r in strategy.rules),
        tuple(of(getattr(strategy.storage, s)) for s in STATES),
        strategy.schedule.microbatches,
        strategy.schedule.remat,
        strategy.schedule.context_kind,
        strategy.schedule.offload,
    )


def without_idle(strategy: Strategy) -> Strategy:
    """A strategy in which no rule and no storage names an axis of one device."""

    def of(axes: Any) -> tuple[str, ...]:
        return tuple(a for a in axes if strategy.mesh.get(a, 1) != 1)

    return strategy.model_copy(
        update={
            "rules": tuple(
                Rule(logical=r.logical, axes=of(r.axes)) for r in strategy.rules
            ),
            "storage": Storage(**{s: of(getattr(strategy.storage, s)) for s in STATES}),
        }
    )


def different(priced: list[Priced]) -> list[Priced]:
    """The first of all candidates that run the same program."""
    return list({active(p.strategy): p for p in reversed(priced)}.values())


class OneByOne:
    """Prices the candidates of a program one at a time.

    Args:
        step: The program.
        batch: Its abstract batch.
        strategy: With holes.
        remats: What `remat` may be where it is a hole.
    """

    def __init__(
        self,
        step: TrainStep,
        batch: Any,
        strategy: Strategy,
        remats: tuple[str, ...] = ("none", "dots", "full"),
    ) -> None:
        self.batch = jax.tree.leaves(batch)[0].shape[0]
        self.sketches = {}
        for remat in remats:
            fn = step.with_schedule(microbatches=1, remat=remat)
            try:
                self.sketches[remat] = Sketch.of(fn, (batch,), strategy)
            except InputError:
                assert remat != "none"  # no block repeats
        self.strategy = strategy
        self._pricers: dict[Any, Pricer] = {}

    def pricer(self, strategy: Strategy, *, sizes: bool = False) -> Pricer:
        """Of a strategy without holes: of what its axes of several devices do.

        Args:
            strategy: The strategy.
            sizes: Whether it is to know the sizes, as the plan that is written does;
                else all that could be stored along an axis is.
        """
        known = {a: int(n) for a, n in strategy.mesh.items()} if sizes else None
        layout = Layout.of(without_idle(strategy), known)
        remat, kind = strategy.schedule.remat, strategy.schedule.context_kind
        key = str((layout, remat, kind))
        if key not in self._pricers:
            sketch = self.sketches[remat]
            sharded = propagate(sketch.traced, sketch.classes, layout)
            work = analyse(sketch.traced, sketch.classes)
            self._pricers[key] = Pricer(sharded, work).with_context(kind)
        return self._pricers[key]

    def price(self, chips: Cluster) -> list[Priced]:
        """All candidates of which every dim divides, also those that are alike."""
        found = []
        for one in written_out(self.strategy, chips, self.batch, tuple(self.sketches)):
            pricer = self.pricer(one)
            if one.schedule.context_kind != "all_gather" and not pricer.context.passes:
                continue  # no attention
            row = np.array([[one.mesh.get(a, 1) for a in AXES]], dtype=np.int64)
            cuts = np.array([one.schedule.microbatches], dtype=np.int64)
            if not self.has_all(one):
                continue
            if divisible(pricer, row, cuts, self.batch)[0]:
                by, offload = self.pricer(one, sizes=True), one.schedule.offload
                assert one.order != "auto"
                assert offload != "auto"
                price = by.price(
                    chips,
                    row,
                    cuts.astype(np.float64),
                    orders=rows_of(one.order),
                    offload=offload,
                )
                found.append(
                    Priced(one, float(price.step_s[0]), peak_bytes(price, chips))
                )
        return found

    def has_all(self, strategy: Strategy) -> bool:
        """Whether the program has what a strategy without holes offloads."""
        traced = self.sketches[strategy.schedule.remat].traced
        there = {info.state for info in traced.inputs}
        if self.pricer(strategy).work.segments.stashed:
            there.add("activations")
        return there.issuperset(strategy.schedule.offload)


def peak_bytes(price: Any, chips: Cluster) -> float:
    """Bytes of the one candidate of a price; none are enough if the host is full."""
    if not price.offload:
        return float(price.peak_bytes[0])
    fits = price.host_bytes[0] <= 0.9 * chips.host_memory_bytes
    return float(price.peak_bytes[0]) if fits else float("inf")


def fitting(priced: list[Priced], chips: Cluster) -> list[Priced]:
    """Those within the memory of a chip."""
    capacity = chips.hbm_bytes * MEMORY_HEADROOM
    return [p for p in priced if p.peak_bytes <= capacity]
