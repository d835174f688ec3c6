"""Measures the devices at hand and describes them as a chip type."""

from __future__ import annotations

from autoshard.measure.describe import calibrate
from autoshard.measure.effort import FULL, QUICK, Effort

__all__ = ["FULL", "QUICK", "Effort", "calibrate"]
