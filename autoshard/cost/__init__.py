"""What a sharded program costs on a cluster: time, memory, collectives."""

from __future__ import annotations

from autoshard.cost.estimate import estimate, model_flops
from autoshard.cost.price import Pricer, Prices

__all__ = ["Pricer", "Prices", "estimate", "model_flops"]
