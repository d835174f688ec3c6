"""Types of what `solver` takes, for the functions that pass it on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Required, TypedDict, TypeVar

from autoshard.ir.annotations.paths import SpecMap
from autoshard.plan.cluster import Cluster
from autoshard.plan.schema import ModelRef
from autoshard.plan.strategy import Strategy

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Wishes(TypedDict, total=False):
    """How a program is read, and what is fixed: as in `solver`."""

    strategy: str | Strategy
    pins: Mapping[str, Any] | None
    specs: SpecMap | None
    aliases: Mapping[str, str] | None
    replicate: Iterable[str]
    model_ref: ModelRef | None
    executable: bool


class Asked(Wishes, total=False):
    """All keywords of `solver`."""

    cluster: Required[str | Cluster]
    time_limit_s: float | None
    log: Callable[[str], None] | None


def passing_on(
    kind: type[Any], source: Callable[..., Any]
) -> Callable[[_Function], _Function]:
    """Shows the keywords that a function passes on as its own, defaults included.

    `help`, and whatever completes what is typed, reads signatures, in which `**asked`
    would say nothing.

    Args:
        kind: The `TypedDict` of the keywords.
        source: To which they are passed on.
    """
    known = inspect.signature(source).parameters
    passed = [known[name] for name in kind.__annotations__]

    def shown(function: _Function) -> _Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *passed])
        return function

    return shown
