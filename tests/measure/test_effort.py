"""Timing, with a clock that is turned by hand."""

from __future__ import annotations

import dataclasses

import pytest

from autoshard.ir.errors import InputError
from autoshard.measure.effort import FULL, MAX_RUNS, QUICK, seconds_of_one


class Machine:
    """Runs take `launch + runs x each` seconds, the first one also `compile_`."""

    def __init__(self, launch, each, compile_=0.0, disturbed=()):
        self.now, self.counts = 0.0, []
        self.launch, self.each, self.compile_ = launch, each, compile_
        self.disturbed = dict(disturbed)

    def run(self, runs):
        if not self.counts:
            self.now += self.compile_
        self.now += self.launch + runs * self.each
        self.now += self.disturbed.get(len(self.counts), 0.0)
        self.counts.append(runs)

    def effort(self, **changes):
        changes = {"min_s": 1.0, "repeats": 5, **changes}
        return dataclasses.replace(FULL, clock=lambda: self.now, **changes)


@pytest.mark.parametrize("launch", [0.0, 0.25, 100.0])
@pytest.mark.parametrize("each", [0.001, 0.5, 3.0])
def test_neither_launch_nor_compilation_counts(launch, each):
    machine = Machine(launch, each, compile_=1000.0)
    got = seconds_of_one(machine.run, machine.effort(), "it")
    assert got == pytest.approx(each)


def test_runs_are_added_until_they_take_long_enough():
    machine = Machine(0.0, 1 / 1024)
    seconds_of_one(machine.run, machine.effort(), "it")
    # Once to compile; on by what is missing, at most eightfold; then pairs.
    assert machine.counts == [1, 1, 8, 64, 512, 1024] + 5 * [2048, 1024]


def test_one_disturbance_does_not_count():
    # Warm-up, one timing, then pairs: the third pair's longer run is held up.
    machine = Machine(0.0, 2.0, disturbed={2 + 4: 50.0})
    assert seconds_of_one(machine.run, machine.effort(), "it") == pytest.approx(2.0)


def test_a_clock_that_sees_nothing_is_an_error():
    machine = Machine(0.0, 0.0)
    with pytest.raises(InputError, match="time of a thing cannot be told"):
        seconds_of_one(machine.run, machine.effort(), "a thing")
    assert max(machine.counts) <= MAX_RUNS * 2**6


def test_quick_is_less_of_everything():
    for name in ("min_s", "repeats", "stream_bytes", "cpu_stream_bytes"):
        assert getattr(QUICK, name) < getattr(FULL, name)
    for name in ("matmul_sizes", "cpu_matmul_sizes", "cpu_message_bytes"):
        assert len(getattr(QUICK, name)) < len(getattr(FULL, name))
        assert max(getattr(QUICK, name)) <= max(getattr(FULL, name))
