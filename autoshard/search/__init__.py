"""From a strategy with holes to a plan."""

from __future__ import annotations

from autoshard.search.search import search_plans

__all__ = ["search_plans"]
