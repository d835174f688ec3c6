"""Stopping between steps: signals, and agreement of several processes on them."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `signum`.

    The second one acts as it would have acted without this. Outside the main thread,
    where Python does not let a program handle signals, nothing is changed.

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
        if threading.current_thread() is threading.main_thread():
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


class Agreement:
    """Lets all processes learn, at the same step, that one of them was asked to stop.

    If each stopped when its own signal came, one would wait for ever in a collective
    that the others never start. So every step carries the largest signal number of all
    processes, computed on the devices beside the step and read when its loss is read.

    Args:
        mesh: The mesh of the step; its first device per process is used.
    """

    def __init__(self, mesh: Mesh) -> None:
        first: dict[int, Any] = {}
        for device in mesh.devices.flat:
            first.setdefault(device.process_index, device)
        devices = np.array([first[process] for process in sorted(first)])
        line = Mesh(devices, ("process",), axis_types=(AxisType.Auto,))
        self._sharding = NamedSharding(line, PartitionSpec("process"))
        self._count = len(devices)
        whole = NamedSharding(line, PartitionSpec())
        self._largest = jax.jit(jnp.max, out_shardings=whole)

    def start(self, signum: int | None) -> Any:
        """Sends this process's signal; all processes call it at each step.

        Returns:
            An int32 scalar still being computed, 0 when nobody is to stop.
        """
        # int32 and 0, not int | None: this one travels through the devices.
        own = np.asarray([signum or 0], np.int32)
        sent = jax.make_array_from_callback(
            (self._count,), self._sharding, lambda _: own
        )
        return self._largest(sent)
