"""Ops that a plan runs in another way than they are written.

Products whose partial sums are added before they are reduced keep them apart along a
leading dim, sharded over the pending axes: the additions then move nothing, and the sum
over that dim is the one reduction. A call that the partitioner cannot look into runs
under `shard_map`, each device on its part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from autoshard.ir import _jaxcompat
from autoshard.ir.mesh import Spec
from autoshard.lower.pins import pin_name, pinned
from autoshard.plan.records import DelayedSum, Root
from autoshard.plan.schema import Plan
from autoshard.rules.foreign import call_on_parts

Run = Callable[[str, Any, list[Any]], list[Any] | None]


def special_ops(plan: Plan, mesh: Mesh) -> Run:
    """What `ir.interpret.evaluate` asks before it evaluates an equation as it is.

    Args:
        plan: Says which ops.
        mesh: The plan's mesh over devices.

    Returns:
        `(address, equation, operands) -> results`, or None for an ordinary op.
    """
    handlers: dict[str, Callable[[Any, list[Any]], list[Any]]] = {}
    slots: dict[str, dict[str, Spec]] = {}
    for constraint in plan.constraints:
        slots.setdefault(constraint.address, {})[constraint.slot] = constraint.spec
    for address, specs in slots.items():
        if any(slot.startswith("sum") for slot in specs):
            handlers[address] = partial(_lookup, address, specs, mesh)
    for sum_ in plan.delayed:
        for root, spec in zip(sum_.roots, sum_.specs, strict=True):
            handlers[root.address] = partial(_product, sum_, root, spec, mesh)
        for address in sum_.carriers:
            handlers[address] = _carry
        last = sum_.carriers[-1]
        end = slots.get(last, {}).get("out0")
        handlers[last] = partial(
            _reduce, end and NamedSharding(mesh, end.to_partition_spec())
        )

    def run(address: str, eqn: Any, values: list[Any]) -> list[Any] | None:
        handler = handlers.get(address)
        if handler is not None:
            return handler(eqn, values)
        if address in slots and "each0" in slots[address]:
            return _on_each_device(slots[address], mesh, eqn, values)
        return None

    return run


def _split(x: jax.Array, dim: int, ways: int) -> jax.Array:
    shape = (*x.shape[:dim], ways, x.shape[dim] // ways, *x.shape[dim + 1 :])
    return x.reshape(shape)


def _product(
    sum_: DelayedSum, root: Root, spec: Spec, mesh: Mesh, eqn: Any, values: list[Any]
) -> list[Any]:
    """A `dot_general` with its partial sums apart along a new leading dim."""
    ways = prod(mesh.shape[a] for a in sum_.axes)
    (contracted, batch) = eqn.params["dimension_numbers"]
    operands: list[jax.Array] = []
    dims_out: list[tuple[int, ...]] = []
    batch_out: list[tuple[int, ...]] = []
    for x, dims, batch_dims in zip(values, contracted, batch, strict=True):
        at = dims[root.contraction]
        operands.append(_split(x, at, ways))
        # The pieces lie at `at`, what is left of the dim behind them.
        dims_out.append(tuple(d + (d >= at) for d in dims))
        batch_out.append((at, *(d + (d > at) for d in batch_dims)))
    left, right = operands
    out = jax.lax.dot_general(
        left,
        right,
        ((dims_out[0], dims_out[1]), (batch_out[0], batch_out[1])),
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    inner = spec.to_partition_spec()
    pinned = NamedSharding(mesh, PartitionSpec(sum_.axes, *inner))
    return [_Partial(jax.lax.with_sharding_constraint(out, pinned))]


@dataclass(frozen=True)
class _Partial:
    """A sum of which the partial sums are apart, and what is to be added to it."""

    parts: jax.Array
    whole: jax.Array | None = None


def _carry(eqn: Any, values: list[Any]) -> list[Any]:
    """An op on partial sums."""
    partial_ = [v for v in values if isinstance(v, _Partial)]
    wholes = [v if isinstance(v, jax.Array) else v.whole for v in values]
    wholes = [w for w in wholes if w is not None]
    parts = partial_[0].parts
    if len(partial_) == len(values):
        (parts,) = jax.vmap(lambda *xs: tuple(_jaxcompat.eval_equation(eqn, list(xs))))(
            *(v.parts for v in partial_)
        )
    return [_Partial(parts, functools.reduce(jnp.add, wholes) if wholes else None)]


def _reduce(end: NamedSharding | None, eqn: Any, values: list[Any]) -> list[Any]:
    """The last op on partial sums, after which they are reduced."""
    (sum_,) = _carry(eqn, values)
    out = sum_.parts.sum(axis=0)
    if end is not None:
        out = jax.lax.with_sharding_constraint(out, end)
    return [out if sum_.whole is None else out + sum_.whole]


def _on_each_device(
    slots: dict[str, Spec], mesh: Mesh, eqn: Any, values: list[Any]
) -> list[Any]:
    """A foreign call on each device's part; partial sums are completed behind it."""
    given = [slots.get(f"in{k}", Spec(((),) * v.ndim)) for k, v in enumerate(values)]
    made = [slots[f"each{k}"] for k in range(len(eqn.outvars))]
    kept = {a for spec in made for a in spec.axes}
    summed = sorted({a for spec in given for a in spec.axes} - kept)

    call = call_on_parts(eqn)

    def body(*parts: Any) -> tuple[Any, ...]:
        if call is None:
            results = _jaxcompat.eval_equation(eqn, list(parts))
        else:
            made = call(*parts)
            results = made if isinstance(made, tuple | list) else [made]
        return tuple(jax.lax.psum(r, summed) if summed else r for r in results)

    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(spec.to_partition_spec() for spec in given),
        out_specs=tuple(spec.to_partition_spec() for spec in made),
        check_vma=False,
    )
    return list(mapped(*values))


