"""The training loop: steps, metrics, checkpoints, and an orderly stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax

from autoshard.ir.errors import AutoshardError, InputError
from autoshard.train._output import MetricsFile, Reporter
from autoshard.train._signals import Agreement, LocalAgreement, StopRequest
from autoshard.train.checkpoint import Checkpoints

LOG_EVERY = 10
"""Steps per line of progress where there is no terminal."""


class Data(Protocol):
    """What the trainer asks of a data source; `ByteCorpus` is one.

    Attributes:
        fingerprint: Equal for equal data, so that a resume can refuse other data.
        tokens_per_step: Tokens of one global batch.
    """

    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def tokens_per_step(self) -> int: ...  # noqa: D102

    def device_batch(self, step: int, shardings: Any, /) -> Any:
        """The batch of a step, as global arrays of these shardings."""
        ...


class Step(Protocol):
    """What the trainer asks of a lowered step; see `autoshard.parallelize`."""

    plan: Any
    mesh: jax.sharding.Mesh

    @property
    def batch_shardings(self) -> Any: ...  # noqa: D102
    @property
    def abstract_state(self) -> Any: ...  # noqa: D102

    def init(self, seed: int, /) -> Any:
        """A fresh state on the devices."""
        ...

    def __call__(self, state: Any, batch: Any, /) -> tuple[Any, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a run did.

    Attributes:
        losses: Loss of each step of this run, the first being that of `first_step`.
        first_step: Steps that were already done when it began.
        last_step: Steps done when it ended.
        stopped_by_signal: The signal that ended it before its last step, or None.
        tokens_per_s: Over all steps of this run but the first, which compiles; None
            when there was no step.
        mfu: Model FLOPs utilisation over the same steps, a fraction of 1; None when
            there was no step or no peak was given.
    """

    losses: list[float]
    first_step: int
    last_step: int
    stopped_by_signal: int | None
    tokens_per_s: float | None
    mfu: float | None


class Trainer:
    """Runs a lowered step over data, and can be killed and resumed without a trace.

    A run that was interrupted and resumed gives bit by bit the state, and but for the
    times the metrics, of one that was not.

    Args:
        step: What `parallelize` returned.
        data: Any `Data`, such as `ByteCorpus`.
        steps: Steps of the whole run, those before a resume included.
        seed: Seed of the initial state.
        checkpoint_dir: Where to save; None saves nothing.
        checkpoint_every: Steps between checkpoints; the last step is always saved.
        resume: Go on from the newest checkpoint in `checkpoint_dir`, if there is one.
        metrics_path: A file that gets one JSON object per step.
        log: Takes lines of progress; None shows a bar on a terminal, or lines.
        keep: Checkpoints that stay, >= 2.
        peak_flops_per_s: Peak of all chips together in the dtype of the matmuls; None
            reports no utilisation.
        optimizer: Name of the optimizer and its settings, a part of the run's identity;
            taken from the plan when it says how the program was built.

    Raises:
        InputError: An argument is out of range, or `resume` without `checkpoint_dir`.

    >>> Trainer(None, None, steps=-1)
    Traceback (most recent call last):
    autoshard.ir.errors.InputError: steps=-1 was passed to Trainer; it must be >= 0.
    """

    def __init__(
        self,
        step: Step,
        data: Data,
        *,
        steps: int,
        seed: int = 0,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 50,
        resume: bool = False,
        metrics_path: str | Path | None = None,
        log: Callable[[str], None] | None = None,
        keep: int = 2,
        peak_flops_per_s: float | None = None,
        optimizer: str | None = None,
    ) -> None:
        for name, value, least in (
            ("steps", steps, 0),
            ("checkpoint_every", checkpoint_every, 1),
            ("keep", keep, 2),
        ):
            if value < least:
                raise InputError(
                    f"{name}={value} was passed to Trainer; it must be >= {least}."
                )
        if peak_flops_per_s is not None and not peak_flops_per_s > 0:
            raise InputError(
                f"peak_flops_per_s={peak_flops_per_s} was passed to Trainer; it must be "
                "> 0, or None for chips whose peak is not known."
            )
        if resume and checkpoint_dir is None:
            raise InputError(
                "resume was asked without a checkpoint directory; say where the run to "
                "go on with was saved."
            )
        self._step = step
        self._data = data
        self._steps = steps
        self._seed = seed
        self._directory = None if checkpoint_dir is None else Path(checkpoint_dir)
        self._every = checkpoint_every
        self._resume = resume
        self._metrics_path = None if metrics_path is None else Path(metrics_path)
        self._log = log
        self._keep = keep
        self._peak_flops_per_s = peak_flops_per_s
        self._optimizer = optimizer

    def run(self) -> TrainResult:
        """Trains to the last step, or until SIGINT or SIGTERM.

        The first signal lets the current step finish, saves, and returns; the second
        acts at once.

        Raises:
            CheckpointError: See `Checkpoints`.
            OutputError: The metrics file cannot be written.
            AutoshardError: The loss is not finite; nothing after the last checkpoint
                is saved.
        """
        with ExitStack() as stack:
            loop = _Loop(self, stack)
            return loop.run()

    def identity(self) -> dict[str, str | int]:
        """What a checkpoint directory must agree with to be resumed."""
        program = self._step.plan.program
        optimizer = self._optimizer
        if optimizer is None:
            model = program.model
            optimizer = (
                "of the program"
                if model is None
                else f"{model.optimizer}, learning rate {model.learning_rate}"
            )
        return {
            "program": program.fingerprint,
            "data": self._data.fingerprint,
            "optimizer": optimizer,
            "seed": self._seed,
        }


