"""Training data that needs no download and no state: windows of a byte corpus.

Every batch is a pure function of (corpus, seed, step), so a resumed run reads what the
uninterrupted one would have read, and each process reads only the rows it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from autoshard.ir.errors import InputError

CORPUS_CAP_BYTES = 16 * 2**20
"""The built-in corpus stops after the file that reaches this many bytes."""

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_FIELDS = ("tokens", "targets")


class ByteCorpus:
    """Random windows of a text, one token per byte (vocabulary of 256).

    The default text is the source code of the Python standard library: it is on every
    machine, and a model that learns anything lowers its loss on it.

    Attributes:
        seq: Tokens per sequence.
        batch: Sequences per global batch.
        seed: Which windows are drawn.
        vocab: Number of distinct tokens, 256.

    Args:
        source: A text file, or None for the standard library.
        seq: Tokens per sequence, >= 1.
        batch: Sequences per global batch, >= 1.
        seed: Which windows are drawn.

    Raises:
        InputError: The file cannot be read, or is shorter than `seq + 1` bytes; or
            `seq` or `batch` is below 1.

    >>> corpus = ByteCorpus(seq=8, batch=4, seed=1)
    >>> batch = corpus.batch_at(0)
    >>> batch["tokens"].shape, batch["tokens"].dtype
    ((4, 8), dtype('int32'))
    >>> bool((batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all())
    True
    """

    vocab = 256

    def __init__(
        self,
        source: str | os.PathLike[str] | None = None,
        *,
        seq: int,
        batch: int,
        seed: int = 0,
    ) -> None:
        for name, value in (("seq", seq), ("batch", batch)):
            if value < 1:
                raise InputError(f"ByteCorpus got {name}={value}; it must be >= 1.")
        self.seq = seq
        self.batch = batch
        self.seed = seed
        self._text = _standard_library() if source is None else _file(Path(source))
        what = "the standard library" if source is None else f"data file {source}"
        if len(self._text) < seq + 1:
            raise InputError(
                f"{what} has {len(self._text)} bytes; one sequence of seq={seq} needs "
                f"{seq + 1} (its last target is one byte further). Give a longer text, "
                "or a smaller seq."
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch."""
        return self.batch * self.seq

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the text, `seq`, `batch` and `seed`: equal means same data."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        text = hashlib.sha256(self._text.data).hexdigest()
        parts = {"text": text, "seq": self.seq, "batch": self.batch, "seed": self.seed}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def batch_at(self, step: int) -> dict[str, np.ndarray]:
        """The global batch of a step.

        Returns:
            `tokens` and `targets`, int32 [batch, seq]; a target is the next token.
        """
        return self._rows(step, np.arange(self.batch))

    def local_batch_at(
        self, step: int, process_index: int, process_count: int
    ) -> dict[str, np.ndarray]:
        """The contiguous share of a step's batch that one of several processes reads.

        Returns:
            `tokens` and `targets`, int32 [batch / process_count, seq].

        Raises:
            InputError: `process_count` does not divide the batch, or there is no
                process `process_index`.
        """
        if process_count < 1 or self.batch % process_count:
            raise InputError(
                f"a batch of {self.batch} sequences cannot be split over "
                f"{process_count} processes; choose a batch that is a multiple of it."
            )
        if not 0 <= process_index < process_count:
            raise InputError(
                f"process_index={process_index} is not in 0..{process_count - 1}."
            )
        rows = self.batch // process_count
        return self._rows(step, np.arange(rows) + process_index * rows)

    def device_batch(
        self, step: int, shardings: Mapping[str, jax.sharding.Sharding]
    ) -> dict[str, jax.Array]:
        """The global batch of a step on the devices; only local rows are read.

        Args:
            step: Number of the step.
            shardings: Sharding of `tokens` and of `targets`.

        Returns:
            `tokens` and `targets`, int32 [batch, seq], global arrays.

        Raises:
            InputError: `shardings` is not of exactly these two leaves.
        """
        if not isinstance(shardings, Mapping) or set(shardings) != set(_FIELDS):
            got = sorted(shardings) if isinstance(shardings, Mapping) else shardings
            raise InputError(
                "a byte corpus makes batches {'tokens', 'targets'}, but the step takes "
                f"{got}; give the trainer a data source with the leaves of the step."
            )

        def read(field: str, index: Any) -> np.ndarray:
            rows = np.arange(self.batch)[index[0]]
            return self._rows(step, rows)[field][:, index[1]]

        shape = (self.batch, self.seq)
        return {
            field: jax.make_array_from_callback(
                shape, shardings[field], lambda index, field=field: read(field, index)
            )
            for field in _FIELDS
        }

    def _rows(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        count = np.uint64(len(self._text) - self.seq)
        # Counter-based: a row's window depends on no other row, so any subset can be
        # read alone. The bias of the remainder is below len(text) / 2**64.
        key = _mix(_mix(np.uint64(self.seed % 2**64)) ^ np.uint64(step))
        starts = (_mix(key ^ rows.astype(np.uint64)) % count).astype(np.int64)
        windows = self._text[starts[:, None] + np.arange(self.seq + 1)]
        windows = windows.astype(np.int32)
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


def _mix(x: Any) -> Any:
    """The SplitMix64 output function, a bijection of uint64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _file(path: Path) -> np.ndarray:
    try:
        if path.stat().st_size == 0:
            raise InputError(
                f"data file {path} is empty; give a text file, or no file for the "
                "built-in corpus."
            )
        # Mapped, not read: a corpus may be larger than the memory of the host.
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise InputError(
            f"data file {path} cannot be read: {error.strerror}. Give the path of a "
            "text file, or no file for the built-in corpus."
        ) from None


def _standard_library() -> np.ndarray:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    )
    pieces: list[bytes] = []
    total_bytes = 0
    for name in names:
        try:
            pieces.append((root / name).read_bytes())
        except OSError as error:
            # Skipping it would silently make another corpus than on the next machine.
            raise InputError(
                f"{root / name}, part of the built-in corpus, cannot be read: "
                f"{error.strerror}. Give a text file as the data instead."
            ) from None
        total_bytes += len(pieces[-1])
        if total_bytes >= CORPUS_CAP_BYTES:
            break
    if not total_bytes:
        raise InputError(
            f"the built-in corpus is the *.py files of {root}, and there are none "
            "(some Python distributions ship them compiled). Give a text file as the "
            "data instead."
        )
    return np.frombuffer(b"".join(pieces), dtype=np.uint8)
