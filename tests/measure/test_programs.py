"""The programs that are timed do what their name says, as often as they are told."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from autoshard.measure import programs

DEVICES = jax.devices("cpu")
OPS = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "permute": "collective-permute",
}


@pytest.fixture
def compiled(monkeypatch):
    """The optimized HLO of the next program that is made."""
    texts = []
    jit = jax.jit

    def spy(fn, **options):
        made = jit(fn, **options)

        def call(*args):
            texts.append(made.lower(*args).compile().as_text())
            return made(*args)

        return call

    monkeypatch.setattr(programs.jax, "jit", spy)
    return texts


@pytest.mark.parametrize("kind", programs.COLLECTIVES)
@pytest.mark.parametrize("members", [2, 8])
def test_a_collective_survives_the_compiler_once_a_run(compiled, kind, members):
    run, real = programs.collective(DEVICES, kind, 4096, members)
    run(3)
    [text] = compiled
    found = re.findall(r" = \S+ ([a-z-]+)\(", text)
    assert [op for op in found if op in OPS.values()] == [OPS[kind]]
    assert "while(" in text
    # In all groups at once; of a permute the pairs are printed.
    groups = [[n + k for k in range(members)] for n in range(0, 8, members)]
    if kind == "permute":
        for group in groups:
            assert f"{{{group[0]},{group[1]}}}" in text
    else:
        printed = ",".join("{" + ",".join(map(str, g)) + "}" for g in groups)
        rows = f"[{8 // members},{members}]<=[8]"
        assert f"replica_groups={{{printed}}}" in text or rows in text
    assert real == 4096


def test_a_buffer_that_does_not_divide_is_rounded_and_says_so():
    run, real = programs.collective(DEVICES[:3], "reduce_scatter", 4096, 3)
    assert real == 4096 // 12 * 12
    run(2)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "i8", "f8"])
def test_products_stay_finite_and_keep_their_size(dtype):
    kept = []
    looped = programs._looped

    def keep(devices, body, parts):
        kept.extend(parts)
        state = tuple(parts)
        for i in range(4):
            state = body(np.int32(i), state)
        kept.append(np.asarray(state[0], np.float32))
        return looped(devices, body, parts)

    programs._looped, restore = keep, looped
    try:
        run, flops = programs.matmul(DEVICES[:2], 32, dtype)
    finally:
        programs._looped = restore
    assert flops == 2 * 32**3
    last = kept[-1]
    assert np.isfinite(last).all()
    assert np.abs(last).max() > 0.01
    run(2)


@pytest.mark.parametrize(("arrays", "passes"), [(1, 2), (2, 3)])
def test_streams_count_what_they_read_and_write(arrays, passes):
    run, moved = programs.stream(DEVICES[:2], 4096, arrays)
    assert moved == passes * 4096
    run(2)
