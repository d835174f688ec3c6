"""Groups of devices in every way XLA writes them, and the axes they are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autoshard.ir.errors import InputError
from autoshard.verify.groups import (
    UNNAMED,
    axes_of_groups,
    axes_of_pairs,
    parse_groups,
    parse_pairs,
)

# Rows of four: devices 0-3 and 4-7 along "tensor", 0/4, 1/5, ... along "data".
MESH = {"data": 2, "tensor": 4}


def groups(*rows):
    return frozenset(frozenset(row) for row in rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3}}", groups((0, 1), (2, 3))),
        ("{}", groups(range(8))),
        ("[2,4]<=[8]", groups((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", groups((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[2,4]<=[2,2,2]T(1,0,2)", groups((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", groups((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a','b'}", groups(range(8))),
        (
            "mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}",
            groups((0, 4), (1, 5), (2, 6), (3, 7)),
        ),
        (
            "mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}",
            groups((0, 1, 2, 3), (4, 5, 6, 7)),
        ),
        # The larger half of b: devices two apart.
        (
            "mesh['a'=2,'b'=4] {'b':(1)2}",
            groups((0, 2), (1, 3), (4, 6), (5, 7)),
        ),
        (
            "mesh['a'=2,'b'=4] {'b':(2)2}",
            groups((0, 1), (2, 3), (4, 5), (6, 7)),
        ),
    ],
)
def test_every_syntax(text, expected):
    assert parse_groups(text, 8) == expected


def test_a_form_that_is_not_known_is_refused():
    with pytest.raises(InputError, match=r"replica_groups='<what>'"):
        parse_groups("<what>", 8)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_axes_of_every_product(count):
    sizes = {"data": 2, "fsdp": 3, "tensor": 4}
    ids = np.arange(24).reshape(2, 3, 4)
    for kept in itertools.combinations(range(3), count):
        rows = ids.transpose(*(k for k in range(3) if k not in kept), *kept)
        width = int(np.prod([ids.shape[k] for k in kept], dtype=int))
        found = groups(*rows.reshape(-1, width).tolist())
        assert axes_of_groups(found, sizes) == tuple(list(sizes)[k] for k in kept)


def test_an_axis_of_size_one_is_never_named():
    sizes = {"data": 1, "fsdp": 1, "tensor": 8}
    assert axes_of_groups(groups(range(8)), sizes) == ("tensor",)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (((0, 2), (1, 3), (4, 6), (5, 7)), ("tensor:(1)2",)),
        (((0, 1), (2, 3), (4, 5), (6, 7)), ("tensor:(2)2",)),
        (((0, 1, 4, 5), (2, 3, 6, 7)), ("data", "tensor:(2)2")),
        (((0, 3), (1, 2), (4, 7), (5, 6)), (UNNAMED,)),
        # Device 0's group is a half of an axis, but the others are not alike.
        (((0, 1), (2, 3), (4, 6), (5, 7)), (UNNAMED,)),
        (((1, 2), (3, 4)), (UNNAMED,)),
    ],
)
def test_parts_of_axes_and_what_is_no_product(rows, expected):
    assert axes_of_groups(groups(*rows), MESH) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{1,2},{2,3},{4,5},{5,6},{6,7}}", ("tensor",)),
        ("{{0,4},{4,0}}", ("data",)),
        ("{{0,0},{1,5}}", ("data",)),
        ("{{0,5}}", ("data", "tensor")),
        ("{{3,3}}", ()),
    ],
)
def test_axes_of_a_permutation(text, expected):
    assert axes_of_pairs(parse_pairs(text), MESH) == expected
