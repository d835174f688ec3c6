"""Factor rules by op family; importing this package registers them all."""

from __future__ import annotations

from autoshard.rules import (
    contraction,
    elementwise,
    indexing,
    reduction,
    shape,
)
from autoshard.rules.core import FactorRule, covered, register, rule_of

__all__ = [
    "FactorRule",
    "contraction",
    "covered",
    "elementwise",
    "indexing",
    "reduction",
    "register",
    "rule_of",
    "shape",
]
