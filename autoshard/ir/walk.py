"""Walking a jaxpr in one fixed order, with a stable address for every equation.

The program builder and the lowering both walk; that they agree on addresses is what
lets a plan written today point into a program traced tomorrow.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from autoshard.ir import _jaxcompat
from autoshard.ir.errors import InputError


class Addresser:
    """Hands out the address of each equation, in walking order.

    An address is the path of enclosing loops, the name stack, the primitive, and its
    ordinal among equations that share all of these. An edit elsewhere in the program,
    or a renamed Python variable, does not move it.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def next(self, path: str, eqn: Any) -> str:
        """The address of the next equation met under the loop path `path`."""
        scope = _jaxcompat.name_stack(eqn)
        stem = f"{path}{scope + '/' if scope else ''}{eqn.primitive.name}"
        ordinal = self._counts[stem]
        self._counts[stem] += 1
        return f"{stem}#{ordinal}"


def inlined(eqn: Any) -> Any | None:
    """The inner jaxpr of a call that is walked as if written in place, else None.

    Raises:
        InputError: An inner `jit` fixes shardings; honouring them is not possible
            when the whole step is planned.
    """
    param = _jaxcompat.CALL_JAXPR_PARAM.get(eqn.primitive.name)
    if param is None:
        return None
    if _jaxcompat.has_sharding_params(eqn):
        raise InputError(
            f"the inner jit {eqn.params.get('name', '')!r} at "
            f"{_jaxcompat.source_line(eqn)} fixes in_shardings or out_shardings; "
            "remove them and name the dims with autoshard.annotate instead."
        )
    return eqn.params[param]
