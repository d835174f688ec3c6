"""What must divide for a candidate to be one, and which dims keep others from it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from autoshard.cost.moves import axes_of
from autoshard.cost.price import Pricer
from autoshard.ir.mesh import AXES
from autoshard.plan.sharded import Dims, ShardedProgram

_SMALL = 1 / 100
"""State leaves below this part of all state may stay whole where nothing divides."""


@dataclass(frozen=True)
class _Demand:
    """One thing that every candidate must meet.

    Attributes:
        met: Whether a candidate does, bool[candidate].
        ways: How many parts are asked for, int64[candidate].
        axes: The mesh axes whose sizes make that number.
        words: What was asked of what, up to the number; empty if another demand says
            it.
    """

    met: np.ndarray
    ways: np.ndarray
    axes: tuple[str, ...]
    words: Callable[[], str]


class _Meshes:
    """Mesh sizes of candidates, and products of them.

    Args:
        sizes: int64[candidate, axis].
    """

    def __init__(self, sizes: np.ndarray) -> None:
        self._columns = np.ascontiguousarray(sizes.T)
        self._products: dict[frozenset[str], np.ndarray] = {}
        self._divide: dict[tuple[int, frozenset[str]], np.ndarray] = {}

    def product(self, axes: Iterable[str]) -> np.ndarray:
        """The devices along some axes, int64[candidate]."""
        key = frozenset(axes)
        if key not in self._products:
            columns = [self._columns[AXES.index(axis)] for axis in sorted(key)]
            ones = np.ones(self._columns.shape[1], dtype=np.int64)
            self._products[key] = functools.reduce(np.multiply, columns, ones)
        return self._products[key]

    def divide(self, size: int, axes: Iterable[str]) -> np.ndarray:
        """Where a size divides over some axes, bool[candidate]."""
        key = size, frozenset(axes)
        if key not in self._divide:
            self._divide[key] = size % self.product(key[1]) == 0
        return self._divide[key]


def arguments_divide(
    pricer: Pricer, sizes: np.ndarray, cuts: np.ndarray, batch: int
) -> np.ndarray:
    """Which candidates divide what rules shard of the arguments; as `divisible`.

    Of all structures that differ in storage alone, these are the same.
    """
    fits, meshes = np.ones(len(sizes), dtype=bool), _Meshes(sizes)
    for demand in _batch(pricer, meshes, cuts, batch):
        fits &= demand.met
    for value, dims in zip(pricer.program.inputs, pricer.sharded.compute, strict=True):
        for size, axes in zip(pricer.program.values[value].shape, dims, strict=True):
            fits &= meshes.divide(size, axes)
    return fits


def divide_alike(
    pricer: Pricer, meshes: np.ndarray, sizes: Mapping[str, int]
) -> np.ndarray:
    """Whether all that propagation asked for divides as it took it, bool[mesh].

    Args:
        pricer: What was propagated.
        meshes: Their sizes, int64[mesh, axis].
        sizes: With which it was, by axis; where it has none, all was taken to divide.
    """
    found, given = np.ones(len(meshes), dtype=bool), _Meshes(meshes)
    for size, axes in pricer.sharded.asked:
        met = size % math.prod(sizes.get(a, 1) for a in axes) == 0
        found &= given.divide(size, axes) == met
    return found


def divisible(
    pricer: Pricer, sizes: np.ndarray, cuts: np.ndarray, batch: int
) -> np.ndarray:
    """Which candidates divide every dim they shard.

    Args:
        pricer: Of the structure.
        sizes: Mesh sizes, int64[candidate, axis].
        cuts: Microbatches, int64[candidate].
        batch: Size of the batch; 0 if there is none.

    Returns:
        bool[candidate].
    """
    fits = np.ones(len(sizes), dtype=bool)
    for demand in _demands(pricer, sizes, cuts, batch):
        fits &= demand.met
    return fits


def what_fails(
    pricer: Pricer, sizes: np.ndarray, cuts: np.ndarray, batch: int
) -> dict[str, int]:
    """In words, what does not divide, and for how many of the same candidates."""
    found: dict[str, int] = {}
    for demand in _demands(pricer, sizes, cuts, batch):
        failing = ~demand.met
        words = demand.words() if failing.any() else ""
        if words:
            least = int(demand.ways[failing].min())
            over = f" ({' x '.join(demand.axes)})" if demand.axes else ""
            found[f"{words} {least}{over}"] = int(failing.sum())
    return found


def _batch(
    pricer: Pricer, meshes: _Meshes, cuts: np.ndarray, batch: int
) -> Iterator[_Demand]:
    sharded, product = pricer.sharded, meshes.product

    def pieces(axes: tuple[str, ...]) -> Callable[[], str]:
        along = " microbatches and devices" if axes else " microbatches"
        return lambda: f"the batch of {batch} is not divisible into{along}:"

    for info, compute in zip(sharded.traced.inputs, sharded.compute, strict=True):
        if info.state == "data" and info.shape and batch:
            ways = product(compute[0])
            met = meshes.divide(batch, compute[0])
            yield _Demand(
                met,
                ways,
                compute[0],
                lambda: f"the batch of {batch} is not divisible by",
            )
            yield _Demand(
                ~met | (batch % (cuts * ways) == 0),
                cuts * ways,
                compute[0],
                pieces(compute[0]),
            )


def _demands(
    pricer: Pricer, sizes: np.ndarray, cuts: np.ndarray, batch: int
) -> Iterator[_Demand]:
    sharded, meshes = pricer.sharded, _Meshes(sizes)
    product = meshes.product
    yield from _batch(pricer, meshes, cuts, batch)
    for size, axes in sorted(sharded.divides):
        met = meshes.divide(size, axes)
        words = _words(pricer, size, axes, "not divisible by")
        yield _Demand(met, product(axes), axes, words)
    for size, axes in sorted(sharded.padded):  # every device must have something
        ways = product(axes)
        yield _Demand(
            size >= ways, ways, axes, _words(pricer, size, axes, "smaller than")
        )
    yield from _storage(pricer, meshes)
    if pricer.context.passes:
        heads, by = pricer.context.heads_and_axes
        axes = (*by, "context")
        yield _Demand(
            pricer.context.divides(sizes),
            product(axes),
            axes,
            lambda: f"the {heads} heads of attention are not divisible by",
        )


def _storage(pricer: Pricer, meshes: _Meshes) -> Iterator[_Demand]:
    """A large state leaf must find a dim for its storage axes; a small one may stay."""
    sharded, program = pricer.sharded, pricer.program
    alike = pricer.work.alike
    total = sum(program.values[v].bytes_ * alike[v] for v in program.inputs)
    for value, compute, info in zip(
        program.inputs, sharded.compute, sharded.traced.inputs, strict=True
    ):
        extra = tuple(sorted(axes_of(sharded.specs[value]) - axes_of(compute)))
        if not extra or program.values[value].bytes_ < total * _SMALL:
            continue
        classes = sharded.classes
        ways = meshes.product(extra)
        some = np.zeros(len(ways), dtype=bool)
        for d, size in enumerate(program.values[value].shape):
            names = classes.names.get(classes.of_value[value][d], ())
            if "layers" not in names:
                some |= meshes.divide(size, (*compute[d], *extra))
        path = info.path
        yield _Demand(
            some,
            ways,
            extra,
            lambda path=path: f"no dim of {path} is divisible further, by",
        )


def _words(
    pricer: Pricer, size: int, axes: tuple[str, ...], verb: str
) -> Callable[[], str]:
    """Names the dims of a size that are over some axes: of arguments, or of an op."""
    sharded = pricer.sharded

    def words() -> str:
        inputs = [
            (info, d, pricer.work.alike[v])
            for v, info, dims in zip(
                pricer.program.inputs,
                sharded.traced.inputs,
                sharded.compute,
                strict=True,
            )
            for d, dim in enumerate(dims)
            if (info.shape[d], dim) == (size, axes)
        ]
        used = [
            (info, d, alike)
            for info, d, alike in inputs
            if info.state == "params" or (info.state, d > 0) == ("data", True)
        ]
        if not used and any(info.state == "data" for info, _, _ in inputs):
            return ""  # the batch
        found = []
        for info, d, _ in used or inputs:
            name = f" ({info.logical[d]})" if used and info.logical[d] else ""
            found.append(f"of dim {d}{name} of {info.path}")
        count = sum(alike for _, _, alike in used or inputs)
        found = found or [_made(sharded, size, axes)]
        more = [f"of {count - 2} more"] if count > 3 else []
        places = " and ".join(found[:2] + (more or found[2:]))
        return f"{size}, the size {places}, is {verb}"

    return words


def _made(sharded: ShardedProgram, size: int, axes: tuple[str, ...]) -> str:
    """The op that makes, or goes over, a dim of a size over some axes."""

    def has(shape: tuple[int, ...], spec: Dims) -> bool:
        return (size, axes) in zip(shape, spec, strict=True)

    program, rules = sharded.traced.program, sharded.classes.rules
    for op in program.ops:
        made = ((program.values[v].shape, sharded.specs[v]) for v in op.outputs)
        if any(has(*one) for one in made) or has(
            rules[op.index].sizes, sharded.factor_axes[op.index]
        ):
            return f"of a dim of {op.address}" + (
                f" at {op.source}" if op.source else ""
            )
    return "of a dim"
