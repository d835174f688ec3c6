"""Hypothesis draws cases: a random program, a random mesh, a random strategy."""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

from fuzz import (  # noqa: F401 - each registers its ops
    ops_contract,
    ops_index,
    ops_move,
    ops_names,
    ops_pointwise,
    ops_reduce,
    ops_structure,
)
from fuzz.describe import Body, Case
from fuzz.kit import DRAWS, Kit, Skip
from fuzz.ops_names import name_dims
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

FAMILIES = tuple(sorted(DRAWS))
STREAM = 40
"""A case's number is that of its stream and, in so many bits, its own."""

LEAST_OPS, MOST_OPS = 5, 40
MESH_AXES = ("data", "tensor", "fsdp", "context", "expert", "stage")
MESHES = (
    (2, 4), (4, 2), (8,), (2, 2, 2), (2, 2), (4,), (2, 3), (3, 2), (6,), (2,), (3,),
    (5,), (7,),
)  # fmt: skip
NAMES = ("a", "b", "c", "mlp", "embed", "vocab", "heads", "seq")
WIDE = ("elementwise", "elementwise", "dot_general", "reshape", "reduce", "annotate")
"""Families that are drawn more often: they spread what the others do."""


class Rolled:
    """Choices of a random number generator.

    Hypothesis would vary single choices of a program it has seen, so that most of its
    programs would be alike; it draws the seed, and `fuzz.shrink` knows better than it
    how to make a program smaller.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """An integer in `[low, high]`."""
        return self._random.randint(low, high)


def cases(stream: int = 0) -> st.SearchStrategy[Case]:
    """Random cases; streams have none in common."""
    return st.integers(0, 2**STREAM - 1).map(lambda n: case_of(stream << STREAM | n))


def drawn(stream: int, count: int) -> list[Case]:
    """Cases of a stream, the same whenever they are drawn."""
    found: dict[int, Case] = {}

    @seed(stream)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(stream))
    def collect(case: Case) -> None:
        found[case.seed] = case

    collect()
    return list(found.values())


def case_of(number: int, families: Sequence[str] = FAMILIES) -> Case:
    """The case of a number."""
    kit = Kit(Rolled(number), [0])
    kit.mesh = kit.pick(_meshes(number >> STREAM))
    axes = list(kit.mesh)
    train = kit.flip(10)
    kit.rules = _rules(kit, axes)
    kit.families = [*families, *(f for f in WIDE if f in families)]
    kit.smooth = int(train)
    batch = math.prod(kit.mesh[a] for a in kit.rules.get("batch", ()))
    while batch < 4:
        batch *= 2
    first = _inputs(kit, batch)
    kit.budget[0] = min(kit.integer(LEAST_OPS, MOST_OPS) for _ in range(3))
    kit.family = "annotate"
    for _ in range(kit.integer(1, 3)):
        with contextlib.suppress(Skip):
            name_dims(kit)
    while kit.budget[0] > 0:
        before = kit.budget[0]
        kit.grow(kit.budget[0])
        if kit.budget[0] == before:
            break
    storage = {
        state: kit.some(axes, 0, 2) if kit.flip(3) else []
        for state in ("params", "gradients", "optimizer")
    }
    return Case(
        body=_reordered(kit, first),
        state=len(kit.inputs) - first,
        mesh=kit.mesh,
        rules=kit.rules,
        storage=storage,
        train=train,
        seed=number,
    )


@functools.cache
def _meshes(stream: int) -> list[dict[str, int]]:
    """A stream has few meshes: programs on one mesh can be compiled together."""
    kit = Kit(Rolled(stream), [0])
    found = []
    for _ in range(5):
        sizes = kit.pick(MESHES)
        axes = kit.some(MESH_AXES, len(sizes), len(sizes))
        found.append(dict(zip(axes, sizes, strict=True)))
    return found


def _rules(kit: Kit, axes: list[str]) -> dict[str, list[str]]:
    """Logical axes, most of them with one mesh axis; some share one."""
    rules = {}
    for name in ("batch", *kit.some(NAMES, 1, 4)):
        if kit.flip(8):
            rules[name] = []
        elif kit.flip(5):
            rules[name] = kit.some(axes, 1, 2)
        else:
            rules[name] = [kit.pick(axes)]
    return rules


def _inputs(kit: Kit, batch: int) -> int:
    """The batch: one or two arrays with the same leading dim. Then some state."""
    for k in range(kit.integer(1, 2)):
        shape = (batch, *(kit.size() for _ in range(kit.integer(1 - k, 2))))
        if math.prod(shape) > 1024:
            shape = shape[:2]
        if kit.flip(4):
            kit.new_input(shape, "int32", kit.pick((4, 8, 6)))
        else:
            kit.new_input(shape)
    count = len(kit.inputs)
    for _ in range(kit.integer(1, 2)):
        kit.new_input(kit.shape())
    if kit.flip(4):
        kit.new_input((), "key")
    return count


def _reordered(kit: Kit, batch: int) -> Body:
    """State first, the batch last, as the last argument of a function is its batch."""
    order = [*range(batch, len(kit.inputs)), *range(batch)]
    renamed = {-(old + 1): -(new + 1) for new, old in enumerate(order)}
    leaves = [v.id for v in kit.leaves() if v.dtype != "key"]
    inputs = tuple(kit.inputs[old] for old in order)
    nodes = tuple(
        replace(n, args=tuple(renamed.get(a, a) for a in n.args)) for n in kit.nodes
    )
    return Body(inputs, nodes, tuple(leaves))
