"""Carrying axes between the dims of a value and the factors of an op."""

from __future__ import annotations

from autoshard.plan.sharded import Dims
from autoshard.rules import FactorRule


def factors_from(
    rule: FactorRule, dims: tuple[tuple[int, ...], ...], spec: Dims | None
) -> Dims:
    """Axes per factor such that the value with these `dims` has this spec."""
    assert spec is not None
    axes: list[tuple[str, ...]] = [()] * len(rule.sizes)
    for dim, wanted in zip(dims, spec, strict=True):
        if dim and rule.divisible[dim[0]]:
            axes[dim[0]] = wanted
    return tuple(axes)


def spec_of(dims: tuple[tuple[int, ...], ...], axes: Dims) -> Dims:
    """Spec of the value with these `dims` when the op runs with these axes."""
    return tuple([axes[dim[0]] if dim else () for dim in dims])


def natural_dims(rule: FactorRule, axes: Dims) -> list[Dims]:
    """Specs the results have when the op runs with these axes per factor."""
    return [spec_of(dims, axes) for dims in rule.results]


def runs_with(rule: FactorRule, slot: int, spec: Dims) -> bool:
    """Whether an op can run with an operand's storage spec as it is.

    Every axis must lie on a factor that a device may hold a part of, and a point-by-
    point op must not read the operand over and over: a norm's scale that meets
    activations is used there, and keeping its storage spec would move the activations.
    What is cut or joined along a dim, which is then blocked, is read once.
    """
    axes = factors_from(rule, rule.operands[slot], spec)
    held = {f for dim in rule.operands[slot] for f in dim}
    made = {f for dim in rule.results[0] for f in dim if rule.kinds[f] != "blocked"}
    repeats = not held >= made
    return not repeats and {a for dim in axes for a in dim} >= {
        a for dim in spec for a in dim
    }
