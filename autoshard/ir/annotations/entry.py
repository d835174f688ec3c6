"""What one box, or the metadata of one variable, says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autoshard.ir.annotations.names import Dims, Names


@dataclass
class Entry:
    """What an annotation of one leaf says, and what to tell the user of it."""

    kind: str
    logical: Names | None = None
    dims: Dims | None = None
    lost: list[tuple[str, str]] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    @property
    def says(self) -> bool:
        """Whether it annotates anything."""
        return self.logical is not None or self.dims is not None


def mapped(kind: str, rules: tuple[tuple[str, Any], ...]) -> str:
    """What the report says of names that flax's rules map to mesh axes."""
    listed = ", ".join(f"{name} -> {axes}" for name, axes in rules)
    return (
        f"{kind}: the flax logical axis rules in force ({listed}) fix mesh axes, so "
        "the strategy's rules do not apply to what they annotate; leave the flax rules "
        "out to let the search choose."
    )
