"""Planned collectives against those that XLA's partitioner emits."""

from __future__ import annotations

import glob
import re
from collections import Counter, defaultdict
from math import prod

import pytest
from helpers.equality import abstract_batch, make_step, pinned

from autoshard.lower import parallelize
from autoshard.plan.cluster import cluster
from autoshard.plan.strategy import Rule
from autoshard.search import search_plans

_OP = re.compile(
    r"= (?P<dtype>\w+)\[(?P<shape>[\d,]*)\]\S* "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
)
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}


def emitted(parallel, folder):
    """Bytes by kind in the program right after partitioning."""
    parallel.jitted.lower(parallel.abstract_state, parallel.abstract_batch).compile(
        compiler_options={
            "xla_dump_to": str(folder),
            "xla_dump_hlo_pass_re": ".*partition.*",
            "xla_dump_hlo_as_text": True,
        }
    )
    [name] = glob.glob(f"{folder}/*autoshard_step*after_spmd-partitioning*.txt")
    found = Counter()
    with open(name, encoding="utf-8") as file:
        for match in _OP.finditer(file.read()):
            size = prod(int(n) for n in match["shape"].split(",") if n)
            found[match["kind"]] += size * _BYTES[match["dtype"]]
    return found


def planned(plan):
    """Bytes by kind, counted as the partitioner writes them.

    It writes a reduce-scatter as an all-reduce of the whole and a slice; GPU and TPU
    backends turn the pair into one. Where the partial sums of a lookup (or of its
    transpose) go to several axes, it sums over all of them at once, as the plan's
    `sum0` pin asks.
    """
    found = Counter()
    lookups = defaultdict(int)
    for c in plan.predicted.collectives:
        if c.kind not in ("all_reduce", "reduce_scatter"):
            found[c.kind.replace("_", "-")] += c.bytes_
        elif re.search(r"gather#|scatter-add#", c.address):
            lookups[c.address] = max(lookups[c.address], c.bytes_)
        else:
            found["all-reduce"] += c.bytes_
    found["all-reduce"] += sum(lookups.values())
    return found


@pytest.mark.parametrize(
    ("name", "mesh", "scan", "order"),
    [
        ("dp", {}, True, ()),
        ("dp", {}, False, ()),
        ("zero1", {}, False, ()),
        ("fsdp", {"data": 2, "fsdp": 4}, True, ()),
        ("fsdp", {"data": 2, "fsdp": 4}, False, ()),
        ("megatron-tp", {"data": 2, "tensor": 4}, False, ()),
        ("megatron-sp", {"data": 2, "tensor": 4}, True, ()),
        ("megatron-sp", {"data": 2, "tensor": 4}, False, ()),
        ("fsdp-tp", {"data": 2, "fsdp": 2, "tensor": 2}, True, ()),
        ("fsdp-tp", {"data": 2, "fsdp": 2, "tensor": 2}, False, ()),
        ("fsdp", {"data": 2, "fsdp": 4}, True, ("fsdp", "data")),
        ("megatron-sp", {"data": 2, "tensor": 4}, True, ("tensor", "data")),
        (
            "fsdp-tp",
            {"data": 2, "fsdp": 2, "tensor": 2},
            True,
            ("tensor", "fsdp", "data"),
        ),
        ("fsdp-tp-cp", {"data": 1, "fsdp": 1, "context": 4, "tensor": 2}, True, ()),
    ],
)
def test_planned_collectives_are_the_emitted_ones(
    name, mesh, scan, order, tmp_path, capfd
):
    strategy = pinned(name, microbatches=1, remat="none", **mesh)
    strategy = strategy.model_copy(update={"order": order})
    check_emitted("llama3-tiny", scan, strategy, tmp_path, capfd)


BY_WIDTH = {"batch": ("data", "expert"), "expert": ("expert",)}
BY_EXPERT = {"batch": ("data", "expert"), "expert": ("tensor", "expert"), "mlp": ()}


@pytest.mark.parametrize(
    ("name", "mesh", "scan", "rules", "sent"),
    [
        ("ep", {"data": 2, "fsdp": 1, "expert": 4}, True, {}, 1),
        pytest.param(
            *("ep", {"data": 2, "fsdp": 2, "expert": 2}, False, {}, 4),
            marks=pytest.mark.one_jax,
        ),
        pytest.param(
            *("megatron-tp", {"data": 1, "expert": 4, "tensor": 2}, True, BY_WIDTH, 2),
            marks=pytest.mark.one_jax,
        ),
        ("megatron-tp", {"data": 1, "expert": 4, "tensor": 2}, True, BY_EXPERT, 1),
    ],
)
def test_tokens_are_exchanged_between_experts(
    name, mesh, scan, rules, sent, tmp_path, capfd
):
    """Four exchanges a block: there and back, and their gradients.

    Groups of 16 of the 16 x 32 tokens have 5 slots of each of 8 experts, so all tokens
    that are sent are 32 x 5 x 8 rows of 128 float32. `sent` is how often each device
    sends its part: for all 4 blocks where they are no scan, whose body is written once;
    and where `tensor` cuts the width of experts, each of its devices sends what both
    have.
    """
    strategy = pinned(name, microbatches=1, remat="none", **mesh)
    kept = {r.logical: r.axes for r in strategy.rules if r.logical != "vocab"}
    axes = {"batch": (), "expert": (), **kept, **rules}
    new = tuple(Rule(logical=k, axes=v) for k, v in axes.items())
    strategy = strategy.model_copy(update={"rules": new})
    got = check_emitted("mixtral-tiny", scan, strategy, tmp_path, capfd)
    rows = 32 * 5 * 8 // 8  # per device
    assert got["all-to-all"] == 4 * rows * 128 * 4 * sent


def check_emitted(model, scan, strategy, tmp_path, capfd):
    step = make_step(model, scan=scan)
    [plan] = search_plans(step, (abstract_batch(),), cluster("cpu:8"), strategy)
    got, want = emitted(parallelize(step, plan), tmp_path), planned(plan)
    for kind in set(got) | set(want):
        assert got[kind] == pytest.approx(want[kind], rel=0.01), (kind, got, want)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    return got
