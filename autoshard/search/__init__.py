"""From a strategy with holes to a plan."""

from __future__ import annotations

from autoshard.search.pinning import parse_pins, with_pins
from autoshard.search.repair import constraints_at
from autoshard.search.search import search_plans
from autoshard.search.sizing import Sizing, Tried
from autoshard.search.sizing import size as size_of
from autoshard.search.solver import Solver

__all__ = [
    "Sizing",
    "Solver",
    "Tried",
    "constraints_at",
    "parse_pins",
    "search_plans",
    "size_of",
    "with_pins",
]
