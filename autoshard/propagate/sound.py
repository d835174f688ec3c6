"""What the partitioner computes wrongly, or stops at, is not asked of it.

Each case was seen with JAX 0.10.2 to 0.12, and tests/lower/test_partitioner.py has it.
"""

from __future__ import annotations

from collections.abc import Callable

from autoshard.ir.values import Op
from autoshard.plan.sharded import Dims
from autoshard.rules import FactorRule
from autoshard.rules.foreign import runs_by_parts

Divides = Callable[[int, tuple[str, ...]], bool]


def sound(op: Op, rule: FactorRule, axes: Dims, divides: Divides) -> Dims:
    """The axes per factor that an op can run with, of those that it was to run with.

    Args:
        op: Any op.
        rule: Its rule.
        axes: Mesh axes per factor.
        divides: Whether a size divides over axes.

    Returns:
        Mesh axes per factor, some of them left out.
    """
    if runs_by_parts(op, rule):  # the parts of a `shard_map` are equal
        return _divided(rule, axes, divides, {*rule.kinds})
    if rule.op_kind == "scatter":
        # Where its updates are padded, the padding may be added up, too, on a mesh with
        # one more axis.
        return _divided(rule, axes, divides, {"reduce"})
    if op.primitive == "conv_general_dilated":
        return _convolved(rule, axes)
    return axes


def _divided(rule: FactorRule, axes: Dims, divides: Divides, kinds: set[str]) -> Dims:
    """Without axes over which a factor of some kinds does not divide."""
    return tuple(
        () if kind in kinds and not divides(size, wanted) else wanted
        for size, wanted, kind in zip(rule.sizes, axes, rule.kinds, strict=True)
    )


def _convolved(rule: FactorRule, axes: Dims) -> Dims:
    """Not over both the windows' places and the channels that only kernels have.

    Where there are two parts along the windows, the margins are wrong.
    """
    if not any(
        kind == "shift" and wanted
        for kind, wanted in zip(rule.kinds, axes, strict=True)
    ):
        return axes
    factors = [{f for dim in dims for f in dim} for dims in rule.operands]
    made = factors[1] - factors[0]
    return tuple(() if f in made else wanted for f, wanted in enumerate(axes))
