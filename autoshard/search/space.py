"""The space of a strategy: what its holes may be filled with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import get_args

import numpy as np

from autoshard.cost.pipeline import Pipeline
from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.ir.mesh import AXES, arranged
from autoshard.plan.cluster import Cluster
from autoshard.plan.strategy import (
    STATES,
    Auto,
    Axes,
    ContextKind,
    Rule,
    Storage,
    Strategy,
)

_BATCH_AXES = ("data", "fsdp", "expert")
_TENSOR = ("tensor",)
KNOWN_RULES = (
    "batch", "seq", "heads", "kv_heads", "mlp", "expert", "vocab", "seq.residual",
)  # fmt: skip
"""Rules that may be holes."""


def _rule_domain(logical: str, mesh: dict[str, object]) -> list[Axes]:
    """What a rule that is a hole may become, for the axes the strategy has."""
    tensor: list[Axes] = [_TENSOR, ()] if "tensor" in mesh else [()]
    if logical == "batch":
        return [tuple(a for a in _BATCH_AXES if a in mesh)]
    if logical == "seq":
        return [tuple(a for a in ("context",) if a in mesh)]
    if logical == "expert":
        own = tuple(a for a in ("expert",) if a in mesh)
        return [(*axes, *own) for axes in reversed(tensor)]
    if logical in KNOWN_RULES:
        return tensor
    raise InputError(
        f"[rules] {logical} = 'auto' is a hole that search cannot fill: it knows "
        f"{', '.join(KNOWN_RULES)}. Write the axes."
    )


def _storage_domain(
    storage: Storage, mesh: dict[str, object], keep: Storage | None
) -> list[Storage]:
    """Storage with its holes filled; state is never sharded less than what it updates.

    Over `fsdp` everything is sharded (ZeRO-3), and over `expert` and `context`, whose
    devices hold the same parameters (but for those of experts), or not; over `data`
    nothing, the optimizer (ZeRO-1), or the optimizer and the gradients (ZeRO-2), and
    over `expert` and `context` with it. ZeRO-1 and ZeRO-2
    also in groups of replicas, which are then what `fsdp` counts (Chen et al. 2024,
    arXiv:2401.09149).
    """
    plain = tuple(a for a in ("fsdp",) if a in mesh)
    whole = tuple(a for a in ("fsdp", "expert", "context") if a in mesh)
    more = tuple(a for a in ("fsdp", "expert", "context", "data") if a in mesh)

    def options(state: str, *choices: Axes) -> list[Axes]:
        value = getattr(storage, state)
        if value != "auto":
            return [tuple(value)]
        kept = getattr(keep, state) if keep else "auto"
        return list(dict.fromkeys((*choices, *([] if kept == "auto" else [kept]))))

    holes = [state for state in STATES if getattr(storage, state) == "auto"]
    found = []
    for params, gradients, optimizer in itertools.product(
        options("params", plain, whole),
        options("gradients", plain, whole, more),
        options("optimizer", plain, whole, more),
    ):
        chosen = Storage(params=params, gradients=gradients, optimizer=optimizer)
        # A state that is as it is to be kept counts as fixed.
        filled = [
            state
            for state in holes
            if keep is None or getattr(chosen, state) != getattr(keep, state)
        ]
        sharded = [set(getattr(chosen, state)) for state in filled]
        rising = all(a <= b for a, b in itertools.pairwise(sharded))
        # Between the parameters' axes and all of them there is nothing to gain.
        if len(filled) == len(STATES):
            rising &= all(s in (set(params), set(more)) for s in sharded)
        if rising:
            found.append(chosen)
    if plain and len(holes) == len(STATES):
        in_groups = [
            Storage(params=(), gradients=summed, optimizer=plain)
            for summed in ((), plain)
        ]
        found += [stored for stored in in_groups if stored not in found]
    return found


def _sensible(
    asked: tuple[Rule, ...],
    chosen: tuple[Rule, ...],
    mesh: dict[str, object],
    kept: dict[str, object],
) -> bool:
    """Whether the holes are filled with something that no other filling is better than.

    Keys and values are heads of attention too: to shard them while queries are whole
    only adds a gather. Attention and the MLP are tensor parallel together or not at
    all, then the axis is not used; one without the other has to be wished for. Of the
    MLP either the experts are, or the width of each: an axis shards one dim.
    """
    axes = {rule.logical: rule.axes for rule in chosen}
    # A rule that is as it is to be kept counts as fixed.
    holes = {
        rule.logical
        for rule in asked
        if rule.axes == "auto" and axes[rule.logical] != kept.get(rule.logical)
    }
    if {"heads", "kv_heads"} <= holes and axes["kv_heads"] and not axes["heads"]:
        return False
    by_expert = "tensor" in axes.get("expert", ())
    if by_expert and "tensor" in axes.get("mlp", ()) and holes & {"expert", "mlp"}:
        return False
    if {"heads", "mlp"} <= holes and _TENSOR in _rule_domain("mlp", mesh):
        unused = not any("tensor" in own for own in axes.values())
        return bool(axes["heads"] and (axes["mlp"] or by_expert)) or unused
    return True


CONTEXT_KINDS = get_args(ContextKind)
"""What attention may do with a sequence in parts, what can be run first."""


def context_kinds(
    strategy: Strategy, rules: Iterable[Rule]
) -> tuple[ContextKind | Auto, ...]:
    """Kinds of attention to try; more than one only where a sequence is in parts.

    Raises:
        InputError: What attention sends is not known in the order that is fixed.
    """
    kind = strategy.schedule.context_kind
    usual = strategy.order == "auto" or arranged(strategy.order) == AXES
    if kind == "auto":
        in_parts = any("context" in rule.axes for rule in rules)
        return CONTEXT_KINDS if in_parts and usual else CONTEXT_KINDS[:1]
    if kind != CONTEXT_KINDS[0] and not usual:
        raise InputError(
            f"context_kind = {kind!r}{strategy.where('context_kind')} is priced in the "
            f"usual order of axes only, and order = {list(strategy.order)}"
            f"{strategy.where('order')} is fixed; leave one of the two out."
        )
    return (kind,)


REMATS = ("full", "dots", "none")
"""What may be rematerialised of all blocks. What fits in most places comes first: the
others need only be priced where they may be faster."""


def without_experts(strategy: Strategy) -> Strategy:
    """A strategy in which nothing is left open for experts.

    Along an axis for them a program that has none would do what it does along `data`.
    """
    rules = tuple(r for r in strategy.rules if (r.logical, r.axes) != _OPEN_EXPERTS)
    mesh = dict(strategy.mesh)
    if mesh.get("expert") == "auto":
        fixed = [*(r.axes for r in rules), strategy.order]
        fixed += [getattr(strategy.storage, state) for state in STATES]
        if any("expert" in axes for axes in fixed if axes != "auto"):
            mesh["expert"] = 1
        else:
            del mesh["expert"]
    return strategy.model_copy(update={"rules": rules, "mesh": mesh})


_OPEN_EXPERTS = ("expert", "auto")


def structures(strategy: Strategy, keep: Strategy | None = None) -> Iterator[Strategy]:
    """Strategies in which only mesh sizes and microbatches are still holes.

    Args:
        strategy: With any holes.
        keep: A strategy whose fixed fields are among what the holes may become.
    """
    kept = {rule.logical: rule.axes for rule in keep.rules} if keep else {}
    domains: list[list[Axes]] = []
    for rule in strategy.rules:
        if rule.axes != "auto":
            domains.append([rule.axes])
            continue
        domain = _rule_domain(rule.logical, dict(strategy.mesh))
        also = kept.get(rule.logical, "auto")
        if isinstance(also, tuple) and also not in domain:
            domain.append(also)
        domains.append(domain)
    remat = strategy.schedule.remat
    remats = REMATS if strategy.schedule.remat_is_open else (remat,)
    stored = _storage_domain(
        strategy.storage, dict(strategy.mesh), keep.storage if keep else None
    )
    # Rules without tensor parallelism come first: of structures that are alike where an
    # axis has one device, the first stands for all.
    combined = sorted(
        itertools.product(*domains), key=lambda axes: any("tensor" in a for a in axes)
    )
    for axes in combined:
        rules = tuple(
            Rule(logical=rule.logical, axes=chosen)
            for rule, chosen in zip(strategy.rules, axes, strict=True)
        )
        if not _sensible(strategy.rules, rules, dict(strategy.mesh), dict(kept)):
            continue
        kinds = context_kinds(strategy, rules)
        # Those of the same rules and schedule come one after the other: they share
        # bounds.
        for remat, kind in itertools.product(remats, kinds):
            chosen = {"remat": remat, "context_kind": kind}
            schedule = strategy.schedule.model_copy(update=chosen)
            for storage in stored:
                update = {"rules": rules, "storage": storage, "schedule": schedule}
                yield strategy.model_copy(update=update)


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
        sizes = {a: n for a, n in strategy.mesh.items() if n != "auto"}
        fixed = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
        raise InfeasibleError(
            f"strategy {strategy.name!r} fixes mesh sizes {fixed}, which cannot be "
            f"completed to the {chips} chips of {cluster.name}; leave an axis 'auto' "
            "or choose sizes whose product is the number of chips."
        )
    found = np.array(rows, dtype=np.int64)
    if strategy.schedule.context_kind not in ("auto", CONTEXT_KINDS[0]):
        found = found[found[:, AXES.index("context")] > 1]
        if not len(found):
            # More chips may do where the size of the axis is open.
            few = strategy.mesh.get("context", 1) != 1
            raise (InfeasibleError if few else InputError)(
                f"context_kind = {strategy.schedule.context_kind!r}"
                f"{strategy.where('context_kind')} is for sequences over several "
                f"devices of `context`, and context = {strategy.mesh.get('context', 1)}"
                f"{strategy.where('context')} on the {chips} chips of {cluster.name}; "
                "leave context = 'auto' in [mesh], or drop context_kind."
            )
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


_PIPELINES = ("1f1b", "interleaved", "zb-h1", "zb-h2")
"""Those to choose from. GPipe is never faster than 1F1B, and holds more."""

_VIRTUAL = (2, 4)


def pipelines(strategy: Strategy) -> tuple[Pipeline, ...]:
    """How stages may take turns; none where the strategy has no pipeline.

    Without one, `stage` is an axis like any other.
    """
    schedule = strategy.schedule
    if strategy.mesh.get("stage", 1) == 1 or schedule.pipeline == "none":
        return ()
    names = _PIPELINES if schedule.pipeline == "auto" else (schedule.pipeline,)
    parts = (1, *_VIRTUAL) if schedule.virtual == "auto" else (schedule.virtual,)
    vocabs = ("ends", "spread") if schedule.vocab == "auto" else (schedule.vocab,)
    return tuple(
        Pipeline(name, virtual, vocab, schedule.blocks)
        for name, virtual, vocab in itertools.product(names, parts, vocabs)
        if (virtual > 1) == (name == "interleaved")
    )


def executable(strategy: Strategy) -> Strategy:
    """A strategy without what is priced but cannot be run yet.

    Raises:
        InputError: It fixes something of that.
    """
    strategy = _gathering(strategy)
    if strategy.schedule.offload not in ("auto", ()):
        raise InputError(
            f"offload = {list(strategy.schedule.offload)}{strategy.where('offload')} "
            "is fixed, and plans with anything in the host's memory cannot be run yet; "
            "set offload = [], or search without --executable (executable=True) to "
            "have such a plan priced."
        )
    stages = strategy.mesh.get("stage", 1)
    if stages not in (1, "auto") and strategy.schedule.pipeline != "none":
        raise InputError(
            f"stage = {stages}{strategy.where('stage')} is fixed, and plans with "
            "pipeline stages cannot be run yet; leave it 'auto', or search without "
            "--executable (executable=True) to have such a plan priced."
        )
    schedule = strategy.schedule.model_copy(update={"offload": ()})
    none_offloaded = strategy.model_copy(update={"schedule": schedule})
    return of_one_stage(none_offloaded).placed(strategy.places)


def of_one_stage(strategy: Strategy) -> Strategy:
    """A strategy without pipeline stages; as it is if it has none."""
    if strategy.mesh.get("stage", 1) == 1 or strategy.schedule.pipeline == "none":
        return strategy
    none = {"pipeline": "none", "virtual": 1, "vocab": "ends", "blocks": ()}
    return strategy.model_copy(
        update={
            "mesh": {**strategy.mesh, "stage": 1},
            "schedule": strategy.schedule.model_copy(update=none),
        }
    )


def _gathering(strategy: Strategy) -> Strategy:
    """A strategy in which keys and values are gathered, if it leaves that open."""
    kind, runs = strategy.schedule.context_kind, CONTEXT_KINDS[0]
    if kind == runs:
        return strategy
    if kind != "auto":
        raise InputError(
            f"context_kind = {kind!r}{strategy.where('context_kind')} is fixed, and "
            "such plans cannot be run yet; leave it 'auto', or search without "
            "--executable (executable=True) to have such a plan priced."
        )
    schedule = strategy.schedule.model_copy(update={"context_kind": runs})
    return strategy.model_copy(update={"schedule": schedule}).placed(strategy.places)
