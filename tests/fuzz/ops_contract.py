"""Products: `dot_general` with batch dims, convolutions of every kind."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from fuzz.kit import MOST_ELEMENTS, Kit, Skip, draws, runs
from jax import lax


@draws("dot_general")
def _dot(kit: Kit) -> None:
    """Some dims are contracted, some are batch dims, wherever the sizes agree."""
    a = kit.floats(1, 4)
    if kit.flip(3):
        b = kit.floats(1, 4)
    else:
        kept = kit.some(range(a.rank), 1, 2)
        shape = [a.shape[d] for d in kept]
        shape.insert(kit.integer(0, len(shape)), kit.size())
        wanted = tuple(shape)
        try:
            b = kit.any(lambda v: v.dtype == "float32" and v.shape == wanted)
        except Skip:
            b = kit.new_input(wanted)
    free = set(range(b.rank))
    batch: list[list[int]] = [[], []]
    contract: list[list[int]] = [[], []]
    for i in kit.some(range(a.rank), 1):
        match = [j for j in sorted(free) if b.shape[j] == a.shape[i]]
        kind = kit.integer(0, 3)
        if not match or kind == 3:
            continue
        j = kit.pick(match)
        free.discard(j)
        pair = batch if kind == 2 else contract
        pair[0].append(i)
        pair[1].append(j)
    result = [a.shape[d] for d in batch[0]]
    result += [n for d, n in enumerate(a.shape) if d not in batch[0] + contract[0]]
    result += [n for d, n in enumerate(b.shape) if d not in batch[1] + contract[1]]
    if len(result) > 4:
        raise Skip
    depth = math.prod(a.shape[d] for d in contract[0])
    if math.prod(result) * depth > 8 * MOST_ELEMENTS:
        raise Skip
    kit.emit(
        "dot",
        [a, b],
        [tuple(result)],
        contract=contract,
        batch=batch,
        mag=0.8 * a.mag * b.mag * math.sqrt(depth),
    )


@runs
def _dot_run(
    a: jax.Array, b: jax.Array, *, contract: list[list[int]], batch: list[list[int]]
) -> jax.Array:
    return lax.dot_general(a, b, (contract, batch))


@draws("conv")
def _conv(kit: Kit) -> None:
    """Any float of three or four dims, its dims in any roles."""
    x = kit.floats(3, 4)
    spatial = x.rank - 2
    lhs = kit.some(range(x.rank), x.rank)
    batch, features = x.shape[lhs[0]], x.shape[lhs[1]]
    groups = kit.pick([g for g in (1, 1, 2, features) if features % g == 0])
    batch_groups = 1
    if groups == 1 and batch % 2 == 0 and kit.flip(6):
        batch_groups = 2
    made = kit.pick((2, 4, 8, 3, 1)) * max(groups, batch_groups)
    window = [kit.integer(1, 3) for _ in range(spatial)]
    rhs = kit.some(range(x.rank), x.rank)
    shape = [0] * x.rank
    for d, n in zip(rhs, (made, features // groups, *window), strict=True):
        shape[d] = n
    if math.prod(shape) > MOST_ELEMENTS:
        raise Skip
    wanted = tuple(shape)
    try:
        kernel = kit.any(lambda v: v.dtype == "float32" and v.shape == wanted)
    except Skip:
        kernel = kit.new_input(wanted)
    params: dict[str, Any] = {
        "strides": [kit.integer(1, 2) for _ in window],
        "padding": [[kit.integer(0, 2), kit.integer(0, 2)] for _ in window],
        "lhs_dilation": [2 if kit.flip(6) else 1 for _ in window],
        "rhs_dilation": [2 if kit.flip(6) else 1 for _ in window],
    }
    if kit.flip():  # the most common one
        params["strides"] = [1] * spatial
        params["padding"] = [[(w - 1) // 2, w // 2] for w in window]
        params["lhs_dilation"] = params["rhs_dilation"] = [1] * spatial
    out = []
    for k, w in enumerate(window):
        n = (x.shape[lhs[2 + k]] - 1) * params["lhs_dilation"][k] + 1
        n += sum(params["padding"][k]) - (w - 1) * params["rhs_dilation"][k] - 1
        out.append(n // params["strides"][k] + 1)
    if min(out) < 1:
        raise Skip
    order = kit.some(range(x.rank), x.rank)
    result = [0] * x.rank
    for d, n in zip(order, (batch // batch_groups, made, *out), strict=True):
        result[d] = n
    depth = features // groups * math.prod(window)
    if math.prod(result) * depth > 8 * MOST_ELEMENTS:
        raise Skip
    kit.emit(
        "conv",
        [x, kernel],
        [tuple(result)],
        lhs=lhs,
        rhs=rhs,
        out=order,
        groups=groups,
        batch_groups=batch_groups,
        mag=0.8 * x.mag * kernel.mag * math.sqrt(depth),
        **params,
    )


@runs
def _conv_run(x: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=params["strides"],
        padding=[tuple(p) for p in params["padding"]],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(
            tuple(params["lhs"]), tuple(params["rhs"]), tuple(params["out"])
        ),
        feature_group_count=params["groups"],
        batch_group_count=params["batch_groups"],
    )


@draws("dot_general")
def _ragged_dot(kit: Kit) -> None:
    """Rows in groups, each with a matrix of its own."""
    # JAX batches it over a leading dim alone, and has no second derivative of it.
    if kit.batched or kit.smooth > 1:
        raise Skip
    x = kit.floats(2, 2)
    rows, depth = x.shape
    groups = kit.pick((2, 4, 3))
    wanted = (groups, depth, kit.pick((8, 4, 3)))
    try:
        w = kit.any(lambda v: v.dtype == "float32" and v.shape == wanted)
    except Skip:
        w = kit.new_input(wanted)
    left, counts = rows, []
    for _ in range(groups - 1):
        counts.append(kit.integer(0, left))
        left -= counts[-1]
    kit.emit(
        "ragged_dot",
        [x, w],
        [(rows, wanted[2])],
        counts=[*counts, left],
        mag=0.8 * x.mag * w.mag * math.sqrt(depth),
    )


@runs
def _ragged_dot_run(x: jax.Array, w: jax.Array, *, counts: list[int]) -> jax.Array:
    return lax.ragged_dot(x, w, jnp.array(counts, jnp.int32))
