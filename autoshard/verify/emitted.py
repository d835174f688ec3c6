"""Compiling a step and taking what the compiler emitted, before and after it optimizes.

XLA partitions a program early and optimizes afterwards: collectives are merged, moved
and rewritten. The module right after partitioning says what the partitioner wanted; the
one at the end says what runs.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax

from autoshard.ir.errors import InputError
from autoshard.verify.hlo import Emitted, collectives
from autoshard.verify.module import Module

_PARTITIONED = "*after_spmd-partitioning*.txt"
REMATERIALIZED = re.compile(r"[^\n]*[Ii]nvoluntary full rematerialization[^\n]*")
DUMPS: dict[str, Any] = {
    "xla_dump_hlo_pass_re": ".*partition.*",
    "xla_dump_hlo_as_text": True,
}
"""Options that make XLA write the module after partitioning, into `xla_dump_to`."""

_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Machine code is not looked at; these leave HLO passes as they are."""


@dataclass(frozen=True, slots=True)
class EmittedProgram:
    """What the compiler made of a program.

    Attributes:
        partitioned: Collectives right after SPMD partitioning.
        optimized: Collectives of the program that runs.
        rematerialized: XLA's warnings that it could not get from one sharding to
            another except by gathering a whole array on every device.
    """

    partitioned: tuple[Emitted, ...]
    optimized: tuple[Emitted, ...]
    rematerialized: tuple[str, ...]


def compile_and_read(lowered: Any, sizes: dict[str, int]) -> EmittedProgram:
    """Compiles a lowered program and reads its collectives.

    Args:
        lowered: From `jax.jit(...).lower(...)`, for devices that are there or for a
            topology.
        sizes: Size of each mesh axis in the order of the device layout.

    Returns:
        The collectives and the warnings.

    Raises:
        InputError: XLA wrote no module after partitioning.

    >>> lowered = jax.jit(lambda x: x + 1).lower(1.0)
    >>> compile_and_read(lowered, {"data": 1}).optimized
    ()
    """
    if prod(sizes.values()) == 1:
        return EmittedProgram((), (), ())
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") not in ("0", "1"):
        raise InputError(
            "TF_CPP_MIN_LOG_LEVEL hides the warnings of the compiler, which are held "
            "against the plan as well; unset it or set it to 1."
        )
    with tempfile.TemporaryDirectory(prefix="autoshard-") as folder:
        options: dict[str, Any] = {"xla_dump_to": folder, **DUMPS}
        with no_cache(), captured_stderr() as messages:
            compiled = lowered.compile(compiler_options=options | _FAST)
        text = partitioned_text(Path(folder), prod(sizes.values()))
    return EmittedProgram(
        partitioned=collectives(Module(text), sizes),
        optimized=collectives(Module(compiled.as_text()), sizes),
        rematerialized=tuple(REMATERIALIZED.findall("".join(messages))),
    )


def partitioned_text(folder: Path, num_devices: int) -> str:
    """The one module after partitioning among those that XLA dumped.

    Raises:
        InputError: There is none, or more than one.
    """
    dumped = sorted(folder.glob(_PARTITIONED))
    if len(dumped) != 1:
        raise InputError(
            f"XLA dumped {len(dumped)} modules after partitioning where one was "
            f"expected (jax {jax.__version__}, {num_devices} devices). Is the program "
            "jitted with shardings over all of them?"
        )
    return dumped[0].read_text()


@contextmanager
def no_cache() -> Iterator[None]:
    """A program from the persistent cache has gone through no passes here."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Collects what is written to standard error, C++ included; passes it on after."""
    messages: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            written = file.read()
            messages.append(written.decode(errors="replace"))
            os.write(2, written)
