"""Tiles against layouts that the TPU compiler wrote into compiled programs."""

from __future__ import annotations

import numpy as np
import pytest

from autoshard.cost.tiles import filled

# Dims, bytes of an element, and the layout's tiles in elements of each dim, as printed
# for steps of GPT-2 and Llama 3 on v5e and v5p: `f32[50257,96]{0,1:T(8,128)}` has its
# first dim innermost, so tiles of 128 of it by 8 of the other.
LAYOUTS = [
    ((50257, 96), 4, (128, 8)),
    ((2048, 128256), 4, (8, 128)),
    ((3, 64), 2, (4, 128)),  # bf16[3,64]{1,0:T(4,128)(2,1)}
    ((12, 64), 2, (8, 128)),
    ((2, 384), 4, (2, 128)),
    ((2, 768), 2, (2, 128)),
    ((1, 768), 4, (1, 128)),
    ((1, 96), 4, (1, 128)),
    ((96,), 4, (128,)),
    ((96,), 2, (256,)),
    ((256,), 4, (256,)),
    ((384,), 4, (512,)),
    ((768,), 4, (1024,)),
    ((4096,), 4, (1024,)),
    ((2, 1, 8, 2048, 4, 2048), 4, (1, 1, 1, 128, 1, 8)),
    ((2, 1, 2048, 1), 4, (1, 1, 128, 1)),  # {2,3,1,0:T(1,128)}
    ((2, 3, 1024, 1, 1024), 4, (1, 1, 8, 1, 128)),
]


@pytest.mark.parametrize(("dims", "itemsize", "tiles"), LAYOUTS)
def test_a_layout_fills_as_many_tiles_as_the_compilers(dims, itemsize, tiles):
    held = np.prod([-(-d // t) * t for d, t in zip(dims, tiles, strict=True)])
    got = filled([np.array([float(d)]) for d in dims], itemsize)
    assert got * np.prod(dims) == pytest.approx(held)


def test_a_number_takes_no_tiles():
    assert filled([], 4) == 1.0


def test_each_mesh_has_its_own_filling():
    rows, columns = np.array([16.0, 4.0, 3.0]), np.array([256.0, 64.0, 64.0])
    # 16 by 256 as it is; then half the lanes are filled, and a fourth row.
    np.testing.assert_allclose(filled([rows, columns], 4), [1.0, 2.0, 2.0 * 4 / 3])
