"""From a program and a layout to a spec for every value and the moves between."""

from __future__ import annotations

from autoshard.propagate.assign import propagate
from autoshard.propagate.classes import find_classes
from autoshard.propagate.decide import UnderRules

__all__ = ["UnderRules", "find_classes", "propagate"]
