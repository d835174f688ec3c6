"""Bounds on what candidates take, and candidates that are left out as alike."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.equality import abstract_batch, make_step

from autoshard.cost import Wish, floors
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.search import bounds, candidates
from autoshard.search.bounds import Floors
from autoshard.search.candidates import Space
from autoshard.search.pinning import with_pins
from autoshard.search.watch import Watch

PINS = {
    "llama3-tiny": {"rules.vocab": "tensor", "rules.seq.residual": "none"},
    "gpt2-tiny": {"rules.kv_heads": "tensor", "rules.vocab": "none"},
}


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
]
CHIPS = ("h100:8", "v5e:2x4", "cpu:8")
AT_ONCE = [(*STORED[0], "cpu:8"), (*STORED[3], "v5e:2x4")]
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


def check_bounds(model, storage, chips, monkeypatch):
    there = cluster(chips)
    step = make_step(model, scan=True)
    pins = {**PINS[model], "rules.heads": "tensor", "offload": "auto", **storage}
    strategy = with_pins(load_strategy("auto"), pins)
    space = Space(step, (abstract_batch(),), lambda _: None, strategy)
    bound_of, compared, tried, calls = bounds.floor_s, [], set(), itertools.count()

    def checked(pricer, placing, sizes, cuts, found, wanted):
        hows = wanted.pipelines
        if next(calls) % (EVERY * len(wanted.offloads)):
            return bound_of(pricer, placing, sizes, cuts, found, wanted)
        free = placing.meshes(sizes), cuts
        family_s = floors.in_stages(pricer, *free, found.of_step[0], hows)
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
            given = there, sizes[at], cuts[at], wish, orders
            for prices in pricer.price_all(*given):
                valid = prices.cut.valid if several else np.ones(len(at), dtype=bool)
                here = at[valid]
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
                tried.add(prices.offload)
        return bound_of(pricer, placing, sizes, cuts, found, wanted)

    monkeypatch.setattr(candidates, "floor_s", checked)
    # Nothing is left out, so that all are compared.
    monkeypatch.setattr(Watch, "lets", lambda _, floor_s: ~np.isnan(floor_s))
    groups = space.priced(strategy, there, watch=Watch(1, there.hbm_bytes))
    assert list(groups)
    assert sum(compared) > 300
    assert len(tried) == (8 if there.kind == "gpu" else 1)
