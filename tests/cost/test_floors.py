"""Bounds on what shows of collectives, against steps of every length."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from autoshard.cost import fitting, floors
from autoshard.cost.collectives import Meshes
from autoshard.cost.constants import Constants
from autoshard.cost.overlap import exposed_s, least_s
from autoshard.cost.pipeline import Pipeline, bubble_share
from autoshard.cost.segments import BLOCK
from autoshard.cost.stages import Parts, cut, sent_s, staged, waiting
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import cluster

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


# -- blocks of stages, against all ways to cut them -----------------------------------

BLOCKS = 6
STAGES = (2, 3, 4)


def cuts_of(blocks, stages):
    """All ways to spread blocks over stages, each with one at least."""
    ends = itertools.combinations(range(1, blocks), stages - 1)
    return [np.diff([0, *inner, blocks]).tolist() for inner in ends]


def of_stages(stages):
    """Candidates with so many stages each, and what the bounds read of a pricer."""
    sizes = np.ones((len(stages), len(AXES)), dtype=np.int64)
    sizes[:, AXES.index("stage")] = stages
    segments = SimpleNamespace(blocks=BLOCKS)
    work = SimpleNamespace(segments=segments)
    pricer = SimpleNamespace(work=work, constants=Constants.shipped())
    return pricer, Meshes(cluster("h100:8"), sizes)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2"])
@pytest.mark.parametrize("seed", range(5))
def test_stages_have_room_where_some_cut_of_them_fits(schedule, seed):
    rng = np.random.default_rng(seed)
    stages = rng.choice(STAGES, 60)
    pricer, meshes = of_stages(stages)
    pieces = rng.choice([1.0, 2.0, 8.0], 60)
    how = Pipeline(schedule)
    alive = rng.uniform(1, 3, (3, 60))
    held = rng.uniform(1, 3, (2, 60))
    held[0] = 0.0  # of what belongs to no block
    limit = rng.uniform(1, 4, 60)
    most = rng.integers(1, BLOCKS + 1, 60).astype(float)
    waits = fitting.waits(meshes, pieces, [how])
    given = pricer, meshes, waits, alive, held, limit
    found = fitting.room(*given), fitting.room(*given, most[None])
    wrong = 0
    for k, count in enumerate(stages):
        fits, soon = False, False
        for held_by in cuts_of(BLOCKS, count):
            # The stages between the ends hold what the first of them does.
            at = [0, *[1] * (count - 2), count - 1]
            waited = [waiting(how, *map(np.array, (a, count, pieces[k]))) for a in at]
            largest = max(
                own / BLOCKS * (held[1, k] + alive[1, k] + wait * alive[2, k])
                for own, wait in zip(held_by, waited, strict=True)
            )
            fits |= bool(largest <= limit[k])
            soon |= bool(largest <= limit[k] and max(held_by) <= most[k])
        assert found[0][k] >= fits
        assert found[1][k] >= soon
        wrong += int(found[0][k]) - fits
    assert 10 < found[0].sum() < 55
    # It lets through stages without any block, which no cut has, and little else.
    assert wrong <= 3


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1", "zb-h2"])
def test_no_stage_of_a_fast_step_has_more_than_the_most_blocks(schedule):
    rng = np.random.default_rng(0)
    stages = rng.choice(STAGES, 200)
    pricer, meshes = of_stages(stages)
    pieces = rng.choice([1.0, 4.0, 8.0], 200)
    how = Pipeline(schedule, 2 if schedule == "interleaved" else 1)
    of_blocks = rng.uniform(1, 2, 200)
    whole = of_blocks * rng.uniform(1, 1.5, 200)
    limit = whole * rng.uniform(0.3, 1.2, 200)
    most = fitting.most_blocks(
        pricer, meshes, pieces, how, np.stack([whole, of_blocks]), limit
    )
    zero_bubble = pricer.constants["pipeline.zero_bubble"]
    reached = 0
    for k, count in enumerate(stages):
        share = float(bubble_share(schedule, count, pieces[k], zero_bubble))
        wait = share / pieces[k] / how.virtual
        for own in range(1, BLOCKS + 1):
            slowest = own / BLOCKS * of_blocks[k]
            step_s = slowest + wait * (whole[k] - slowest)
            assert (own <= most[k]) == (step_s <= limit[k] * (1 + 1e-9)), own
            reached += own <= most[k]
    assert 100 < reached < 200 * BLOCKS


@pytest.mark.parametrize("kind", ["gpu", "tpu", "cpu"])
@pytest.mark.parametrize("vocab", ["ends", "spread"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "zb-h2"])
def test_no_step_in_stages_is_below_its_bound(schedule, vocab, kind):
    """Of any share of kernels, updates and collectives; some are almost at it."""
    rng = np.random.default_rng(0)
    count = 400
    stages, pieces = rng.choice(STAGES, count), rng.choice([1.0, 2.0, 8.0, 64.0], count)
    pricer, meshes = of_stages(stages)
    sent = rng.choice([0.0, 1e6, 1e9], count)
    pricer.apart = lambda *_: sent
    scale = rng.choice([0.0, 0.3, 1.0, 10.0], (4, 5, count))
    matmul, other, update, collective = rng.uniform(0, 1, (4, 5, count)) * scale
    matmul[BLOCK] += 1.0
    kinds = rng.dirichlet([0.5] * 3, count).T  # ahead, after, between
    sums = collective.sum(axis=0) * kinds
    work = (matmul + other + update).sum(axis=0)
    exposed = exposed_s(kind, pricer.constants, work, *sums)
    share = collective / np.maximum(collective.sum(axis=0), 1e-300)
    nothing = np.zeros(count)
    parts = Parts(matmul, other + update, update, collective, share * exposed, nothing)
    how = Pipeline(schedule, vocab=vocab)
    own = cut(how, BLOCKS, parts, stages.astype(float), pieces)
    hops = sent_s(how, meshes, pieces, sent, nothing, pricer.constants)
    time = staged(own, parts, meshes, pieces, hops, pricer.constants)
    step = time.matmul + time.other + time.shown + time.bubble + time.sent
    kernels = matmul + other
    between = exposed_s(kind, pricer.constants, nothing, nothing, nothing, sums[2])
    rest = kernels.sum(axis=0) + between
    whole = least_s(kind, pricer.constants, rest, *sums[:2])
    known = kernels + share * between
    found = floors.in_stages(pricer, meshes, pieces, whole, rest, known, [how])
    assert own.valid.all()
    assert (found <= step * (1 + 1e-9)).all()
    assert (found > 0.9 * step).any()
    # With the update known, all else is what is waited for.
    all_ = least_s(kind, pricer.constants, rest + update.sum(axis=0), *sums[:2])
    times = all_, all_ - update.sum(axis=0), known + update
    closer = floors.in_stages(pricer, meshes, pieces, *times, [how], update)
    assert (closer <= step * (1 + 1e-9)).all()
    assert np.mean(closer / step) > np.mean(found / step)
