"""Planting a mistake in a rule."""

from __future__ import annotations

import contextlib
import dataclasses

from autoshard.rules import registry


@contextlib.contextmanager
def planted(primitive, change):
    """Every rule of the primitive is what `change(rule)` makes of the right one."""
    right, built = registry._RULES[primitive], registry._built
    wrong = dataclasses.replace(right, fn=lambda ctx: change(right.fn(ctx)))
    registry._RULES[primitive] = wrong
    registry._built = built.__wrapped__  # without its memory
    try:
        yield
    finally:
        registry._RULES[primitive], registry._built = right, built


def instead(rule, wrong):
    """A change of this one rule of a primitive."""
    return lambda given: wrong if given == rule else given
