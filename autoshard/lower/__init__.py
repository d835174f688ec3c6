"""From a plan to a jitted SPMD step."""

from __future__ import annotations

from autoshard.lower.step import (
    ParallelFunction,
    ParallelStep,
    batch_of,
    parallelize,
)

__all__ = ["ParallelFunction", "ParallelStep", "batch_of", "parallelize"]
