"""Blocks of a program: what repeats in it, and which ops are copies of which.

An unrolled model is the same block over and over: in the forward pass, in reverse order
in the backward pass, and once more in each part of the optimizer update. What one copy
decides, all can decide alike, so that a thousand layers need little more than ten.

Stretches of equal signatures are only candidates. A repeat is one whose wiring is the
same in every copy: an operand comes from the same place in the same copy, from the copy
before, from one value that all copies share, from an input of its own, or from the
copy of an earlier repeat that belongs to it (what a layer saved for its backward pass);
and the results are consumed alike. Only at its ends may a chain of copies differ: the
first copy is fed from elsewhere, and the last one feeds something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from autoshard.ir.blocks import equal_runs, likely_periods
from autoshard.ir.copies import Finder
from autoshard.ir.signatures import Flat, Ints, flatten, refined
from autoshard.ir.values import Program

_ROUNDS = 4
_FEWEST_OPS = 4


@dataclass(frozen=True, slots=True)
class Repeat:
    """A stretch of ops that is several copies of one block.

    Attributes:
        start: The first op.
        period: Ops per copy.
        count: Number of copies; for a loop, its trips.
        kind: Whether the copies stand one after the other, or are runs of a loop.
        source: The user's line of the first op that has one.
        ops: Ops of the program that the repeat covers.
    """

    start: int
    period: int
    count: int
    kind: Literal["unrolled", "scanned"]
    source: str
    ops: int


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Copies of a block that stand one after the other, and which layer each is of.

    Attributes:
        start: The first op.
        period: Ops per copy.
        count: Number of copies.
        root: The chain whose copies are counted, perhaps this one itself.
        labels: int64 per copy: of which copy of that chain it is a part.
    """

    start: int
    period: int
    count: int
    root: int
    labels: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The repeats of a program and what they tie.

    Attributes:
        repeats: By position.
        representative: int64 per op: the op of the first copy that stands for it, or
            itself.
        tied_values: int64 per value: the value that stands for it, or itself. A result
            of a tied op is tied; an input is, where all that use it are.
        seams: int64, sorted: tied ops of which an operand is not tied to that of the
            representative. The second copy of a chain is fed by the first, which is
            itself fed from elsewhere; to look at representatives alone would lose that.
        chains: The unrolled repeats, numbered as found.
        classes: int64 per value: what the values of all copies at one place have in
            common, -1 for what is in none.
        labels: int64 per value: which copy it is of, as the chain counts them that
            `roots` names.
        roots: int64 per class: a chain.
        crossing: Values that one copy of a chain makes and the next reads: what would
            be carried, were the chain a loop.
    """

    repeats: tuple[Repeat, ...]
    representative: np.ndarray
    tied_values: np.ndarray
    seams: np.ndarray
    chains: tuple[Chain, ...]
    classes: np.ndarray
    labels: np.ndarray
    roots: np.ndarray
    crossing: frozenset[int]

    @property
    def tied_ops(self) -> int:
        """Ops that another one stands for."""
        return int(np.sum(self.representative != np.arange(len(self.representative))))

    @staticmethod
    def none(ops: int, values: int) -> Blocks:
        """Of a program in which nothing is known to repeat."""
        nothing = np.zeros(0, dtype=np.int64)
        return Blocks(
            repeats=(),
            representative=np.arange(ops),
            tied_values=np.arange(values),
            seams=nothing,
            chains=(),
            classes=np.full(values, -1),
            labels=np.zeros(values, dtype=np.int64),
            roots=nothing,
            crossing=frozenset(),
        )


def find_blocks(program: Program) -> Blocks:
    """Finds the repeated blocks of a program.

    Args:
        program: The program, unrolled or scanned.

    Returns:
        Repeats, loops included, and which op stands for which. Ops in a loop stand for
        themselves: its body is one copy already.

    >>> import jax, jax.numpy as jnp
    >>> from autoshard.ir.program import build
    >>> def fn(x, ws):
    ...     for w in ws:
    ...         x = jnp.tanh(x @ w)
    ...     return x
    >>> x, w = jnp.ones((4, 4)), jnp.ones((4, 4))
    >>> blocks = find_blocks(build(jax.make_jaxpr(fn)(x, [w, w, w]), "xabc"))
    >>> blocks.representative.tolist(), blocks.tied_values[:4].tolist()
    ([0, 1, 0, 1, 0, 1], [0, 1, 1, 1])
    """
    flat = flatten(program)
    kinds: dict[tuple[object, ...], int] = {}
    finder = Finder(
        flat,
        _extents(program, flat),
        np.array(
            [
                kinds.setdefault((r.trips, r.note, *r.manual.items()), len(kinds))
                for r in program.regions
            ]
        ),
        np.array([r.parent for r in program.regions]),
    )
    free = np.ones(len(flat.code), dtype=bool)
    codes = flat.code
    for _ in range(_ROUNDS):
        before = len(finder.found)
        for begin, end, period in sorted(_candidates(codes)):
            finder.verify(begin, end, period)
        for start, period, count in finder.found[before:]:
            free[start : start + period * count] = False
        if len(finder.found) == before:
            break
        # What reads the copies of a repeat is now told apart by which part it reads.
        codes = refined(flat, finder.classes, free)
    representative = finder.representative
    values = finder.consistent_values()
    at = np.flatnonzero(representative[flat.taker] != flat.taker)
    taker = flat.taker[at]
    twin = flat.begin[representative[taker]] + at - flat.begin[taker]
    seam = values[flat.taken[at]] != values[flat.taken[twin]]
    crossing = np.append(finder.passed, False)[finder.classes[:-1]]
    unrolled = [
        _repeat(program, *place, kind="unrolled", ops=place[1] * place[2])
        for place in finder.found
    ]
    repeats = sorted([*unrolled, *_loops(program, flat)], key=lambda r: r.start)
    return Blocks(
        repeats=tuple(repeats),
        representative=representative,
        tied_values=values[:-1],
        seams=np.unique(taker[seam]),
        chains=tuple(
            Chain(*place, root, labels)
            for place, (root, labels) in zip(finder.found, finder.numbered, strict=True)
        ),
        classes=finder.classes[:-1],
        labels=finder.labels[:-1],
        roots=np.array(finder.roots, dtype=np.int64),
        crossing=frozenset(np.flatnonzero(crossing).tolist()),
    )


def _repeat(
    program: Program,
    start: int,
    period: int,
    count: int,
    *,
    kind: Literal["unrolled", "scanned"],
    ops: int,
) -> Repeat:
    within = program.ops[start : start + period]
    source = next((op.source for op in within if op.source), "")
    return Repeat(start, period, count, kind, source, ops)


def _loops(program: Program, flat: Flat) -> list[Repeat]:
    """The loops that run more than once, by the ops of their body."""
    first, last = _extents(program, flat)
    return [
        _repeat(
            program,
            int(first[r]),
            int(last[r] - first[r]) + 1,
            region.trips,
            kind="scanned",
            ops=int(last[r] - first[r]) + 1,
        )
        for r, region in enumerate(program.regions)
        if r and region.trips > 1 and last[r] >= first[r]
    ]


def _extents(program: Program, flat: Flat) -> tuple[Ints, Ints]:
    """First and last op of each region, those of inner regions included."""
    first = np.full(len(program.regions), len(flat.region), dtype=np.int64)
    last = np.full(len(program.regions), -1, dtype=np.int64)
    np.minimum.at(first, flat.region, np.arange(len(flat.region)))
    np.maximum.at(last, flat.region, np.arange(len(flat.region)))
    for r in range(len(program.regions) - 1, 0, -1):  # inner ones come later
        parent = program.regions[r].parent
        first[parent] = min(first[parent], first[r])
        last[parent] = max(last[parent], last[r])
    return first, last


# -- candidates ------------------------------------------------------------------------


def _candidates(codes: Ints) -> list[tuple[int, int, int]]:
    """Disjoint stretches `(begin, end, period)`, the one that covers the most first."""
    runs = [(*equal_runs(codes, p), p) for p in likely_periods(codes)]
    if not runs:
        return []
    begin = np.concatenate([b for b, _, _ in runs])
    end = np.concatenate([e for _, e, _ in runs])
    period = np.concatenate([np.full(len(b), p) for b, _, p in runs])
    chosen: list[tuple[int, int, int]] = []
    while len(begin):
        copies = (end - begin) // period
        useful = (copies >= 2) & (copies * period >= _FEWEST_OPS)
        begin, end, period = begin[useful], end[useful], period[useful]
        if not len(begin):
            break
        covered = (end - begin) // period * period
        most = np.flatnonzero(covered == covered.max())
        best = most[np.lexsort((begin[most], period[most]))[0]]
        low, high = int(begin[best]), int(end[best])
        chosen.append((low, high, int(period[best])))
        # What overlaps keeps the parts to the left and to the right.
        left = begin < low
        right = end > high
        begin, end, period = (
            np.concatenate([begin[left], np.maximum(begin[right], high)]),
            np.concatenate([np.minimum(end[left], low), end[right]]),
            np.concatenate([period[left], period[right]]),
        )
        keep = begin < end
        begin, end, period = begin[keep], end[keep], period[keep]
    return chosen
