"""From a program and a layout to a spec for every value and the collectives between."""

from __future__ import annotations

from autoshard.propagate.classes import DimClasses, find_classes
from autoshard.propagate.layout import Layout
from autoshard.propagate.sharded import Reshard, ShardedProgram, propagate

__all__ = [
    "DimClasses",
    "Layout",
    "Reshard",
    "ShardedProgram",
    "find_classes",
    "propagate",
]
