"""Data that ops move by themselves: rows of neighbours, and manual collectives."""

from __future__ import annotations

from collections.abc import Mapping

from autoshard.ir.mesh import canonical_axis
from autoshard.ir.program import Op, Program
from autoshard.plan.sharded import Dims, Exchange
from autoshard.rules import FactorRule

_KINDS = {
    "all_gather": "all_gather",
    "all_gather_invariant": "all_gather",
    "all_gather_reduced": "all_gather",
    "all_to_all": "all_to_all",
    "pmax": "all_reduce",
    "pmin": "all_reduce",
    "pbroadcast": "permute",
    "ppermute": "permute",
    "psum": "all_reduce",
    "psum2": "all_reduce",
    "psum_invariant": "all_reduce",
    "psum_scatter": "reduce_scatter",
    "ragged_all_to_all": "all_to_all",
    "reduce_scatter": "reduce_scatter",
}
"""What the collectives of a manual region are in a plan; others move nothing."""


def between_neighbours(op: Op, rule: FactorRule, axes: Dims) -> list[Exchange]:
    """What a window over a sharded dim reads from the devices beside it."""
    found = []
    # The gradient of a kernel sums over the places of two arrays, of which the first
    # has the margins.
    summed = {f for f, kind in enumerate(rule.kinds) if kind == "reduce"}
    met: set[int] = set()
    for k, (value, dims) in enumerate(zip(op.inputs, rule.operands, strict=True)):
        held = frozenset(a for dim in dims if dim for a in axes[dim[0]])
        for d, dim in enumerate(dims):
            if not dim or value < 0 or (dim[0] in summed and dim[0] in met):
                continue
            met.add(dim[0])
            for rows in rule.halos[dim[0]]:
                if rows and axes[dim[0]]:
                    size = _operand_size(op, k, d)
                    found.append(
                        Exchange(
                            op.index,
                            f"in{k}",
                            value,
                            "permute",
                            axes[dim[0]],
                            held,
                            rows,
                            size,
                        )
                    )
    return found


def _operand_size(op: Op, slot: int, dim: int) -> int:
    return op.operand_shapes[slot][dim]


def in_manual_region(
    program: Program, op: Op, aliases: Mapping[str, str]
) -> list[Exchange]:
    """What a collective that the user wrote moves, one entry per array.

    Raises:
        NameUnknownError: It names an axis that nothing maps to a canonical one.
    """
    kind = _KINDS.get(op.primitive)
    if kind is None:
        return []
    given = op.params.get("axes", op.params.get("axis_name", ()))
    names = given if isinstance(given, tuple | list) else (given,)
    where = f"{op.primitive} at {op.source or op.address}"
    axes = tuple(canonical_axis(n, aliases, where) for n in names if isinstance(n, str))
    found = []
    for k, result in enumerate(op.outputs):
        operand = op.inputs[k] if k < len(op.inputs) else -1
        larger = max(
            (v for v in (operand, result) if v >= 0),
            key=lambda v: program.values[v].bytes_,
        )
        slot = f"in{k}" if larger == operand else f"out{k}"
        found.append(Exchange(op.index, slot, larger, kind, axes, frozenset()))
    return found if axes else []
