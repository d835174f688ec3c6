"""The programs that are timed, each a loop on all devices at once.

All devices work at the same time, as in training: they share power, and virtual ones
the cores and the memory of their host. The count of runs is an argument of the compiled
program, so that it is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Run = Callable[[int], None]

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "permute")

DTYPES = {
    "f64": "float64",
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "f8": "float8_e4m3fn",
    "i8": "int8",
}
"""Dtypes of products by the names of a cluster file."""

Body = Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]


def _looped(
    devices: Sequence[Any], body: Body, parts: Sequence[Any], members: int = 1
) -> Run:
    """A program that runs `body(i, parts) -> parts` n times on each device.

    Args:
        devices: Where it runs.
        body: On one device; collectives go over the axis "group".
        parts: What one device starts with, NumPy arrays.
        members: Devices of one group.
    """
    mesh = Mesh(np.array(devices).reshape(-1, members), ("groups", "group"))
    everywhere = P(("groups", "group"))

    def on_one(runs: Any, *state: Any) -> tuple[Any, ...]:
        return lax.fori_loop(0, runs, body, state)

    # Partial sums and their copies need not be told apart here.
    mapped = jax.shard_map(
        on_one,
        mesh=mesh,
        in_specs=(P(), *(everywhere for _ in parts)),
        out_specs=tuple(everywhere for _ in parts),
        check_vma=False,
    )
    program = jax.jit(mapped, donate_argnums=tuple(range(1, len(parts) + 1)))
    split = NamedSharding(mesh, everywhere)
    state = tuple(
        jax.make_array_from_callback(
            (len(devices) * part.shape[0], *part.shape[1:]), split, lambda _, p=part: p
        )
        for part in parts
    )

    def run(count: int) -> None:
        nonlocal state
        state = program(np.int32(count), *state)
        jax.block_until_ready(state)

    return run


def matmul(devices: Sequence[Any], size: int, dtype: str) -> tuple[Run, float]:
    """Square products, each of the result of the one before.

    Args:
        devices: Where it runs.
        size: Side length.
        dtype: A name of `DTYPES`.

    Returns:
        The program, and FLOPs of one run on one device.
    """
    kind = jnp.dtype(DTYPES[dtype])
    # Random values, for zeros draw less power; a product keeps their size.
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, size, size), dtype=np.float32)
    if kind == jnp.int8:
        left, right = np.clip(values * 40, -127, 127).astype(np.int8)
    else:
        left = values[0].astype(kind)
        right = (values[1] / np.sqrt(size)).astype(kind)

    def body(_: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, w = state
        total = jnp.int32 if kind == jnp.int8 else None
        return jnp.matmul(x, w, preferred_element_type=total).astype(kind), w

    return _looped(devices, body, [left, right]), 2.0 * size**3


def stream(devices: Sequence[Any], bytes_: int, arrays: int) -> tuple[Run, float]:
    """`x = s x` (two passes over memory) or `x = s x + y` (three): copy and triad.

    Args:
        devices: Where it runs.
        bytes_: Of one array on one device.
        arrays: 1 for the copy, 2 for the triad.

    Returns:
        The program, and bytes that one run moves on one device.
    """
    ones = np.ones(max(bytes_ // 4, 1), np.float32)

    def body(i: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = state
        scaled = x * (1 - i.astype(jnp.float32) * 1e-9)  # not known to the compiler
        return (sum(others, scaled), *others)

    moved = (1 + arrays) * ones.nbytes
    return _looped(devices, body, [ones] * arrays), float(moved)


def collective(
    devices: Sequence[Any], kind: str, bytes_: int, members: int
) -> tuple[Run, int]:
    """One collective again and again, in all groups of neighbours at once.

    Args:
        devices: Where it runs.
        kind: One of `COLLECTIVES`.
        bytes_: Of the larger side on one device.
        members: Devices of a group; they divide the devices.

    Returns:
        The program, and the bytes that the larger side really has.
    """
    piece = max(bytes_ // 4 // members, 1)
    whole = np.zeros(piece * members, np.float32)
    part = whole[:piece]

    def body(i: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        (x,) = state
        if kind == "all_reduce":
            return (lax.psum(x, "group"),)
        if kind == "permute":
            ring = [(n, (n + 1) % members) for n in range(members)]
            return (lax.ppermute(x, "group", ring),)
        if kind == "all_gather":
            # A piece that changes: of its own piece no device would need the others.
            gathered = lax.all_gather(x, "group", tiled=True)
            return (lax.dynamic_slice(gathered, (i % members * piece,), (piece,)),)
        scattered = lax.psum_scatter(x, "group", tiled=True)
        return (lax.dynamic_update_slice(x, scattered, (i % members * piece,)),)

    start = part if kind == "all_gather" else whole
    return _looped(devices, body, [start], members), whole.nbytes
