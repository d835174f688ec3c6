"""Predictions held against published training runs."""

from __future__ import annotations

from autoshard.validate.fit import fit, left_out
from autoshard.validate.held import Part, Prediction, Validation, validate
from autoshard.validate.metrics import Errors, Fits, Group
from autoshard.validate.rows import LeftOut, Row, read

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
