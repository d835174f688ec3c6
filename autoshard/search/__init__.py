"""From a strategy with holes to a plan."""

from __future__ import annotations

from autoshard.search.repair import constraints_at
from autoshard.search.search import search_plans

__all__ = ["constraints_at", "search_plans"]
