"""The training loop: steps, metrics, checkpoints, and an orderly stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax

from autoshard.ir.errors import AutoshardError, InputError
from autoshard.train._output import MetricsFile, Reporter
from autoshard.train._signals import StopRequest
from autoshard.train.checkpoint import Checkpoints, Restored

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

    def __call__(self, state: Any, batch: Any, /) -> tuple[Any, Any]:
        """The new state, and the metrics `loss` and `grad_norm`."""
        ...


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
                f"peak_flops_per_s={peak_flops_per_s} was passed to Trainer; it must "
                "be > 0, or None for chips whose peak is not known."
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
            plan = t._step.plan.model_dump(mode="json")
            self._checkpoints = Checkpoints(
                t._directory,
                identity=t.identity(),
                plan=plan,
                resume=t._resume,
                keep=t._keep,
                ignore=metrics,
                log=messages.append,
            )
            stack.callback(self._checkpoints.close)
            if t._resume:
                restored = self._checkpoints.restore(t._step.abstract_state)
                messages.append(_resumed(t._directory, restored, plan))
        self._first = self._done = 0 if restored is None else restored.step
        if self._first > t._steps:
            raise InputError(
                f"the checkpoint in {t._directory} is at step {self._first}, beyond "
                f"the steps={t._steps} that were asked; ask for more steps."
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
        self._stop = stack.enter_context(StopRequest())
        self._state = t._step.init(t._seed) if restored is None else restored.state
        self._losses: list[float] = []
        self._durations_s: list[float] = []
        self._clock_s = time.perf_counter()

    def run(self) -> TrainResult:
        t = self._t
        pending: tuple[int, Any] | None = None
        due = False
        while self._done < t._steps and not self._stop.asked_at(self._done):
            batch = t._data.device_batch(self._done, t._step.batch_shardings)
            self._state, metrics = t._step(self._state, batch)
            before, pending = pending, (self._done, metrics)
            self._done += 1
            if before is not None:
                self._report(*before)
            due = due or self._done % t._every == 0
            if due and self._checkpoints is not None:
                # The loss must be known to be finite before its state is saved.
                self._report(*pending)
                pending = None
                due = not self._save(self._checkpoints)
        if pending is not None:
            self._report(*pending)
        if self._checkpoints is not None:
            if self._saved != self._done and self._done > self._first:
                self._save(self._checkpoints)
            self._checkpoints.wait()
        stopped = self._stop.signum if self._done < t._steps else None
        if stopped is not None:
            name = signal.Signals(stopped).name
            kept = (
                "nothing was saved, as there is no checkpoint directory"
                if self._checkpoints is None
                else f"resume to go on from step {self._saved or 0}"
            )
            self._reporter.message(
                f"stopped by {name} after step {self._done}/{t._steps}; {kept}"
            )
        return self._result(stopped)

    def _report(self, index: int, metrics: Any) -> None:
        """Waits for one step and writes down what it gave."""
        loss, self._grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not math.isfinite(loss):
            kept = "No checkpoint was written"
            if self._saved is not None:
                kept = f"The last checkpoint is of step {self._saved}"
            raise AutoshardError(
                f"the loss of step {index} is {loss}, so training was stopped. {kept}. "
                "Lower the learning rate, clip the gradients, or look at the batch of "
                "that step."
            )
        now_s = time.perf_counter()
        step_s, self._clock_s = now_s - self._clock_s, now_s
        self._losses.append(loss)
        self._durations_s.append(step_s)
        tokens_per_s, mfu = self._rates(1, step_s)
        record = {
            "step": index,
            "loss": loss,
            "grad_norm": self._grad_norm if math.isfinite(self._grad_norm) else None,
            "tokens_per_s": tokens_per_s,
            "mfu": mfu,
            "step_s": step_s,
        }
        if self._metrics is not None:
            self._metrics.write(record)
        self._reporter.step(record)

    def _save(self, checkpoints: Checkpoints) -> bool:
        """Saves the state of the last step; whether it was fit to be saved."""
        if not math.isfinite(self._grad_norm):
            self._reporter.message(
                f"no checkpoint at step {self._done}: its gradient norm is "
                f"{self._grad_norm}, so its parameters may not be finite"
            )
            return False
        checkpoints.save(self._done, self._state)
        self._saved = self._done
        self._clock_s = time.perf_counter()  # a step's time is without the save's
        return True

    def _rates(self, steps: int, duration_s: float) -> tuple[float, float | None]:
        t = self._t
        tokens_per_s = steps * t._data.tokens_per_step / duration_s
        if t._peak_flops_per_s is None:
            return tokens_per_s, None
        flops = steps * t._step.plan.predicted.model_flops
        return tokens_per_s, flops / (duration_s * t._peak_flops_per_s)

    def _result(self, stopped: int | None) -> TrainResult:
        durations_s = self._durations_s[1:] or self._durations_s
        tokens_per_s = mfu = None
        if durations_s:
            tokens_per_s, mfu = self._rates(len(durations_s), sum(durations_s))
        return TrainResult(
            losses=self._losses,
            first_step=self._first,
            last_step=self._done,
            stopped_by_signal=stopped,
            tokens_per_s=tokens_per_s,
            mfu=mfu,
        )


def _resumed(directory: Path, restored: Restored | None, plan: Any) -> str:
    if restored is None:
        return f"no checkpoint in {directory} yet; beginning at step 0"
    text = f"resumed {directory} at step {restored.step}"
    if restored.plan != plan:
        text += " with another plan: losses go on as before only up to rounding"
    return text
