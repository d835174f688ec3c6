"""Walking a jaxpr in one fixed order, with a stable address for every equation.

The program builder and the lowering both walk; that they agree on addresses is what
lets a plan written today point into a program traced tomorrow.

The values that cross the border of a structure have addresses of their own, which
hang on the address of its equation:

==================  ==========================================================
`scan#0:in2`        operand 2 of a loop, as it comes in or is sliced
`scan#0:carry1`     carried value 1, on its way to the next run
`scan#0:out3`       result 3 of a loop
`cond#0:1:in2`      operand 2 as branch 1 takes it
`cond#0:1:out0`     result 0 as branch 1 makes it
`shard_map#0:in0`   operand 0 of a manual region
`jit#0:in0`         a sharding that an inner `jit` asks of operand 0
==================  ==========================================================

The body of a loop or of a manual region is under `scan#0/`, a loop's condition under
`while#0:cond/`, branch 1 under `cond#0:1/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoshard.ir import _jaxcompat


def used(jaxpr: Any, variables: Sequence[Any]) -> list[bool]:
    """Which of its arguments an open jaxpr reads or returns."""
    found = {v for v in jaxpr.outvars if not _jaxcompat.is_literal(v)}
    for eqn in jaxpr.eqns:
        found.update([v for v in eqn.invars if not _jaxcompat.is_literal(v)])
    return [v in found for v in variables]


class Addresser:
    """Hands out the address of each equation, in walking order.

    An address is the path of enclosing structures, the name stack, the primitive (a
    kernel's name with it), and its ordinal among equations that share all of these. An
    edit elsewhere in the program, or a renamed Python variable, does not move it.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str], int] = {}
        # Equations share the objects that hold their scope; spelling one is slow.
        self._scopes: dict[int, tuple[Any, str]] = {}

    def scope(self, eqn: Any) -> str:
        """The name stack of an equation."""
        stack = eqn.source_info.name_stack
        found = self._scopes.get(id(stack))
        if found is None:
            # The stack is kept with it: a freed one could give its id to another.
            found = self._scopes[id(stack)] = (stack, _jaxcompat.name_stack(eqn))
        return found[1]

    def next(self, path: str, eqn: Any, scope: str | None = None) -> str:
        """The address of the next equation met under the path `path`."""
        name = eqn.primitive.name
        if name in _jaxcompat.KERNEL_NAME_PARAM:
            name = f"{name}[{_jaxcompat.kernel_name(eqn)}]"
        if scope is None:
            scope = self.scope(eqn)
        key = (path, scope, name)
        ordinal = self._counts.get(key, 0)
        self._counts[key] = ordinal + 1
        if scope:
            return f"{path}{scope}/{name}#{ordinal}"
        return f"{path}{name}#{ordinal}"
