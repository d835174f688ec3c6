"""The space of a strategy: what its holes may be filled with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import Cluster
from autoshard.plan.schema import Axes, Rule, Storage, Strategy

_BATCH_AXES = ("data", "fsdp")
_TENSOR = ("tensor",)


def _rule_domain(logical: str, mesh: dict[str, object]) -> list[Axes]:
    """What a rule that is a hole may become, for the axes the strategy has."""
    if logical == "batch":
        return [tuple(a for a in _BATCH_AXES if a in mesh)]
    if "tensor" not in mesh:
        return [()]
    if logical in ("heads", "kv_heads", "mlp", "expert"):
        return [_TENSOR]
    if logical in ("vocab", "seq.residual"):
        return [_TENSOR, ()]
    raise InputError(
        f"[rules] {logical} = 'auto' is a hole that search cannot fill: it knows "
        "batch, heads, kv_heads, mlp, expert, vocab and seq.residual. Write the axes."
    )


def _storage_domain(storage: Storage, mesh: dict[str, object]) -> list[Storage]:
    """Storage with its holes filled; state is never sharded less than what it updates.

    Over `fsdp` everything is sharded (ZeRO-3); over `data` nothing, the optimizer
    (ZeRO-1), or the optimizer and the gradients (ZeRO-2).
    """
    full = tuple(a for a in ("fsdp",) if a in mesh)
    more = (*full, "data") if "data" in mesh else full

    def options(value: Axes | str, *choices: Axes) -> list[Axes]:
        return list(dict.fromkeys(choices)) if value == "auto" else [tuple(value)]

    found = []
    for params, gradients, optimizer in itertools.product(
        options(storage.params, full),
        options(storage.gradients, full, more),
        options(storage.optimizer, full, more),
    ):
        holes = (storage.gradients == "auto", storage.optimizer == "auto")
        if all(holes) and not set(gradients) <= set(optimizer):
            continue
        found.append(Storage(params=params, gradients=gradients, optimizer=optimizer))
    return found


def structures(strategy: Strategy) -> Iterator[Strategy]:
    """Strategies in which only mesh sizes and microbatches are still holes."""
    domains = [
        _rule_domain(rule.logical, dict(strategy.mesh))
        if rule.axes == "auto"
        else [rule.axes]
        for rule in strategy.rules
    ]
    remats = (
        ("none", "full")
        if strategy.schedule.remat == "auto"
        else (strategy.schedule.remat,)
    )
    for axes, storage, remat in itertools.product(
        itertools.product(*domains),
        _storage_domain(strategy.storage, dict(strategy.mesh)),
        remats,
    ):
        rules = tuple(
            Rule(logical=rule.logical, axes=chosen)
            for rule, chosen in zip(strategy.rules, axes, strict=True)
        )
        yield strategy.model_copy(
            update={
                "rules": rules,
                "storage": storage,
                "schedule": strategy.schedule.model_copy(update={"remat": remat}),
            }
        )


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def meshes(strategy: Strategy, cluster: Cluster) -> np.ndarray:
    """All meshes of a strategy on a cluster, int64[mesh, axis].

    A strategy that says over which axes parameters are stored is not fulfilled where
    these have one device: such meshes are left out if there are others.

    Raises:
        InfeasibleError: The fixed sizes do not multiply to the number of chips.
    """
    chips = cluster.num_chips
    rows: list[tuple[int, ...]] = []

    def fill(at: int, left: int, row: tuple[int, ...]) -> None:
        if at == len(AXES):
            if left == 1:
                rows.append(row)
            return
        size = strategy.mesh.get(AXES[at], 1)
        for option in _divisors(left) if size == "auto" else [size]:
            if left % option == 0:
                fill(at + 1, left // option, (*row, option))

    fill(0, chips, ())
    if not rows:
        fixed = {a: n for a, n in strategy.mesh.items() if n != "auto"}
        raise InfeasibleError(
            f"strategy {strategy.name!r} fixes mesh sizes {fixed}, which cannot be "
            f"completed to the {chips} chips of {cluster.name}; leave an axis 'auto' "
            "or choose sizes whose product is the number of chips."
        )
    found = np.array(rows, dtype=np.int64)
    if not strategy.storage.params or strategy.storage.params == "auto":
        return found
    stored = [AXES.index(a) for a in strategy.storage.params]
    spread = found[:, stored].prod(axis=1) > 1
    return found[spread] if spread.any() else found


def microbatches(strategy: Strategy, batch: int, cuttable: bool) -> list[int]:
    """Microbatch counts to try.

    Raises:
        InputError: The strategy fixes a count that the batch or the function does not
            allow.
    """
    fixed = strategy.schedule.microbatches
    if fixed == "auto":
        return _divisors(batch) if cuttable and batch else [1]
    if fixed > 1 and not cuttable:
        raise InputError(
            f"strategy {strategy.name!r} fixes {fixed} microbatches, but a plain "
            "function cannot be cut: build it with autoshard.train_step(loss_fn, "
            "optimizer, model=...)."
        )
    if batch and batch % fixed:
        raise InputError(
            f"the batch of {batch} cannot be cut into {fixed} microbatches (strategy "
            f"{strategy.name!r}); choose a batch divisible by {fixed}."
        )
    return [fixed]
