"""Fields of a strategy fixed from outside: by a flag, or between two solves."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from autoshard.ir.errors import AutoshardError, InputError, NameUnknownError
from autoshard.ir.mesh import AXES
from autoshard.plan.strategy import STATES, Rule, Schedule, Strategy
from autoshard.search.space import KNOWN_RULES

_SCHEDULE = tuple(Schedule.model_fields)
_FORMS = (
    *AXES,
    *_SCHEDULE,
    "order",
    *(f"storage.{state}" for state in STATES),
    "rules.LOGICAL",
    "specs.PATH",
)


def parse_pins(texts: Iterable[str]) -> dict[str, str]:
    """Takes `KEY=VALUE` texts apart.

    Raises:
        InputError: A text has no `=`, or a key comes twice.

    >>> parse_pins(["tensor=8", "rules.vocab=none"])
    {'tensor': '8', 'rules.vocab': 'none'}
    """
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise InputError(
                f"--set {text!r} is not of the form KEY=VALUE, such as tensor=8, "
                "remat=full, storage.optimizer=data+fsdp or rules.vocab=none."
            )
        if key.strip() in found:
            raise InputError(f"--set {key.strip()} is given twice; keep one.")
        found[key.strip()] = value.strip()
    return found


def with_pins(strategy: Strategy, pins: Mapping[str, Any]) -> Strategy:
    """A strategy with fields fixed.

    Args:
        strategy: Whose fields.
        pins: Values by key: the size of an axis (`tensor`), a field of the schedule
            (`microbatches`, `remat`, `offload`), `storage.STATE`, `rules.LOGICAL`,
            `specs.PATH`.
            A value is what the field takes, or its text; axes, and what is offloaded,
            are joined by `+`, and `none` is none of them; `auto` opens the field.

    Raises:
        NameUnknownError: No field has a key's name.
        InputError: A value does not suit its field.

    >>> auto = Strategy(name="s", about="", mesh={"data": "auto"})
    >>> with_pins(auto, {"tensor": "2", "remat": "full"}).mesh
    {'data': 'auto', 'tensor': 2}
    """
    for key, value in pins.items():
        place = {key.removeprefix("mesh.").removeprefix("schedule."): "set by hand"}
        try:
            strategy = _with_pin(strategy, key, value).placed(place)
        except ValidationError as error:
            said = "; ".join(
                e["msg"].removeprefix("Value error, ").rstrip(".")
                for e in error.errors(include_url=False)[:2]
            )
            raise InputError(f"{key} = {value!r} cannot be set: {said}.") from None
        except AutoshardError as error:
            raise type(error)(f"{key} = {value!r} cannot be set: {error}") from None
    return strategy


def _with_pin(strategy: Strategy, key: str, value: Any) -> Strategy:
    section, _, name = key.partition(".")
    document = strategy.model_dump()
    if key in AXES or (section == "mesh" and name in AXES):
        axis = name or key
        document["mesh"] = {**strategy.mesh, axis: _count(value, key)}
    elif key in _SCHEDULE or (section == "schedule" and name in _SCHEDULE):
        field = name or key
        counted = field in ("microbatches", "virtual", "context_heads")
        chosen = _count(value, key) if counted else value
        if field == "offload":
            chosen = _axes(value)
        if field == "blocks" and isinstance(value, str):
            chosen = tuple(_count(part, key) for part in value.split(","))
        document["schedule"] = {**document["schedule"], field: chosen}
    elif key == "order":
        document["order"] = _axes(value)
    elif section == "storage" and name in STATES:
        document["storage"] = {**document["storage"], name: _axes(value)}
    elif section == "rules" and name:
        document["rules"] = _rules(strategy.rules, name, _axes(value))
    elif section == "specs" and name:
        document["specs"] = {name: _entries(value), **document["specs"]}
    else:
        close = difflib.get_close_matches(key, _FORMS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise NameUnknownError(
            "no field of a strategy has this name; there are "
            f"{', '.join(_FORMS)}.{hint}"
        )
    return Strategy.model_validate(document).placed(strategy.places)


def _rules(rules: tuple[Rule, ...], name: str, axes: Any) -> tuple[Rule, ...]:
    """The rules with one of them changed, or a new one ahead of all."""
    new = Rule(logical=name, axes=axes)
    if name in [rule.logical for rule in rules]:
        return tuple(new if rule.logical == name else rule for rule in rules)
    return (new, *rules)


def _count(value: Any, key: str) -> int | str:
    if value == "auto":
        return "auto"
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = None
    if count is None or (isinstance(value, float) and count != value):
        raise InputError(f"{key} takes a whole number or 'auto'")
    return count


def _listed(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Iterable):
        raise InputError("this is a list of names, or text such as 'data+fsdp'")
    return tuple(value)


def _axes(value: Any) -> Any:
    if not isinstance(value, str):
        return _listed(value)
    if value == "auto":
        return value
    return () if value == "none" else tuple(value.replace(",", "+").split("+"))


def _entries(value: Any) -> Any:
    """One entry per dim: `fsdp,tensor`, with `none` for a dim that stays whole."""
    if not isinstance(value, str):
        return _listed(value)
    return tuple(
        "" if part == "none" else tuple(part.split("+")) if "+" in part else part
        for part in value.split(",")
    )


def fixed_fields(strategy: Strategy) -> dict[str, Any]:
    """What a strategy fixes, by the keys of `with_pins`; its holes are left out.

    Path maps are no field of their own, of the rules only those count that may be
    holes, and the order of axes is left out: nothing divides or fits for its sake.

    >>> fixed_fields(Strategy(name="s", about="", mesh={"data": "auto"}))["remat"]
    'none'
    """
    found: dict[str, Any] = {
        axis: size for axis, size in strategy.mesh.items() if size != "auto"
    }
    of_stages = ("pipeline", "virtual", "vocab") if "stage" in strategy.mesh else ()
    of_context = ("context_kind",) if "context" in strategy.mesh else ()
    for field in ("microbatches", "remat", "offload", *of_context, *of_stages):
        value = getattr(strategy.schedule, field)
        if value not in ("auto", "mix"):
            found[field] = value
    for state in STATES:
        value = getattr(strategy.storage, state)
        if value != "auto":
            found[f"storage.{state}"] = value
    for rule in strategy.rules:
        if rule.axes != "auto" and rule.logical in KNOWN_RULES:
            found[f"rules.{rule.logical}"] = rule.axes
    return found


def opened(strategy: Strategy, keys: Iterable[str]) -> Strategy:
    """A strategy with fields made holes again, by the keys of `fixed_fields`."""
    return with_pins(strategy, dict.fromkeys(keys, "auto"))
