"""Predictions held against published training runs."""

from __future__ import annotations

from autoshard.validation.fit import fit, left_out
from autoshard.validation.held import Part, Prediction, Validation, validate
from autoshard.validation.metrics import Errors, Fits, Group
from autoshard.validation.rows import LeftOut, Row, read

__all__ = [
    "Errors",
    "Fits",
    "Group",
    "LeftOut",
    "Part",
    "Prediction",
    "Row",
    "Validation",
    "fit",
    "left_out",
    "read",
    "validate",
]
