"""From a program and a layout to a spec for every value and the moves between."""

from __future__ import annotations

from autoshard.propagate.assign import propagate
from autoshard.propagate.classes import find_classes

__all__ = ["find_classes", "propagate"]
