"""Stopping between steps when a signal asks for it.

Several processes must stop at the same step, else one waits for ever in a collective
that the others never start. JAX's coordination service does that for SIGTERM: its own
handler takes the signal, and it names a step which no process has passed yet. So with
several processes no handler is installed here, and the service is asked at each step.
A collective of our own could not do it: the CPU's collectives of two computations in
flight may meet each other.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `signum`.

    The second one acts as it would have acted without this. Outside the main thread,
    where Python does not let a program handle signals, none is handled. With several
    processes only SIGTERM is, and its effect is seen by `asked_at`.

    Attributes:
        signum: The signal that asked to stop, or None.

    >>> with StopRequest() as request:
    ...     signal.raise_signal(signal.SIGTERM)
    >>> request.signum == signal.SIGTERM
    True
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and jax.process_count() == 1:
            for signum in STOPPING:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    def asked_at(self, step: int) -> bool:
        """Whether to stop instead of starting a step; alike on all processes.

        Args:
            step: Number of the step about to start; asked once for each, in order.
        """
        several = jax.process_count() > 1
        if several and multihost_utils.reached_preemption_sync_point(step):
            self.signum = signal.SIGTERM
        return self.signum is not None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            # No message from here: the signal may have come amid a write of one.
            self.signum = signum
            return
        self._give_back()
        signal.raise_signal(signum)

    def _give_back(self) -> None:
        for signum, handler in self._previous.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
