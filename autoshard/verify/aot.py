"""Compiling a step for devices that are not here, and what the compiler says of it."""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from autoshard.ir.errors import InputError
from autoshard.verify.emitted import (
    DUMPS,
    REMATERIALIZED,
    captured_stderr,
    no_cache,
    partitioned_text,
)
from autoshard.verify.targets import Target, is_out_of_memory

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZES = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE),
)


@dataclass(frozen=True, slots=True)
class CompiledMemory:
    """What the compiler allocates on one device.

    Attributes:
        argument_bytes: What goes in: state and batch.
        output_bytes: What comes out.
        alias_bytes: Of these, what takes the place of an argument.
        temp_bytes: Everything in between, at its peak.
        reported_bytes: The compiler's own figure of the peak; 0 where it gives none.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    reported_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """All of it at once.

        >>> CompiledMemory(8, 6, 4, 3).peak_bytes
        13
        """
        given = self.argument_bytes + self.output_bytes - self.alias_bytes
        return given + self.temp_bytes

    def as_reported(self) -> CompiledMemory:
        """The same with those temporaries that make up the reported peak.

        The TPU compiler counts in its temporaries some buffers that share memory, such
        as those of loops: two Llama 3 blocks on `v5e:8x8` have 17.9 GiB of them and
        compile for chips of 15.75 GiB. Its buffer assignment, 14.0 GiB there, agrees
        with the reported peak to 0.1 %, fragmentation included.

        >>> CompiledMemory(8, 6, 4, 30, 13).as_reported().temp_bytes
        3
        """
        given = self.argument_bytes + self.output_bytes - self.alias_bytes
        if not self.reported_bytes:
            return self
        return replace(self, temp_bytes=max(0, self.reported_bytes - given))

    def beyond(self, before: CompiledMemory, turns: int) -> CompiledMemory:
        """These figures, `turns` times as far again from those `before`.

        >>> CompiledMemory(8, 6, 4, 3).beyond(CompiledMemory(7, 6, 4, 3), 2)
        CompiledMemory(argument_bytes=10, output_bytes=6, alias_bytes=4, temp_bytes=3, \
reported_bytes=0)
        """
        names = [field.name for field in fields(self)]
        pairs = ((getattr(before, name), getattr(self, name)) for name in names)
        return CompiledMemory(
            *(max(0, two + turns * (two - one)) for one, two in pairs)
        )


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """A compiler's refusal.

    Attributes:
        message: Its words, the first lines of them.
        needed_bytes: What the program needs, where the message says it.
        available_bytes: What there is, where the message says it.
    """

    message: str
    needed_bytes: int | None
    available_bytes: int | None


@dataclass(frozen=True, slots=True)
class Compiled:
    """A program as it was compiled.

    Attributes:
        text: The scheduled HLO; empty where the compiler refused.
        partitioned: The HLO right after partitioning, where the compiler dumps it.
        memory: What it allocates, None where it refused.
        refused: Why it refused.
        rematerialized: XLA's warnings that it gathered a whole array for want of
            another way from one sharding to the next.
        compile_s: Seconds it took.
    """

    text: str
    partitioned: str
    memory: CompiledMemory | None
    refused: OutOfMemory | None
    rematerialized: tuple[str, ...]
    compile_s: float


def compile_for(lowered: Any, target: Target) -> Compiled:
    """Compiles a lowered program for a target.

    Args:
        lowered: From `jax.jit(...).lower(...)`, over the target's devices.
        target: What to compile for.

    Raises:
        InputError: The compiler fails for another reason than memory.

    >>> host = Target("host", "host:1", None, 1)
    >>> compile_for(jax.jit(lambda x: x + 1).lower(1.0), host).refused is None
    True
    """
    options = target.options
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="autoshard-") as folder:
        dumps = target.kind != "tpu" and target.num_chips > 1
        if dumps:
            options |= {"xla_dump_to": folder, **DUMPS}
        try:
            with no_cache(), captured_stderr() as messages:
                compiled = lowered.compile(compiler_options=options)
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise InputError(
                    f"the {target.kind} compiler cannot compile the step for "
                    f"{target.name} (jax {jax.__version__}): {_head(error)}"
                ) from error
            took_s = time.perf_counter() - start_s
            return Compiled("", "", None, read_refusal(str(error)), (), took_s)
        took_s = time.perf_counter() - start_s
        partitioned = partitioned_text(Path(folder), target.num_chips) if dumps else ""
    found = compiled.memory_analysis()
    memory = CompiledMemory(
        argument_bytes=found.argument_size_in_bytes,
        output_bytes=found.output_size_in_bytes,
        alias_bytes=found.alias_size_in_bytes,
        temp_bytes=found.temp_size_in_bytes,
        reported_bytes=getattr(found, "peak_memory_in_bytes", 0) or 0,
    )
    if target.kind == "tpu":
        memory = memory.as_reported()
    warned = tuple(REMATERIALIZED.findall("".join(messages)))
    return Compiled(compiled.as_text(), partitioned, memory, None, warned, took_s)


def read_refusal(message: str) -> OutOfMemory:
    """Takes a compiler's message about memory apart.

    >>> text = "Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm."
    >>> read_refusal(text).needed_bytes // 2**30
    20
    """
    needed = available = None
    for pattern in _SIZES:
        match = pattern.search(message)
        if match is not None:
            needed = round(float(match[1]) * _UNITS[match[2].upper()])
            available = round(float(match[3]) * _UNITS[match[4].upper()])
            break
    return OutOfMemory(_head(message), needed, available)


def _head(error: object) -> str:
    """The first lines of a message, which may go on with a table of all buffers."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:3])[:600]
