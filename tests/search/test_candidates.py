"""Bounds on what candidates take, and candidates that are left out as alike."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.equality import abstract_batch, adamw, make_step

from autoshard import models, train_step
from autoshard.cost import Wish, floors
from autoshard.cost.collectives import Meshes
from autoshard.cost.context import ALL_GATHER, FREE
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.plan.strategy import Strategy
from autoshard.search import bounds, sieve, space
from autoshard.search.candidates import Space
from autoshard.search.divisible import divisible
from autoshard.search.pinning import with_pins
from autoshard.search.propagated import Propagated
from autoshard.search.space import CONTEXT_KINDS
from autoshard.search.watch import Watch

PINS = {
    "llama3-tiny": {"rules.vocab": "tensor", "rules.seq.residual": "none"},
    "gpt2-tiny": {"rules.kv_heads": "tensor", "rules.vocab": "none"},
}


# Where nothing else is said, there is one kind of attention.
OPEN = {"offload": "auto", "context_kind": ALL_GATHER}
CONTEXT = AXES.index("context")
OWN = ("bytes_", "step_s")
EVERY = 7
"""Of how many structures one is compared, for each set of what may be offloaded: others
take turns with storage and rules."""


STORED = [
    ("llama3-tiny", {}),
    ("gpt2-tiny", {}),
    # The update then moves what other storage leaves where it is.
    ("gpt2-tiny", {"storage.gradients": "context+data"}),
    ("llama3-tiny", {"storage.optimizer": "fsdp+data"}),
    ("llama3-tiny", {"context_kind": "auto"}),
]
CHIPS = ("h100:8", "v5e:2x4", "cpu:8")
AT_ONCE = [
    (*STORED[0], "cpu:8"), (*STORED[3], "v5e:2x4"), (*STORED[4], "v5e:2x4"),
]  # fmt: skip
AT_LENGTH = [
    case
    for case in ((*stored, chips) for stored in STORED for chips in CHIPS)
    if case not in AT_ONCE
]


@pytest.mark.parametrize(("model", "storage", "chips"), AT_ONCE)
def test_no_candidate_is_below_its_bounds(model, storage, chips, monkeypatch):
    check_bounds(model, storage, chips, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "storage", "chips"), AT_LENGTH)
def test_no_candidate_is_below_its_bounds_at_length(model, storage, chips, monkeypatch):
    check_bounds(model, storage, chips, monkeypatch)


def prices_of(pricer, there, sizes, cuts, wish, at, orders):
    """What candidates cost; where the bound is of all kinds of attention, with each."""
    kinds = CONTEXT_KINDS if pricer.context.kind == FREE else (pricer.context.kind,)
    for kind in kinds:
        own, rows, order = pricer.with_context(kind), at, orders
        if kind != ALL_GATHER:
            # Where the sequence is whole there is one kind.
            rows = at[own.context.divides(sizes[at]) & (sizes[at, CONTEXT] > 1)]
            order = None
        if len(rows):
            for prices in own.price_all(there, sizes[rows], cuts[rows], wish, order):
                yield kind, prices, rows


def check_bounds(model, storage, chips, monkeypatch):
    there = cluster(chips)
    step = make_step(model, scan=True)
    pins = {**PINS[model], "rules.heads": "tensor", **OPEN, **storage}
    strategy = with_pins(load_strategy("auto"), pins)
    space = Space(step, (abstract_batch(),), lambda _: None, strategy)
    kinds = len(CONTEXT_KINDS) if "context_kind" in storage else 1
    bound_of, compared, tried, calls = bounds.floor_s, [], set(), itertools.count()

    def checked(pricer, placing, sizes, cuts, found, wanted):
        hows = wanted.pipelines
        if next(calls) % (EVERY * len(wanted.offloads) * kinds):
            return bound_of(pricer, placing, sizes, cuts, found, wanted)
        free = placing.meshes(sizes), cuts
        family_s = floors.in_stages(
            pricer, *free, *found.of_step[[0, 0]], found.of_step[2:], hows
        )
        rng = np.random.default_rng(len(compared))
        for several in (False, True):
            at = np.flatnonzero((sizes[:, 0] > 1) == several)
            if not len(at):
                continue
            turns = hows if several else ()
            orders = None
            if placing.anywhere is not None:
                orders = rng.permuted(
                    np.tile(np.arange(len(AXES)), (len(at), 1)), axis=1
                )
            wish = Wish(turns, wanted.offloads)
            given = there, sizes, cuts, wish, at, orders
            for kind, prices, of in prices_of(pricer, *given):
                valid = prices.cut.valid if several else np.ones(len(of), dtype=bool)
                here = of[valid]
                own = (
                    x[valid] * (1 + 1e-12) for x in (prices.peak_bytes, prices.step_s)
                )
                # What fits its own memory is let through, and not above its own time.
                own = dataclasses.replace(
                    wanted,
                    offloads=(prices.offload,),
                    **dict(zip(OWN, own, strict=True)),
                )
                some = found.take(here)
                least_s = bound_of(pricer, placing, sizes[here], cuts[here], some, own)
                assert (least_s <= own.step_s).all(), (prices.offload, turns)
                assert (family_s[here] <= own.step_s).all(), (prices.offload, turns)
                compared.append(len(here))
                tried.add((kind, prices.offload))
        return bound_of(pricer, placing, sizes, cuts, found, wanted)

    monkeypatch.setattr(sieve, "floor_s", checked)
    # Nothing is left out, so that all are compared.
    monkeypatch.setattr(Watch, "lets", lambda _, floor_s: ~np.isnan(floor_s))
    groups = space.priced(strategy, there, watch=Watch(1, there.hbm_bytes))
    assert list(groups)
    assert sum(compared) > 300
    assert len(tried) == kinds * (8 if there.kind == "gpu" else 1)


def test_no_storage_makes_kernels_faster_than_their_bound():
    """Found with the storage that comes first, parameters being used in half of the
    precision in which they are held."""
    there = cluster("h100:8")
    config = dataclasses.replace(
        models.get("llama3-tiny"), dtype="bfloat16", param_dtype="float32"
    )
    step = train_step(
        models.next_token_loss, adamw(), model=lambda rngs: models.build(config, rngs)
    )
    pins = {**PINS["llama3-tiny"], "mesh.stage": 1, "remat": "dots", **OPEN}
    strategy = with_pins(load_strategy("auto"), pins)
    tried = Space(step, (abstract_batch(),), lambda _: None, strategy)
    grid, cuts = tried.candidates(strategy, there)
    propagated, rows = Propagated(), np.arange(len(grid))
    first: dict[object, Strategy] = {}
    compared, ratios = 0, []
    for structure in space.structures(strategy):
        sketch = tried.sketch(structure.schedule.remat)
        assert sketch is not None
        of_rules = first.setdefault((structure.rules, structure.schedule), structure)
        for active, part in propagated.parts(structure, sketch, grid, rows):
            pricer = propagated.pricer(structure, sketch, active)
            bound = propagated.pricer(of_rules, sketch, active)
            here = part[divisible(pricer, grid[part], cuts[part], tried.batch())]
            meshes, pieces = Meshes(there, grid[here]), cuts[here].astype(float)
            least_s = floors.rest_s(bound, meshes, pieces)[2:]
            kernels = pricer.timing.kernels(meshes, pieces)
            taken_s = kernels.matmul + kernels.other - kernels.update
            assert (least_s <= taken_s * (1 + 1e-12)).all()
            compared += len(here)
            ratios += (least_s.sum(axis=0) / taken_s.sum(axis=0)).tolist()
    assert compared > 1000
    assert max(ratios) > 0.9
