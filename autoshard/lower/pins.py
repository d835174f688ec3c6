"""Placing a plan's constraints on the values of a program while it is traced."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from autoshard.plan.schema import Plan

_LINK = re.compile(r":(in|out|carry)\d+$")
"""Addresses of links, which tie the inside of a structure to its outside."""


class Pins:
    """What `ir.interpret.evaluate` calls with every operand and result of one trace.

    Results before they are resharded (`sum0`) are pinned here for links only, for ops
    by `lower.special`.

    Args:
        plan: Its constraints are placed.
        mesh: The plan's mesh over devices.
    """

    def __init__(self, plan: Plan, mesh: Mesh) -> None:
        self._shardings = {
            (c.address, c.slot): NamedSharding(mesh, c.spec.to_partition_spec())
            for c in plan.constraints
        }
        # With the value, so that no other gets its identity meanwhile.
        self._had: dict[tuple[int, NamedSharding], tuple[Any, Any]] = {}

    def __call__(self, address: str, slot: str, value: Any) -> Any:
        """Pins a value as the plan says, if it says anything."""
        had = self._shardings.get((address, slot.replace("in", "had")))
        if had is not None and slot.startswith("in"):
            # Once for all ops that take it, or each would move a copy of its own.
            known = self._had.get((id(value), had))
            if known is None:
                name = pin_name(address, slot.replace("in", "had"))
                known = (value, pinned(value, had, name))
                self._had[id(value), had] = known
            value = known[1]
        slots = [slot]
        if slot.startswith("out") and _LINK.search(address):
            slots.insert(0, slot.replace("out", "sum"))
        for at in slots:
            sharding = self._shardings.get((address, at))
            if sharding is not None:
                value = pinned(value, sharding, pin_name(address, at))
        return value


def pinned(value: Any, sharding: NamedSharding, name: str) -> Any:
    """A constraint under a scope, so that the compiler's output says whose it is."""
    with jax.named_scope(name):
        return jax.lax.with_sharding_constraint(value, sharding)


def pin_name(address: str, slot: str) -> str:
    """Scope of a pin."""
    return f"pinned[{address}]{slot}"
