"""Random programs as data: a list of ops with static parameters, and nothing else.

A `Case` is plain JSON, so a failure prints as a program that anybody can run again.
What an op does is in `fuzz.build`, how one is drawn in `fuzz.generate`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Array:
    """An input.

    Attributes:
        shape: Its shape.
        dtype: Element type, or `"key"` for a typed PRNG key.
        below: Integers lie in `[0, below)`; 0 for anything else.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    below: int = 0


def floating(x: Any) -> bool:
    """Whether an array or a dtype's name is of floats: 64 bits in a case made wide."""
    dtype = getattr(x, "dtype", x)
    return str(dtype) in ("float32", "float64")


@dataclass(frozen=True)
class Node:
    """One op.

    Attributes:
        op: Name of the op.
        args: Operands: results are numbered from 0 in order, inputs from -1 downwards.
        params: Static parameters; `body` and `branches` hold inner programs.
        count: Number of results.
        scale: A power of two that every float result is multiplied with, which keeps
            numbers near one without rounding.
        family: The family of rules it is there for.
    """

    op: str
    args: tuple[int, ...]
    params: dict[str, Any] = field(default_factory=dict)
    count: int = 1
    scale: float = 1.0
    family: str = ""


@dataclass(frozen=True)
class Body:
    """A program: inputs, ops in order of execution, which values are returned."""

    inputs: tuple[Array, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A program with the mesh and the strategy it is run with.

    Attributes:
        body: The program.
        state: How many of its inputs, the first ones, are state; the rest is the batch.
        mesh: Size per mesh axis.
        rules: Mesh axes per logical axis, in order of priority.
        storage: Mesh axes per kind of state.
        train: Whether it is the loss of a train step, not a plain function.
        seed: Of the numbers that the inputs hold.
    """

    body: Body
    state: int
    mesh: dict[str, int]
    rules: dict[str, list[str]]
    storage: dict[str, list[str]]
    train: bool = False
    seed: int = 0

    @property
    def chips(self) -> int:
        """Number of devices."""
        product = 1
        for size in self.mesh.values():
            product *= size
        return product


def nodes_of(body: Body) -> list[Node]:
    """All ops, those of inner programs included."""
    found = []
    for node in body.nodes:
        found.append(node)
        for inner in inner_bodies(node):
            found += nodes_of(inner)
    return found


def inner_bodies(node: Node) -> list[Body]:
    """The programs inside an op."""
    inner = [node.params["body"]] if "body" in node.params else []
    return inner + list(node.params.get("branches", ()))


def to_json(case: Case) -> str:
    """The case as JSON, one op on a line."""
    return _pretty(dataclasses.asdict(case)) + "\n"


def _pretty(value: Any, indent: str = "") -> str:
    flat = json.dumps(value)
    fits = len(indent) + len(flat) <= 100
    if fits or not isinstance(value, dict | list | tuple) or "op" in value:
        return flat
    deeper = indent + " "
    if isinstance(value, dict):
        rows = [f"{json.dumps(k)}: {_pretty(v, deeper)}" for k, v in value.items()]
        return "{" + f",\n{deeper}".join(rows) + "}"
    return "[" + f",\n{deeper}".join(_pretty(v, deeper) for v in value) + "]"


def from_json(text: str) -> Case:
    """The case that `to_json` wrote."""
    raw = json.loads(text)
    return Case(**{**raw, "body": _body(raw["body"])})


def _body(raw: dict[str, Any]) -> Body:
    return Body(
        inputs=tuple(Array(**{**a, "shape": tuple(a["shape"])}) for a in raw["inputs"]),
        nodes=tuple(_node(n) for n in raw["nodes"]),
        outputs=tuple(raw["outputs"]),
    )


def _node(raw: dict[str, Any]) -> Node:
    params = dict(raw["params"])
    if "body" in params:
        params["body"] = _body(params["body"])
    if "branches" in params:
        params["branches"] = [_body(b) for b in params["branches"]]
    return Node(**{**raw, "args": tuple(raw["args"]), "params": params})
