"""Checkpoints that are verified when they are read, and refuse to mix two runs.

Orbax writes them: asynchronously, a step appearing only when it is complete. Orbax does
not check the data it reads, so every leaf's checksum (see `autoshard.train.checksum`)
is saved beside it and compared after a restore, whatever mesh it is restored onto.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from autoshard.ir.errors import CheckpointError, OutputError
from autoshard.train._output import log_to_stderr
from autoshard.train.checksum import leaves_by_path, tree_checksums

_STEP_MARK = "_CHECKPOINT_METADATA"
_TEMPORARY = ".orbax-checkpoint-tmp"
_ASIDE = "damaged-"


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    Attributes:
        step: Updates made before it was saved.
        state: The state, sharded as asked.
        plan: The plan of the run that saved it, as a JSON document.
    """

    step: int
    state: Any
    plan: Any


class Checkpoints:
    """The checkpoints of one run, in one directory.

    Args:
        directory: Made when missing. With several processes, the same file system.
        identity: What makes this run this run (program, data, optimizer, seed); a
            directory with checkpoints of another identity is refused. The plan is no
            part of it: a run may go on with another plan on another mesh.
        plan: JSON document saved with each checkpoint.
        resume: Whether existing checkpoints may be continued.
        keep: How many checkpoints stay; at least 2, so that damage to the newest one
            costs `checkpoint_every` steps and not the run.
        ignore: Files that may lie in the directory though they are no checkpoint.
        log: Takes a line when a damaged checkpoint is passed over.

    Raises:
        CheckpointError: The directory holds another run, or this one and `resume` is
            false, or files that are no checkpoints.
        OutputError: The directory cannot be made or is a file.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> state = {"w": jnp.arange(4.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = Checkpoints(folder, identity={"seed": 0}, plan={})
    ...     run.save(3, state)
    ...     run.close()
    ...     run = Checkpoints(folder, identity={"seed": 0}, plan={}, resume=True)
    ...     restored = run.restore(jax.eval_shape(lambda: state))
    ...     run.close()
    >>> restored.step, restored.state["w"].tolist()
    (3, [0.0, 1.0, 2.0, 3.0])
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        identity: Mapping[str, str | int],
        plan: Any,
        resume: bool = False,
        keep: int = 2,
        ignore: tuple[Path, ...] = (),
        log: Callable[[str], None] | None = None,
    ) -> None:
        if keep < 2:
            raise CheckpointError(
                f"keep={keep} checkpoints was asked; at least 2 are needed, so that a "
                "damaged one can be passed over."
            )
        if "://" in str(directory):
            raise CheckpointError(
                f"checkpoint directory {directory} is a URL; only mounted file systems "
                "are supported. Mount the bucket and give its path."
            )
        self.directory = Path(directory).absolute()
        self.log = log or log_to_stderr
        self._identity = dict(identity)
        # As it will be read back, lists for tuples, so that the digest agrees.
        self._plan = json.loads(json.dumps(plan))
        steps = _completed_steps(self.directory, ignore)
        if steps:
            self._check_identity(steps)
            if not resume:
                raise CheckpointError(
                    f"checkpoint directory {directory} already holds this run, up to "
                    f"step {steps[-1]}. Pass --resume (resume=True) to go on from "
                    "there, or choose another directory."
                )

        # Imported here: planning a program must not pay for it.
        import orbax.checkpoint as ocp

        self._args: Any = ocp.args
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=True, cleanup_tmp_directories=True
                ),
            )
        except OSError as error:
            raise OutputError(
                f"checkpoint directory {directory} cannot be made: {error.strerror}."
            ) from error

    def steps(self) -> list[int]:
        """Completed checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any) -> None:
        """Saves a state; returns once the devices may overwrite it.

        The data reaches the disk in the background; `wait` or `close` say when.

        Args:
            step: Updates made, the checkpoint's name.
            state: A pytree of arrays.

        Raises:
            CheckpointError: The save, or the one before it, could not be written.
        """
        leaves = leaves_by_path(state)
        record = {
            "schema_version": 1,
            "step": step,
            "identity": self._identity,
            "plan": self._plan,
            "checksums": tree_checksums(state),
        }
        record["digest"] = _digest(record)
        try:
            self._manager.save(
                step,
                args=self._args.Composite(
                    state=self._args.StandardSave(leaves),
                    run=self._args.JsonSave(record),
                ),
                force=True,
            )
        except Exception as error:
            raise self._unwritten(error) from error

    def restore(self, abstract_state: Any) -> Restored | None:
        """Restores the newest checkpoint whose data is undamaged.

        A damaged one is passed over, which is logged, and moved aside to
        `damaged-STEP`, since the run will come to that step again.

        Args:
            abstract_state: Pytree of `jax.ShapeDtypeStruct` with the shardings to
                restore to; they need not be those the state was saved with.

        Returns:
            The checkpoint, or None when there is none yet.

        Raises:
            CheckpointError: There are checkpoints, and all are damaged.
        """
        failures: dict[int, str] = {}
        for step in reversed(self.steps()):
            restored, reason = self._restore_step(step, abstract_state)
            if _any_process(restored is None):
                failures[step] = reason or "another process could not read it"
                continue
            for bad, why in failures.items():
                self.log(
                    f"checkpoint {self.directory / str(bad)} is damaged ({why}); going "
                    f"on from step {step}. Its files are kept in {_ASIDE}{bad}."
                )
            self._move_aside(list(failures))
            return restored
        if failures:
            lines = "".join(f"\n  step {s}: {why}" for s, why in failures.items())
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be restored:{lines}\n"
                "Restore the directory from a backup, or choose another one to start "
                "again from step 0."
            )
        return None

    def wait(self) -> None:
        """Returns when every save is complete on disk; raises as `save`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Waits for saves in progress and lets go of the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _restore_step(
        self, step: int, abstract_state: Any
    ) -> tuple[Restored | None, str]:
        try:
            record = _read_record(self.directory / str(step))
            targets = leaves_by_path(abstract_state)
            state = self._manager.restore(
                step,
                args=self._args.Composite(state=self._args.StandardRestore(targets)),
            )["state"]
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # the fault of this machine, not of the data
        except Exception as error:
            # Orbax has no class of its own for unreadable data, and for some of it
            # raises `Exception` itself, from the error that tells.
            text = str(error.__cause__ or error).strip() or type(error).__name__
            return None, text.splitlines()[0][:300]
        structure = jax.tree.structure(abstract_state)
        state = jax.tree.unflatten(structure, [state[path] for path in targets])
        found, saved = tree_checksums(state), record["checksums"]
        wrong = [path for path in found if found[path] != saved.get(path)]
        if wrong:
            more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
            return None, f"the data of {wrong[0]}{more} does not match its checksum"
        return Restored(step, state, record["plan"]), ""

    def _check_identity(self, steps: list[int]) -> None:
        for step in reversed(steps):
            try:
                record = _read_record(self.directory / str(step))
            except (OSError, ValueError):
                continue  # restore reports it
            saved = record["identity"]
            lines = [
                f"  {key}: it has {saved.get(key, 'none')}, "
                f"this run {self._identity.get(key, 'none')}"
                for key in sorted({*saved, *self._identity})
                if saved.get(key) != self._identity.get(key)
            ]
            if lines:
                raise CheckpointError(
                    f"checkpoint directory {self.directory} holds another run (step "
                    f"{step}):\n" + "\n".join(lines) + "\n"
                    "Choose another directory, or start with what it was made with."
                )
            return

    def _move_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self.directory / f"{_ASIDE}{step}"
                number = 1
                while target.exists():
                    target = self.directory / f"{_ASIDE}{step}.{number}"
                    number += 1
                (self.directory / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("autoshard: damaged steps moved aside")
        self._manager.reload()

    def _unwritten(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"a checkpoint could not be written to {self.directory}: {error} Check the "
            "space and the permissions there; completed checkpoints are unharmed."
        )


def _completed_steps(directory: Path, ignore: tuple[Path, ...]) -> list[int]:
    try:
        entries = sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise OutputError(
            f"checkpoint directory {directory} is a file; choose another path."
        ) from None
    except OSError as error:
        raise OutputError(
            f"checkpoint directory {directory} cannot be read: {error.strerror}."
        ) from error
    steps = sorted(
        int(entry.name)
        for entry in entries
        if entry.name.isdecimal() and (entry / _STEP_MARK).exists()
    )
    ignored = {path.absolute() for path in ignore}
    foreign = [
        entry.name
        for entry in entries
        if _TEMPORARY not in entry.name and entry not in ignored
    ]
    if foreign and not steps:
        shown = ", ".join(foreign[:3]) + (", ..." if foreign[3:] else "")
        raise CheckpointError(
            f"checkpoint directory {directory} is not empty and holds no checkpoint "
            f"(it has {shown}). Choose a new or an empty directory."
        )
    return steps


def _read_record(folder: Path) -> Any:
    """What `save` wrote beside the state; `ValueError` when it is damaged."""
    file = folder / "run" / "metadata"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON") from error
    if not isinstance(record, dict) or record.pop("digest", "") != _digest(record):
        raise ValueError(f"{file} does not match its digest")
    return record


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _any_process(flag: bool) -> bool:
    """Whether the flag is set on some process; all of them get the same answer."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