class _Loop:
    """The mutable part of one call of `Trainer.run`.

    One step is kept in flight: the metrics of a step are read only after the next one
    was dispatched, so that the devices never wait for the host.
    """

    def __init__(self, trainer: Trainer, stack: ExitStack) -> None:
        t = self._t = trainer
        self._leads = jax.process_index() == 0
        messages: list[str] = []  # until it is known where the bar begins
        self._checkpoints: Checkpoints | None = None
        restored = None
        if t._directory is not None:
            metrics = () if t._metrics_path is None else (t._metrics_path,)
            self._checkpoints = Checkpoints(
                t._directory,
                identity=t.identity(),
                plan=t._step.plan.model_dump(mode="json"),
                resume=t._resume,
                keep=t._keep,
                ignore=metrics,
                log=messages.append,
            )
            stack.callback(self._checkpoints.close)
            if t._resume:
                restored = self._checkpoints.restore(t._step.abstract_state)
                messages.append(
                    f"no checkpoint in {t._directory} yet; beginning at step 0"
                    if restored is None
                    else f"resumed {t._directory} at step {restored.step}"
                )
        self._first = self._done = 0 if restored is None else restored.step
        if self._first > t._steps:
            raise InputError(
                f"the checkpoint in {t._directory} is at step {self._first}, beyond the "
                f"steps={t._steps} that were asked; ask for more steps."
            )
        self._saved = None if restored is None else restored.step
        self._metrics: MetricsFile | None = None
        if self._leads and t._metrics_path is not None:
            self._metrics = MetricsFile(
                t._metrics_path, first_step=self._first, resume=t._resume
            )
            stack.callback(self._metrics.close)
        self._reporter = Reporter(
            total=t._steps,
            first=self._first,
            every=LOG_EVERY,
            log=t._log,
            quiet=not self._leads,
        )
        stack.callback(self._reporter.close)
        for message in messages:
            self._reporter.message(message)
        self._stop = stack.enter_context(StopRequest(self._stopping))
        self._agreement: Agreement | LocalAgreement = (
            LocalAgreement() if jax.process_count() == 1 else Agreement(t._step.mesh)
        )
        self._state = t._step.init(t._seed) if restored is None else restored.state
        self._losses: list[float] = []
        self._durations_s: list[float] = []
        self._signum = 0
        self._safe_to_save = True

    def run(self) -> TrainResult:
        t = self._t
        pending: tuple[int, Any, Any] | None = None
        self._clock_s = time.perf_counter()
        while self._done < t._steps and not self._signum:
            batch = t._data.device_batch(self._done, t._step.batch_shardings)
            flag = self._agreement.start(self._stop.signum)
            self._state, metrics = t._step(self._state, batch)
            dispatched = (self._done, metrics, flag)
            self._done += 1
            if pending is not None:
                self._report(*pending)
            pending = dispatched
            if self._done % t._every == 0 or self._done == t._steps or self._due:
                # A loss must be known to be finite before its state is saved.
                self._report(*pending)
                pending = None
                self._save()
        if pending is not None:
            self._report(*pending)
        if self._saved != self._done and self._done > self._first:
            self._save()
        if self._checkpoints is not None:
            self._checkpoints.wait()
        return self._result()

    @property
    def _due(self) -> bool:
        return not self._safe_to_save
