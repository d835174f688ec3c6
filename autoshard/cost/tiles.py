"""Tiles in which a TPU's memory holds arrays, and what they add to small or odd ones.

The two dims that lie innermost are cut into tiles of 8 sublanes by 128 lanes, and the
last tile of each is filled up. Which dims lie innermost is the compiler's choice: it is
taken to choose the pair with the least filling. Read off layouts in compiled programs,
such as `f32[4096,128256]{1,0:T(8,128)}`, `f32[1,1,4096]{2,1,0:T(1,128)}` and
`f32[4096]{0:T(1024)}`; see also openxla.org/xla/tiled_layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from autoshard.cost.collectives import Vector

LANES = 128
SUBLANES = 8
_LINE = 1024
"""Elements of a tile of an array of one dim, fewer where it is shorter."""
_INNER = 3
"""So many dims, the largest, are tried as innermost ones."""


def filled(dims: Sequence[Vector], itemsize: int) -> Vector | float:
    """By which factor tiles make an array larger.

    Args:
        dims: Sizes of its dims on one device, each a vector over meshes.
        itemsize: Bytes of an element.

    >>> float(filled([np.array([4096.0]), np.array([96.0])], 4)[0])
    1.0
    >>> round(float(filled([np.array([3.0]), np.array([100.0])], 4)[0]), 4)
    1.7067
    """
    if not dims:
        return 1.0
    # Elements of less than four bytes are packed along the sublanes.
    packed = max(1, 4 // max(1, itemsize))
    if len(dims) == 1:
        line = _power_of_two(dims[0], LANES * packed, _LINE)
        return _up(dims[0], line) / dims[0]
    largest = sorted(range(len(dims)), key=lambda d: -dims[d].sum())[:_INNER]
    lanes = {d: _up(dims[d], LANES) / dims[d] for d in largest}
    rows = {
        d: _up(dims[d], _power_of_two(dims[d], packed, SUBLANES)) / dims[d]
        for d in largest
    }
    best: Vector | float = np.inf
    for inner, second in permutations(largest, 2):
        best = np.minimum(best, lanes[inner] * rows[second])
    return best


def _up(size: Vector, to: Vector | float) -> Vector:
    return np.ceil(size / to) * to


def _power_of_two(size: Vector, least: int, most: int) -> Vector:
    """The least power of two that is not below a size, within bounds."""
    return np.clip(2.0 ** np.ceil(np.log2(np.maximum(size, 1.0))), least, most)
