"""Random programs over rules of every family: 300 here, 20,000 in `benchmarks`.

Half of those here take longer than is good before every change; `make full` has them.
"""

from __future__ import annotations

from collections import Counter

import pytest
from fuzz.check import check
from fuzz.describe import from_json, nodes_of, to_json
from fuzz.generate import FAMILIES, drawn
from fuzz.shrink import shrink

PARTS, EACH = 6, 50


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=pytest.mark.slow) if part >= PARTS / 2 else part
        for part in range(PARTS)
    ],
)
def test_sharded_equals_unsharded_and_propagation_keeps_its_laws(part):
    verdicts = check(drawn(part, EACH))
    for verdict in verdicts:
        if verdict.wrong:
            small = shrink(
                verdict.case,
                lambda case, kind=verdict.kind: check([case])[0].kind == kind,
                tries=150,
            )
            [again] = check([small])
            pytest.fail(
                "\n".join([*verdict.failures, "smaller:", *again.failures])
                + f"\n{to_json(small)}",
                pytrace=False,
            )
    judged = [v for v in verdicts if not v.defect]
    assert len(judged) >= 0.95 * EACH
    # The programs are worth the time: most are spread, and say what lies where.
    assert sum(v.moves > 0 for v in judged) > 0.4 * len(judged)
    assert sum(v.pins for v in judged) > len(judged)
    assert sum(v.noisy for v in judged) <= 0.02 * EACH


def test_programs_are_of_every_family_and_size():
    found = [case for part in range(PARTS) for case in drawn(part, EACH)]
    assert len(set(map(to_json, found))) == PARTS * EACH
    nodes = [nodes_of(case.body) for case in found]
    families = Counter(node.family for each in nodes for node in each)
    assert set(families) == set(FAMILIES)
    assert min(families.values()) >= 10, families
    lengths = [len(each) for each in nodes]
    assert min(lengths) >= 5
    assert max(lengths) > 30
    assert {len(case.mesh) for case in found} == {1, 2, 3}
    assert all(case.chips <= 8 for case in found)


def test_a_case_is_plain_json():
    for case in drawn(0, 10):
        assert from_json(to_json(case)) == case
