"""Primitives that have no rule of their own, because they are read by their parts."""

from __future__ import annotations

from autoshard.ir import _jaxcompat
from autoshard.rules.foreign import CALLS

STRUCTURE = "structure"
"""The family of these primitives."""


def by_parts() -> dict[str, str]:
    """How each of these primitives is read, by name.

    >>> by_parts()["scan"]
    'its body, as often as the loop runs'
    """
    found = dict.fromkeys(_jaxcompat.CALLS, "its body, in place")
    found |= dict.fromkeys(CALLS, "the rule registered for what it calls")
    found["scan"] = "its body, as often as the loop runs"
    found["while"] = "its condition and body, as often as it is known to run"
    found["cond"] = "its branches, of which the costliest counts"
    found["shard_map"] = "its body, on one device's part"
    return dict(sorted(found.items()))