def _lookup(
    address: str, specs: dict[str, Spec], mesh: Mesh, eqn: Any, values: list[Any]
) -> list[Any]:
    """A gather or scatter whose partial sums get a spec of their own.

    Filling in what lies outside of the table is part of a JAX gather, but in XLA it
    comes after the sum, where it would keep an all-reduce and the slice that follows
    from becoming a reduce-scatter.
    """

    def at(x: jax.Array, slot: str) -> jax.Array:
        if slot not in specs:
            return x
        sharding = NamedSharding(mesh, specs[slot].to_partition_spec())
        return pinned(x, sharding, pin_name(address, slot))

    fills = eqn.primitive.name == "gather" and (
        eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    )
    if not fills:
        results = _jaxcompat.eval_equation(eqn, values)
        return [at(r, f"sum{k}") for k, r in enumerate(results)]
    params = {**eqn.params, "mode": jax.lax.GatherScatterMode.CLIP, "fill_value": None}
    (out,) = _jaxcompat.eval_equation(eqn, values, params)
    out = at(at(out, "sum0"), "out0")
    table, indices = values
    numbers = params["dimension_numbers"]
    last = [table.shape[d] - params["slice_sizes"][d] for d in numbers.start_index_map]
    # No index of a narrow type leaves a long table.
    reach = np.minimum(last, np.iinfo(indices.dtype).max).astype(indices.dtype)
    inside = jnp.all((indices >= 0) & (indices <= reach), axis=-1)
    rows = [d for d in range(out.ndim) if d not in numbers.offset_dims]
    inside = jax.lax.broadcast_in_dim(inside, out.shape, rows)
    return [jnp.where(inside, out, _filler(out.dtype, eqn.params["fill_value"]))]


def _filler(dtype: Any, given: Any) -> jax.Array:
    """What `gather` fills in, as `jax.numpy.ndarray.at` documents it."""
    if given is not None:
        return jnp.asarray(given, dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(jnp.nan, dtype)
    if dtype == jnp.bool_:
        return jnp.asarray(True)
    info = jnp.iinfo(dtype)
    return jnp.asarray(info.min if info.min < 0 else info.max, dtype)
