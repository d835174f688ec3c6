"""Rows of unequal length in one flat list: millions of tuples without the tuples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


class Ragged:
    """A read-only sequence of integer tuples.

    Args:
        flat: All rows, one after the other.
        starts: Where each row begins, and at the end where the last one ends.

    >>> rows = Ragged([7, 8, 9], [0, 2, 2, 3])
    >>> list(rows), rows[0], len(rows)
    ([(7, 8), (), (9,)], (7, 8), 3)
    """

    __slots__ = ("_flat", "_starts")

    def __init__(self, flat: Sequence[int], starts: Sequence[int]) -> None:
        self._flat = flat.tolist() if isinstance(flat, np.ndarray) else list(flat)
        self._starts = (
            starts.tolist() if isinstance(starts, np.ndarray) else list(starts)
        )

    def mapped(self, table: dict[int, int]) -> Ragged:
        """The same rows with each number replaced; 0 for one the table lacks."""
        return Ragged([table.get(n, 0) for n in self._flat], self._starts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> tuple[int, ...]:
        starts = self._starts
        return tuple(self._flat[starts[row] : starts[row + 1]])

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        flat, begin = self._flat, 0
        for end in self._starts[1:]:
            yield tuple(flat[begin:end])
            begin = end
