"""How much is measured, and how one thing is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from autoshard.ir.errors import InputError

MAX_RUNS = 1 << 20
TRIES = 5


@dataclass(frozen=True, slots=True)
class Effort:
    """What is measured and how long.

    Attributes:
        min_s: A program is repeated until it takes this long.
        repeats: Pairs of timings, of which the median counts.
        matmul_sizes: Side lengths of the square products on accelerators.
        cpu_matmul_sizes: The same on virtual devices, which share the cores of a host.
        stream_bytes: Bytes of one array that memory is streamed from, on accelerators.
        cpu_stream_bytes: The same on virtual devices; more than the caches hold.
        message_bytes: Bytes of the larger side of collectives on one device, on
            accelerators.
        cpu_message_bytes: The same on virtual devices.
        clock: Seconds from some moment on.

    >>> QUICK.repeats < FULL.repeats
    True
    """

    min_s: float
    repeats: int
    matmul_sizes: tuple[int, ...]
    cpu_matmul_sizes: tuple[int, ...]
    stream_bytes: int
    cpu_stream_bytes: int
    message_bytes: tuple[int, ...]
    cpu_message_bytes: tuple[int, ...]
    clock: Callable[[], float] = time.perf_counter


FULL = Effort(
    min_s=0.05,
    repeats=7,
    matmul_sizes=(2048, 4096, 8192, 16384),
    cpu_matmul_sizes=(256, 512, 1024),
    stream_bytes=1 << 30,
    cpu_stream_bytes=1 << 26,
    message_bytes=tuple(1 << n for n in range(14, 29, 2)),
    cpu_message_bytes=tuple(1 << n for n in range(12, 25, 3)),
)
"""What `autoshard calibrate` does."""

QUICK = Effort(
    min_s=0.01,
    repeats=3,
    matmul_sizes=(4096, 8192),
    cpu_matmul_sizes=(256, 512),
    stream_bytes=1 << 28,
    cpu_stream_bytes=1 << 24,
    message_bytes=tuple(1 << n for n in range(14, 25, 5)),
    cpu_message_bytes=tuple(1 << n for n in range(12, 21, 4)),
)
"""What `--quick` does."""


def seconds_of_one(run: Callable[[int], None], effort: Effort, what: str) -> float:
    """Seconds that one more run adds to a program, so that its launch does not count.

    The program is run once to compile it, and with more and more runs until it takes
    `min_s`. Then n and 2 n runs are timed in turns, and the median of the differences
    is taken: what is common to both drops out, and a disturbance hits one pair.

    Args:
        run: `run(n)` does it n times in one program, and returns when that is done.
        effort: How long, how often, and the clock.
        what: For the error.

    Returns:
        Seconds of one run.

    Raises:
        InputError: 2 n runs took no longer than n, however many.

    >>> import dataclasses
    >>> now = [0.0]
    >>> def run(n):  # 3 s of launch, 2 s each
    ...     now[0] += 3.0 + 2.0 * n
    >>> effort = dataclasses.replace(QUICK, clock=lambda: now[0])
    >>> seconds_of_one(run, effort, "an example")
    2.0
    """

    def timed(runs: int) -> float:
        start = effort.clock()
        run(runs)
        return effort.clock() - start

    run(1)
    runs, took = 1, timed(1)
    while took < effort.min_s and runs < MAX_RUNS:
        # Not much further than the time so far foretells: part of it was the launch.
        runs *= 2 if took <= 0 else min(max(round(effort.min_s / took), 2), 8)
        took = timed(runs)
    for _ in range(TRIES):
        found = statistics.median(
            timed(2 * runs) - timed(runs) for _ in range(effort.repeats)
        )
        if found > 0:
            return found / runs
        runs *= 2
    raise InputError(
        f"The time of {what} cannot be told: twice as many runs take no longer. Stop "
        "what else runs on this machine, and calibrate again."
    )
