"""Bounds on what candidates take, and candidates that are left out as alike."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.equality import abstract_batch, make_step

from autoshard.cost import floors
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.search import bounds
from autoshard.search.bounds import Floors, Wanted
from autoshard.search.candidates import Space
from autoshard.search.pinning import with_pins
from autoshard.search.placing import Placing
from autoshard.search.space import pipelines

PINS = {
    "llama3-tiny": {"rules.vocab": "tensor", "rules.seq.residual": "none"},
    "gpt2-tiny": {"rules.kv_heads": "tensor", "rules.vocab": "none"},
}


@pytest.mark.parametrize("chips", ["h100:8", "v5e:2x4", "cpu:8"])
@pytest.mark.parametrize(
    ("model", "storage"),
    [
        ("llama3-tiny", {}),
        ("gpt2-tiny", {}),
        # The update then moves what other storage leaves where it is.
        ("gpt2-tiny", {"storage.gradients": "context+data"}),
        ("llama3-tiny", {"storage.optimizer": "fsdp+data"}),
    ],
)
def test_no_storage_is_below_the_bound_of_its_family(model, storage, chips):
    there = cluster(chips)
    step = make_step(model, scan=True)
    pins = {**PINS[model], "rules.heads": "tensor", "offload": "auto", **storage}
    strategy = with_pins(load_strategy("auto"), pins)
    space = Space(step, (abstract_batch(),), lambda _: None, strategy)
    groups = space.price(strategy, there)

    def family(group):
        return group.strategy.rules, group.strategy.schedule

    hows = pipelines(strategy)
    compared, raised, tried = 0, 0, set()
    for _, members in itertools.groupby(groups, key=family):
        first, *others = members
        for group in (first, *others):
            cuts = group.cuts.astype(np.float64)
            placing = Placing.of(strategy, there, group.sizes)
            free = placing.meshes(group.sizes), cuts
            found = Floors.of(first.pricer, *free, group.offloads)
            whole_s, _, rest_s = found.of_step
            stored_s = floors.stored_s(group.pricer, *free, rest_s)
            for whole in (whole_s, rest_s, stored_s):
                floor_s = floors.in_stages(first.pricer, *free, whole, hows)
                assert (floor_s <= group.step_s * (1 + 1e-12)).all(), group.strategy
            raised += int((stored_s > rest_s).sum())
            for k, offload in enumerate(group.offloads):
                # What fits its own memory is let through, and not above its own time.
                here = group.offload == k
                own = (x[here] * (1 + 1e-12) for x in (group.peak_bytes, group.step_s))
                bound_s = bounds.floor_s(
                    group.pricer,
                    placing,
                    group.sizes[here],
                    cuts[here],
                    Floors(found.of_step[:, here], found.alive[:, :, here]),
                    Wanted(hows, (offload,), *own),
                )
                assert (bound_s <= group.step_s[here] * (1 + 1e-12)).all(), offload
                tried.add(offload)
            compared += len(group.sizes)
    assert compared > 300
    assert raised > 100
    assert len(tried) == (8 if there.kind == "gpu" else 1)
