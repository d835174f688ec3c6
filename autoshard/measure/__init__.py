"""Measures the devices at hand and describes them as a chip type."""

from __future__ import annotations

from autoshard.measure.calibrate import calibrate
from autoshard.measure.effort import FULL, QUICK, Effort

__all__ = ["FULL", "QUICK", "Effort", "calibrate"]
