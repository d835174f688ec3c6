"""Runs by numbers on chips whose figures are round, priced with few constants."""

from __future__ import annotations

from typing import Any

from autoshard.cost.constants import Constants
from autoshard.cost.decoder import Decoder
from autoshard.cost.run import Layout, Run, Runs
from autoshard.cost.software import SOFTWARE, Software
from autoshard.cost.step import predict
from autoshard.plan.chip import Figure
from autoshard.plan.cluster import Cluster, cluster

LLAMA = Decoder(32, 4096, 32, 8, 128, 14336, 128256)
LARGE = 1e60


def free(**costs):
    """Constants at which only full-rate products take time; `a__b` names `a.b`."""
    values = {}
    for name in Constants.shipped().values:
        values[name] = 0.0
        if name.startswith("matmul"):
            values[name] = 1.0
        elif name.startswith("attention.") or name == "network.dcn":
            values[name] = LARGE
        elif name == "data.ops_per_layer":
            values[name] = 1.0
    values |= {"matmul.half_dim": 0.0, "attention.unfused": 0.0}
    values |= {"attention.half_head_dim": 0.0, "power.exponent": 0.0}
    known = set(values)
    values |= {name.replace("__", "."): cost for name, cost in costs.items()}
    assert set(values) == known
    return Constants(values)


def figure(value):
    return Figure(value=value, source="a round number")


def plain(name="h100:8", hbm=LARGE, near=None, far=None):
    """A cluster without latency, ramp or loss, and with memory at `hbm` bytes/s."""
    found = cluster(name)
    links = []
    for index, link in enumerate(found.chip.links):
        rate = (near, far)[index] or link.bytes_per_s.value
        changes = {
            "bytes_per_s": figure(float(rate)),
            "latency_s": figure(1e-30),
            "efficiency": figure(1.0),
            **dict.fromkeys(("half_bytes", "launch_s", "congestion")),
            "switch_efficiency": None,
        }
        links.append(link.model_copy(update=changes))
    chip = found.chip.model_copy(
        update={"links": tuple(links), "hbm_bytes_per_s": figure(float(hbm))}
    )
    return found.model_copy(update={"chip": chip})


def software(name="megatron-core", **changes):
    return SOFTWARE[name].model_copy(update=changes)


def run(
    layout: Layout | None = None,
    *,
    decoder: Decoder = LLAMA,
    on: str | Cluster = "h100:8",
    seq: int = 4096,
    by: str | Software = "xla",
    **more: Any,
):
    """A run; `on` and `by` are names or what they stand for."""
    where = cluster(on) if isinstance(on, str) else on
    what = SOFTWARE[by] if isinstance(by, str) else by
    return Run(decoder, where, layout or Layout(), seq, what, **more)


def runs(*args, **kwargs):
    return Runs.of([run(*args, **kwargs)])


def step(layout=None, constants=None, **kwargs):
    """Predicted seconds of one run, by what they are spent on."""
    return predict(runs(layout, **kwargs), constants)
