"""What a user says of a value: names of its dims, or mesh axes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace

import jax
from fuzz.describe import Body, Node, nodes_of
from fuzz.kit import Kit, Skip, draws, runs
from fuzz.ops_move import like, some_value
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import autoshard as ash

_plain = ContextVar("plain", default=False)
_ALIASES = {"data": "dp", "tensor": "tp", "expert": "ep", "context": "sp"}


@contextlib.contextmanager
def unconstrained() -> Iterator[None]:
    """Constraints do nothing: their mesh is not that of a single device."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@draws("annotate")
def name_dims(kit: Kit) -> None:
    """Names dims whose size their axes divide, unless they should not divide."""
    x = some_value(kit)
    names: list[str | None] = [None] * x.rank
    taken: set[str] = set()
    for d in kit.some(range(x.rank), 1, 2):
        fitting = [
            name
            for name, axes in kit.rules.items()
            if not name.endswith(".residual")
            and name not in names
            and not taken & set(axes)
            and x.shape[d] % math.prod(kit.mesh[a] for a in axes) == 0
        ]
        if fitting:
            names[d] = kit.pick(fitting)
            taken |= set(kit.rules[names[d]])
    if not any(names):
        raise Skip
    like(kit, x, "annotate", x.shape, names=names)


@runs
def _annotate_run(x: jax.Array, *, names: list[str | None]) -> jax.Array:
    return ash.annotate(x, *names)


@draws("constrain")
def _constrain(kit: Kit) -> None:
    """`with_sharding_constraint`: axes per dim, no axis, or whatever is best."""
    x = some_value(kit, 1)
    left = list(kit.mesh)
    dims: list[list[str] | None] = []
    for n in x.shape:
        axes = kit.some(left, 0, 2) if kit.flip() else []
        if axes and n % math.prod(kit.mesh[a] for a in axes) == 0:
            left = [a for a in left if a not in axes]
            dims.append(axes)
        else:
            dims.append(kit.pick((None, [], None)))
    if not any(dims):
        raise Skip
    like(kit, x, "constrain", x.shape, dims=dims, mesh=kit.mesh, alias=kit.flip(3))


@runs
def _constrain_run(
    x: jax.Array, *, dims: list[list[str] | None], mesh: dict[str, int], alias: bool
) -> jax.Array:
    if _plain.get() or not any(dims):
        return x
    for n, dim in zip(x.shape, dims, strict=True):
        if n % math.prod(mesh[a] for a in dim or ()):
            raise ValueError(f"{dim} does not divide a dim of size {n}")
    called = {a: _ALIASES.get(a, a) if alias else a for a in mesh}
    types = (AxisType.Auto,) * len(mesh)
    users = AbstractMesh(tuple(mesh.values()), tuple(called.values()), axis_types=types)
    spec = [
        PartitionSpec.UNCONSTRAINED if dim is None else tuple(called[a] for a in dim)
        for dim in dims
    ]
    sharding = NamedSharding(users, PartitionSpec(*spec))
    return jax.lax.with_sharding_constraint(x, sharding)


def asks(body: Body) -> bool:
    """Whether some constraint of a program asks for something."""
    return any(
        any(node.params["dims"]) for node in nodes_of(body) if node.op == "constrain"
    )


def without_constraints(body: Body) -> Body:
    """The same program with constraints that ask for nothing."""

    def less(node: Node) -> Node:
        params = dict(node.params)
        if node.op == "constrain":
            params["dims"] = [None] * len(params["dims"])
        if "body" in params:
            params["body"] = without_constraints(params["body"])
        if "branches" in params:
            params["branches"] = [without_constraints(b) for b in params["branches"]]
        return replace(node, params=params)

    return replace(body, nodes=tuple(less(node) for node in body.nodes))
