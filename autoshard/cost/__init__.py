"""What a sharded program costs on a cluster: time, memory, collectives."""

from __future__ import annotations

from autoshard.cost.estimate import estimate, fastest_s, model_flops, tokens_per_step
from autoshard.cost.price import Pricer
from autoshard.cost.prices import Prices, Wish

__all__ = [
    "Pricer",
    "Prices",
    "Wish",
    "estimate",
    "fastest_s",
    "model_flops",
    "tokens_per_step",
]
