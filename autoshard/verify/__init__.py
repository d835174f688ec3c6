"""Holding a plan against what the compiler emitted for it."""

from __future__ import annotations

from autoshard.verify.comparison import CAUSES, FORMS, Comparison, Difference
from autoshard.verify.verdict import Verdict, verify_collectives

__all__ = [
    "CAUSES",
    "FORMS",
    "Comparison",
    "Difference",
    "Verdict",
    "verify_collectives",
]
