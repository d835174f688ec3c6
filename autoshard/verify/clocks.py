"""How long the compiler itself thinks that a program takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from autoshard.verify.flow import KINDS
from autoshard.verify.module import Instruction, Module

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN_CYCLES = 2**62
"""Above this it is a sentinel."""
_SOL_US = re.compile(r'"exec_time_us":([\d.eE+\-]+)[^{}]*"name":"sol"')
_COSTLY = ("convolution", "custom-call", "dot", "fusion")


@dataclass(frozen=True, slots=True)
class CompilerTime:
    """A compiler's estimate of one run of a program.

    Attributes:
        compute_s: Of all that is not a collective.
        collective_s: Of collectives, none of them overlapped; None where the compiler
            estimates none.
        unknown: Ops that do work and that it gives no time for.
    """

    compute_s: float
    collective_s: float | None
    unknown: int


def tpu_time(module: Module, clock_hz: float) -> CompilerTime:
    """Sums the cycles that the TPU compiler notes on its ops; collectives have none.

    Args:
        module: The scheduled program.
        clock_hz: Of the chip.

    >>> module = Module('''HloModule m
    ...
    ... ENTRY %main (p: f32[8]) -> f32[8] {
    ...   %p = f32[8]{0} parameter(0)
    ...   ROOT %n = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"3000"}
    ... }
    ... ''')
    >>> tpu_time(module, 1.5e9).compute_s
    2e-06
    """
    cycles, unknown = 0, 0
    for instruction, runs in _runs(module, module.entry, 1):
        if _is_collective(instruction):
            continue
        found = cycles_of(instruction)
        if found is not None:
            cycles += found * runs
        elif instruction.opcode in _COSTLY and "Collective" not in instruction.name:
            unknown += _is_work(instruction)
    return CompilerTime(cycles / clock_hz, None, unknown)


def cycles_of(instruction: Instruction) -> int | None:
    """Cycles that the TPU compiler notes on one op; None for none and for collectives.

    >>> note = 'backend_config={"estimated_cycles":"3000"}'
    >>> cycles_of(Instruction("n", (("f32", (8,)),), "negate", ("p",), note, True))
    3000
    """
    found = _CYCLES.search(instruction.attributes)
    if found is None or _is_collective(instruction):
        return None
    return int(found[1]) if int(found[1]) < _UNKNOWN_CYCLES else None


def gpu_time(module: Module) -> CompilerTime:
    """Sums the speed-of-light times that XLA notes on its ops for GPUs."""
    compute_s = collective_s = 0.0
    unknown = 0
    for instruction, runs in _runs(module, module.entry, 1):
        found = _SOL_US.search(instruction.attributes)
        if found is None:
            unknown += instruction.opcode in _COSTLY and _is_work(instruction)
        elif _is_collective(instruction):
            collective_s += float(found[1]) * 1e-6 * runs
        else:
            compute_s += float(found[1]) * 1e-6 * runs
    return CompilerTime(compute_s, collective_s, unknown)


def _runs(module: Module, name: str, runs: int) -> Iterator[tuple[Instruction, int]]:
    """Every op that runs on its own, and how often; a branch as if it were taken."""
    computation = module.computations[name]
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            turns = module.trips(instruction, computation) or 1
            body = instruction.attribute("body").lstrip("%")
            yield from _runs(module, body, runs * turns)
        elif instruction.opcode in ("call", "conditional"):
            for called in instruction.called:
                yield from _runs(module, called, runs)
        elif not instruction.opcode.endswith("-done"):
            yield instruction, runs


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in KINDS


def _is_work(instruction: Instruction) -> bool:
    """Whether an op without a time can take any: some custom calls only mark values."""
    return not re.search(
        r'custom_call_target="(AllocateBuffer|Sharding|AsyncCollective\w+|'
        r"annotate_device_placement|ConsumeBuffer|xla\.)",
        instruction.attributes,
    )
