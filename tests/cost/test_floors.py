"""Bounds on what shows of collectives, against steps of every length."""

from __future__ import annotations

import numpy as np
import pytest

from autoshard.cost.constants import Constants
from autoshard.cost.overlap import exposed_s, least_s

CASES = [(0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (1.5, 2.5), (3.0, 0.4), (0.3, 4.0)]


@pytest.mark.parametrize("kind", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(("ahead", "after"), CASES)
def test_the_least_of_a_step_is_that_of_all_longer_rests(kind, ahead, after):
    constants = Constants.shipped()
    none = np.zeros(1)
    # Far beyond where all that can be hidden is.
    longest = 30 * (1 + ahead + after)
    for rest in (0.0, 0.5, 1.0, 2.0, 5.0):
        work = np.linspace(rest, longest, 200_001)
        shown = exposed_s(
            kind, constants, work, none + ahead, none + after, np.zeros(len(work))
        )
        expected = float((work + shown).min())
        found = float(
            least_s(kind, constants, *(none + x for x in (rest, ahead, after)))[0]
        )
        assert found <= expected * (1 + 1e-12)
        # A bound that is not reached would be weaker than need be.
        assert found == pytest.approx(expected, abs=longest / 200_000)
