"""Holding a plan against what the compiler emitted for it."""

from __future__ import annotations

from autoshard.verify.comparison import CAUSES, FORMS, Comparison, Difference
from autoshard.verify.targets import KINDS, Target, target_of
from autoshard.verify.verdict import Verdict, verify_collectives
from autoshard.verify.verification import (
    Row,
    Unplanned,
    Verification,
    beyond,
    unplanned,
    verify_lowered,
)

__all__ = [
    "CAUSES",
    "FORMS",
    "KINDS",
    "Comparison",
    "Difference",
    "Row",
    "Target",
    "Unplanned",
    "Verdict",
    "Verification",
    "beyond",
    "target_of",
    "unplanned",
    "verify_collectives",
    "verify_lowered",
]
