"""Reading and writing plans (JSON), strategies and cluster files (TOML)."""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autoshard.ir.errors import (
    AutoshardError,
    InputError,
    NameUnknownError,
    OutputError,
    PlanMismatchError,
)
from autoshard.ir.program import no_collection
from autoshard.plan.chip import ChipType, to_toml
from autoshard.plan.schema import SCHEMA_VERSION, Plan
from autoshard.plan.strategy import Strategy


def strategies_dir() -> Any:
    """Where the shipped strategies lie: the wheel's data, or the checkout's folder."""
    packaged = resources.files("autoshard") / "strategies"
    if packaged.is_dir():
        return packaged
    return Path(__file__).resolve().parents[2] / "strategies"


def strategy_names() -> list[str]:
    """Names of the shipped strategies.

    >>> "fsdp" in strategy_names()
    True
    """
    entries = (entry.name for entry in strategies_dir().iterdir())
    return sorted(n.removesuffix(".toml") for n in entries if n.endswith(".toml"))


def load_strategy(name_or_path: str) -> Strategy:
    """Loads a strategy by the name of a shipped one, or from a TOML file.

    Raises:
        NameUnknownError: No such strategy.
        InputError: The file is no TOML, or not of the schema.

    >>> load_strategy("dp").mesh
    {'data': 'auto'}
    """
    if name_or_path in strategy_names():
        source = strategies_dir() / f"{name_or_path}.toml"
    else:
        source = Path(name_or_path)
        if not source.is_file():
            close = difflib.get_close_matches(name_or_path, strategy_names(), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise NameUnknownError(
                f"unknown strategy {name_or_path!r}: neither a file nor one of "
                f"{', '.join(strategy_names())}.{hint}"
            )
    try:
        text = source.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"strategy {source}: cannot be read: {error}") from error
    strategy = _validated(Strategy, document, f"strategy {source}")
    return strategy.placed(_places(text, source.name))


def _places(text: str, name: str) -> dict[str, str]:
    """File and line of every field of a strategy file, by the key of the field."""
    found: dict[str, str] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if head := re.match(r"\s*\[([\w.]+)\]", line):
            section = head[1]
        elif entry := re.match(r'\s*("?)([\w.]+)\1\s*=', line):
            prefix = "" if section in ("", "mesh", "schedule") else f"{section}."
            found.setdefault(prefix + entry[2], f"{name}:{number}")
    return found


def _validated(model: Any, document: Any, what: str) -> Any:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in e['loc']) or '(whole)'}: {e['msg']}"
            for e in error.errors(include_url=False)[:5]
        ]
        raise InputError(f"{what} is not valid:\n" + "\n".join(lines)) from None
    except AutoshardError as error:
        raise type(error)(f"{what}: {error}") from None


_EXPANDED = 3
"""Levels of a plan's JSON that have a line per key; below, a record is one line."""

_RECORD = json.JSONEncoder(sort_keys=True, allow_nan=False)


@no_collection()
def plan_to_json(plan: Plan) -> str:
    """The plan as sorted, deterministic JSON with a final newline.

    A tensor, a collective, a constraint has a line each, so that two plans can be
    compared line by line.
    """
    return _lines(plan.model_dump(mode="json"), 0) + "\n"


def _lines(value: Any, level: int) -> str:
    if not value or not isinstance(value, dict | list) or level >= _EXPANDED:
        return _RECORD.encode(value)
    indent, last = "\n" + " " * (level + 1), "\n" + " " * level
    if isinstance(value, dict):
        rows = [
            f"{json.dumps(k)}: {_lines(v, level + 1)}" for k, v in sorted(value.items())
        ]
        return "{" + indent + f",{indent}".join(rows) + last + "}"
    if not any(isinstance(one, dict | list) for one in value):
        return _RECORD.encode(value)
    rows = map(_RECORD.encode, value)
    return "[" + indent + f",{indent}".join(rows) + last + "]"


@no_collection()
def plan_from_json(text: str, what: str = "plan") -> Plan:
    """Reads a plan.

    Raises:
        InputError: No JSON (truncated, edited), or not of the schema.
        PlanMismatchError: Another schema version.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what} is not valid JSON (line {error.lineno}, column {error.colno}: "
            f"{error.msg}); it may be truncated. Write it again with "
            "`autoshard search ... -o FILE`."
        ) from None
    if not isinstance(document, dict) or "schema_version" not in document:
        raise InputError(
            f"{what} is JSON but no autoshard plan: it has no 'schema_version'. Plans "
            "are written by `autoshard search ... -o FILE`."
        )
    version = document["schema_version"]
    if version != SCHEMA_VERSION:
        raise PlanMismatchError(
            f"{what} has schema version {version!r}; this autoshard reads version "
            f"{SCHEMA_VERSION}. Search again to write a plan of this version."
        )
    return _validated(Plan, document, what)


def load_plan(path: str | Path) -> Plan:
    """Reads a plan file; raises as `plan_from_json`, or when it cannot be read."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"plan {path} cannot be read: {getattr(error, 'strerror', error)}. Give "
            "the path of a file that `autoshard search ... -o FILE` wrote."
        ) from None
    return plan_from_json(text, f"plan {path}")


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes a plan, whole or not at all.

    Raises:
        OutputError: The place cannot be written.
    """
    write_atomically(path, plan_to_json(plan))


def save_type(chip: ChipType, path: str | Path) -> None:
    """Writes a chip type as a cluster file, whole or not at all.

    Raises:
        OutputError: The place cannot be written.
    """
    write_atomically(path, to_toml(chip))


def check_writable(path: str | Path) -> None:
    """Raises `OutputError` when a file could not be written at `path`."""
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory; name a file in it.")
    if not folder.is_dir():
        raise OutputError(
            f"cannot write {path}: the directory {folder} does not exist; make it "
            "first."
        )
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {folder}.")


def write_atomically(path: str | Path, text: str) -> None:
    """Writes text to a file that appears only when it is complete."""
    path = Path(path)
    check_writable(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            dir=path.parent,
            prefix=f".{path.name}.",
            delete=False,
            encoding="utf-8",
        ) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}.") from error
