"""Rows of unequal length in one flat list: millions of tuples without the tuples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Numbers = Sequence[int] | np.ndarray[Any, np.dtype[np.int64]]


class Ragged(Sequence[tuple[int, ...]]):
    """A read-only sequence of integer tuples.

    Args:
        flat: All rows, one after the other.
        starts: Where each row begins, and at the end where the last one ends.

    >>> rows = Ragged([7, 8, 9], [0, 2, 2, 3])
    >>> list(rows), rows[0], len(rows)
    ([(7, 8), (), (9,)], (7, 8), 3)
    """

    __slots__ = ("_flat", "_starts")

    def __init__(self, flat: Numbers, starts: Numbers) -> None:
        self._flat: list[int] = np.asarray(flat, dtype=np.int64).tolist()
        self._starts: list[int] = np.asarray(starts, dtype=np.int64).tolist()

    def mapped(self, table: dict[int, int]) -> Ragged:
        """The same rows with each number replaced; 0 for one the table lacks."""
        found = Ragged((), (0,))
        found._flat = [table.get(n, 0) for n in self._flat]
        found._starts = self._starts
        return found

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: Any) -> Any:
        starts = self._starts
        return tuple(self._flat[starts[row] : starts[row + 1]])

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        flat, begin = self._flat, 0
        for end in self._starts[1:]:
            yield tuple(flat[begin:end])
            begin = end
