"""What compilers say of memory, in numbers and in refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from autoshard.ir.errors import InputError
from autoshard.verify.aot import CompiledMemory, compile_for, read_refusal
from autoshard.verify.targets import Target, is_out_of_memory

HOST = Target("host", "host:1", None, 1)
GIB = 2**30


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
            "for HLO temporaries (52.98G) exceeds available HBM (31.25G).",
            52.98,
            31.25,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 34.06G of 15.75G hbm. Exceeded by 18.31G.\n\n"
            "Total hbm usage >= 34.31G:",
            34.06,
            15.75,
        ),
    ],
)
def test_sizes_of_a_refusal(message, needed, available):
    found = read_refusal(message)
    assert found.needed_bytes == pytest.approx(needed * GIB)
    assert found.available_bytes == pytest.approx(available * GIB)
    assert found.message.startswith("RESOURCE_EXHAUSTED")
    assert is_out_of_memory(RuntimeError(message))


def test_a_refusal_without_sizes_keeps_its_words():
    found = read_refusal("RESOURCE_EXHAUSTED: too much")
    assert found.needed_bytes is None
    assert found.message == "RESOURCE_EXHAUSTED: too much"


class Refuses:
    def __init__(self, message):
        self.message = message

    def compile(self, compiler_options):
        raise RuntimeError(self.message)


def test_a_program_too_large_is_a_verdict_and_any_other_failure_an_error():
    found = compile_for(Refuses("RESOURCE_EXHAUSTED: Used 2G of 1G hbm"), HOST)
    assert found.memory is None
    assert found.refused.needed_bytes == 2 * GIB
    with pytest.raises(InputError, match="INTERNAL: broken"):
        compile_for(Refuses("INTERNAL: broken"), HOST)


def test_memory_of_a_program():
    x = jax.ShapeDtypeStruct((256,), jnp.float32)
    found = compile_for(jax.jit(lambda x: x * 2, donate_argnums=0).lower(x), HOST)
    assert found.memory.argument_bytes == found.memory.output_bytes == 1024
    assert found.memory.alias_bytes == 1024
    assert found.memory.peak_bytes == 1024 + found.memory.temp_bytes
    assert "ENTRY" in found.text


def test_memory_is_affine():
    one, two = CompiledMemory(100, 90, 80, 50), CompiledMemory(110, 95, 80, 70)
    assert two.beyond(one, 3) == CompiledMemory(140, 110, 80, 130)
