"""Figures of merit against counting by hand."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.validation.metrics import GROUP_SIZE, GROUP_SPREAD, Errors, Fits, groups

times = st.floats(0.1, 100.0)
pairs = st.lists(st.tuples(times, times), min_size=1, max_size=30)


def sorted_at(values, share):
    """The value at a share of the way through the sorted ones, between neighbours."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@given(pairs)
def test_errors_by_hand(given_pairs):
    predicted, measured = zip(*given_pairs, strict=True)
    signed = [p / m - 1 for p, m in given_pairs]
    found = Errors.of(predicted, measured)
    assert found.rows == len(given_pairs)
    assert found.median == pytest.approx(sorted_at(map(abs, signed), 0.5))
    assert found.p90 == pytest.approx(sorted_at(map(abs, signed), 0.9))
    assert found.bias == pytest.approx(sorted_at(signed, 0.5), abs=1e-12)


def test_errors_of_nothing():
    found = Errors.of([], [])
    assert found.rows == 0
    assert all(math.isnan(x) for x in (found.median, found.p90, found.bias))


def tau_b(one, other):
    """Pairs in the same order less pairs in the other, over pairs that are not tied."""
    agree = tied_one = tied_other = 0
    for i, j in itertools.combinations(range(len(one)), 2):
        a, b = one[i] - one[j], other[i] - other[j]
        agree += (a * b > 0) - (a * b < 0)
        tied_one += a == 0
        tied_other += b == 0
    every = math.comb(len(one), 2)
    room = (every - tied_one) * (every - tied_other)
    return agree / math.sqrt(room) if room else 0.0


# Few values, so that many are tied.
few = st.integers(1, 6).map(float)


@given(st.lists(st.tuples(few, few), min_size=GROUP_SIZE, max_size=12))
def test_rank_and_regret_by_hand(plans):
    predicted, measured = zip(*plans, strict=True)
    found = groups([("a",)] * len(plans), predicted, measured)
    if max(measured) < min(measured) * (1 + GROUP_SPREAD):
        assert found == []
        return
    (group,) = found
    assert group.name == ("a",)
    assert group.plans == len(plans)
    assert group.kendall == pytest.approx(tau_b(predicted, measured))
    chosen = {m for p, m in plans if p == min(predicted)}
    fastest = min(measured)
    assert any(group.regret == pytest.approx(m / fastest - 1) for m in chosen)


def test_a_perfect_order_and_its_reverse():
    measured = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    names = [("a",)] * 6
    (same,) = groups(names, [10 * m for m in measured], measured)
    assert (same.kendall, same.regret) == (pytest.approx(1.0), 0.0)
    (reverse,) = groups(names, [-m for m in measured], measured)
    assert (reverse.kendall, reverse.regret) == (pytest.approx(-1.0), 5.0)


def test_plans_that_are_all_predicted_alike_are_not_ranked():
    (group,) = groups([("a",)] * 5, [1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert group.kendall == 0


def test_groups_that_are_too_small_or_too_even():
    names = [("small",)] * 4 + [("even",)] * 5 + [("good",)] * 5
    small, even = [1.0, 2.0, 3.0, 4.0], [1.0, 1.02, 1.04, 1.06, 1.09]
    measured = [*small, *even, 1.0, 1.02, 1.04, 1.06, 1.11]
    assert [g.name for g in groups(names, measured, measured)] == [("good",)]


@given(st.permutations(range(12)))
def test_the_order_of_rows_does_not_matter(order):
    names = [("a", 1)] * 5 + [("b", 2)] * 7
    predicted = [float((7 * i) % 12) + 1 for i in range(12)]
    measured = [float((5 * i) % 12) + 1 for i in range(12)]
    expected = groups(names, predicted, measured)
    assert len(expected) == 2
    shuffled = [[values[i] for i in order] for values in (names, predicted, measured)]
    found = groups(*shuffled)
    assert [g.name for g in found] == [g.name for g in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.kendall == pytest.approx(other.kendall)
        assert one.regret == other.regret


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20))
def test_recall_and_precision_by_counting(pairs_):
    hits = sum(said and failed for said, failed in pairs_)
    said = sum(said for said, _ in pairs_)
    failed = sum(failed for _, failed in pairs_)
    found = Fits.of([s for s, _ in pairs_], [f for _, f in pairs_])
    assert (found.failed, found.ran) == (failed, len(pairs_) - failed)
    for share, of in ((found.recall, failed), (found.precision, said)):
        assert share == hits / of if of else math.isnan(share)
    assert type(found.recall) is type(found.precision) is float
