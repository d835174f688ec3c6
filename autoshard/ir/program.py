"""`Program`: a jaxpr as flat lists of values and ops, ready for propagation.

Calls are written in place. A loop becomes its body, a `cond` its branches, a
`shard_map` its manual region: each a `Region` with a trip count, and `link` ops that
tie the values outside to those inside, so that every later pass sees nothing but ops
with factor rules.

Kinds of link: `slice`, `carry_in`, `carry`, `stack` and `carry_out` of loops (`slice`
and `stack` drop and add a leading dim), `branch_in` and `branch_out` of a `cond`,
`manual_in` and `manual_out` of a `shard_map`, whose `names` say per dim which of the
user's mesh axes the inner shape is divided by.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from autoshard.ir import _jaxcompat
from autoshard.ir.build import Builder
from autoshard.ir.values import BARRIER as BARRIER
from autoshard.ir.values import LINK as LINK
from autoshard.ir.values import Op as Op
from autoshard.ir.values import Program as Program
from autoshard.ir.values import Region as Region
from autoshard.ir.values import Value as Value

_DIM_PARAMS = (
    "axes",
    "axis",
    "broadcast_dimensions",
    "dimension",
    "dimension_numbers",
    "dimensions",
    "padding_config",
    "permutation",
    "slice_sizes",
)
"""Parameters that say which dims an op works on, which shapes alone do not."""


def build(closed_jaxpr: Any, input_paths: Sequence[str]) -> Program:
    """Flattens a closed jaxpr into a `Program`.

    A loop that does not count to a known bound has one trip, and a note in its region.

    Args:
        closed_jaxpr: What `jax.make_jaxpr` returned.
        input_paths: A name per flat argument.

    >>> import jax, jax.numpy as jnp
    >>> jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x) * 2)(1.0)
    >>> [op.primitive for op in build(jaxpr, ["x"]).ops]
    ['sin', 'mul']
    """
    builder = Builder()
    opened, _ = _jaxcompat.open_jaxpr(closed_jaxpr)
    with no_collection():
        inputs = [builder.value(var.aval, 0) for var in opened.invars]
        outputs = builder.walk(closed_jaxpr, inputs, 0, "", "")
        return Program(
            values=tuple(builder.values),
            ops=tuple(builder.ops),
            regions=tuple(builder.regions),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            input_paths=tuple(input_paths),
            fingerprint=_fingerprint(builder, inputs, outputs),
        )


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """While it is open, garbage stays.

    For what makes many objects of which most stay: looking for garbage among them again
    and again would take half of its time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _fingerprint(builder: Builder, inputs: list[int], outputs: list[int]) -> str:
    """Hashes the program as arrays of numbers, and each distinct type and op once."""
    types: dict[Any, int] = {}
    kinds: dict[Any, int] = {}
    values = [
        (types.setdefault((v.shape, v.dtype), len(types)), v.region)
        for v in builder.values
    ]
    ops: list[int] = []
    wiring: list[int] = []
    for op in builder.ops:
        ops += (_kind(op, kinds), op.region, len(op.inputs), len(op.outputs))
        wiring += op.inputs
        wiring += op.outputs
    digest = hashlib.sha256()
    for numbers in (values, ops, wiring, inputs, outputs):
        digest.update(np.array(numbers, dtype="<i8").tobytes())
        digest.update(b";")
    digest.update(repr([(shape, str(dtype)) for shape, dtype in types]).encode())
    digest.update(repr(list(kinds)).encode())
    regions = [(r.parent, r.trips, sorted(r.manual.items())) for r in builder.regions]
    digest.update(repr(regions).encode())
    return digest.hexdigest()[:16]


def _kind(op: Op, kinds: dict[Any, int]) -> int:
    """A number for the primitive and the dims it works on, the same for equal ones."""
    params = op.params
    if op.primitive == LINK:
        key = (LINK, *params.items())
    else:
        key = (op.primitive, *[(k, params[k]) for k in _DIM_PARAMS if k in params])
    try:
        return kinds.setdefault(key, len(kinds))
    except TypeError:  # a parameter that is a list
        return kinds.setdefault((op.primitive, repr(key)), len(kinds))
