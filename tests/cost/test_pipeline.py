"""Balanced cuts against all cuts, schedules against a simulation task by task."""

import itertools

import numpy as np
import pytest

from autoshard.cost.pipeline import (
    balanced,
    blocks_of_stages,
    bubble_share,
    in_flight,
)

TIMES = (0.0, 0.4, 1.0, 1.7, 3.0)


@pytest.mark.parametrize("seed", range(40))
def test_balanced_cut_is_the_best_of_all_cuts(seed):
    rng = np.random.default_rng(seed)
    blocks = int(rng.integers(2, 10))
    stages = int(rng.integers(2, min(blocks, 5) + 1))
    block = float(rng.choice([1.0, 0.3 + rng.random()]))
    first, last = (float(t) for t in rng.choice(TIMES, 2))

    def slowest(counts):
        ends = [first, *[0.0] * (stages - 2), last]
        return max(n * block + end for n, end in zip(counts, ends, strict=True))

    every = itertools.product(range(1, blocks + 1), repeat=stages)
    best = min(slowest(counts) for counts in every if sum(counts) == blocks)
    one = np.ones(1)
    head, tail = balanced(
        blocks, np.array([stages]), block * one, first * one, last * one
    )
    found = blocks_of_stages(blocks, stages, int(head[0]), int(tail[0]))
    assert sum(found) == blocks
    assert min(found) >= 1
    assert slowest(found) == pytest.approx(best, rel=1e-8)


def test_balanced_cuts_are_found_for_many_at_once():
    rng = np.random.default_rng(0)
    stages = rng.integers(2, 9, 50)
    block, first, last = rng.random((3, 50)) + np.array([[0.1], [0.0], [0.0]])
    together = balanced(17, stages, block, first, last)
    for k in range(50):
        at = slice(k, k + 1)
        alone = balanced(17, stages[at], block[at], first[at], last[at])
        assert (together[0][k], together[1][k]) == (alone[0][0], alone[1][0])


@pytest.mark.parametrize(("blocks", "stages", "virtual"), [(7, 3, 1), (13, 3, 2)])
def test_parts_have_all_blocks_and_differ_by_one_at_most(blocks, stages, virtual):
    each = blocks // stages
    found = blocks_of_stages(blocks, stages, each, each, virtual)
    assert len(found) == stages * virtual
    assert sum(found) == blocks
    for at in range(stages):
        parts = found[at::stages]
        assert max(parts) - min(parts) <= 1


def one_after_another(stages, microbatches, forward, backward, order):
    """Ends and microbatches held, of stages that do their tasks in a given order."""
    done, clock = {}, [0.0] * stages
    queues, held, most = [order(s) for s in range(stages)], [0] * stages, [0] * stages
    while any(queues):
        progress = False
        for s in range(stages):
            if not queues[s]:
                continue
            kind, m = queues[s][0]
            needs = (kind, s - 1, m) if kind == "F" else (kind, s + 1, m)
            if kind == "B" and s == stages - 1:
                needs = ("F", s, m)
            ready = done.get(needs) if 0 <= needs[1] < stages else 0.0
            if ready is None:
                continue
            clock[s] = max(clock[s], ready) + (forward if kind == "F" else backward)
            done[kind, s, m] = clock[s]
            held[s] += 1 if kind == "F" else -1
            most[s] = max(most[s], held[s])
            queues[s].pop(0)
            progress = True
        assert progress, "deadlock"
    return max(clock), most


def tasks_of_1f1b(stages, microbatches):
    def order(stage):
        warm = min(stages - stage, microbatches)
        tasks = [("F", m) for m in range(warm)]
        for m in range(microbatches):
            tasks.append(("B", m))
            tasks += [("F", warm + m)] if warm + m < microbatches else []
        return tasks

    return order


def tasks_of_gpipe(stages, microbatches):
    every = range(microbatches)
    return lambda _: [*(("F", m) for m in every), *(("B", m) for m in reversed(every))]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 2), (4, 4), (4, 9), (8, 16)])
def test_bubble_and_memory_are_those_of_the_tasks(schedule, stages, microbatches):
    of = {"1f1b": tasks_of_1f1b, "gpipe": tasks_of_gpipe}[schedule]
    end, held = one_after_another(
        stages, microbatches, 1.0, 2.0, of(stages, microbatches)
    )
    share = float(bubble_share(schedule, float(stages), float(microbatches), 0.1))
    assert end == pytest.approx(3.0 * (microbatches + share * (stages - 1)))
    for at, most in enumerate(held):
        told = in_flight(schedule, float(stages), float(at), 1.0, float(microbatches))
        assert float(told) == most


def test_zero_bubble_schedules_wait_less_and_hold_more():
    share = {
        name: float(bubble_share(name, 8.0, 64.0, 0.1))
        for name in ("1f1b", "zb-h1", "zb-h2")
    }
    # ZB-H1 has a third of the bubble of 1F1B (Qi et al. 2024, table 1, with equal times
    # of forward, input and weight gradients).
    assert share["zb-h1"] == pytest.approx(share["1f1b"] / 3)
    assert share["zb-h2"] < share["zb-h1"]
    first = {
        name: float(in_flight(name, 8.0, 0.0, 1.0, 64.0))
        for name in ("1f1b", "zb-h1", "zb-h2")
    }
    assert first["zb-h1"] == first["1f1b"] == 8
    assert first["zb-h2"] == 16


def test_interleaving_divides_the_bubble_and_holds_more():
    # 1 + (p - 1) / (p v) times what 1F1B holds at the first stage (Narayanan et al.
    # 2021, section 2.2, and Korthikanti et al. 2022, section 4.2.3).
    held = float(in_flight("interleaved", 4.0, 0.0, 2.0, 64.0))
    assert held == pytest.approx(4 * (1 + 3 / (4 * 2)))
