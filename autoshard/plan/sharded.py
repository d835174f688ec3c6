"""What propagation finds out about a program, as data.

It lies beside the plan, below both propagation, which makes it, and cost and search,
which read it, so that neither has to know the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from autoshard.ir.trace import Traced
from autoshard.plan.schema import Strategy
from autoshard.rules import FactorRule

LAYERS = "layers"
"""Name of the dims a loop runs over, unless the user named them."""


@dataclass(frozen=True, slots=True)
class DimClasses:
    """The classes of a program.

    Attributes:
        rules: Factor rule per op, kept because every later pass needs it.
        of_value: Class per dim per value.
        of_factor: Class per factor per op, -1 for a factor that leads no dim.
        names: Logical names per class, in order of first appearance.
    """

    rules: tuple[FactorRule, ...]
    of_value: tuple[tuple[int, ...], ...]
    of_factor: tuple[tuple[int, ...], ...]
    names: dict[int, tuple[str, ...]]


RESIDUAL = ".residual"


@dataclass(frozen=True, slots=True)
class Layout:
    """The part of a filled strategy that propagation reads.

    Attributes:
        rules: `(logical axis, mesh axes)` in order of priority.
        params: Axes that shard parameters in memory beyond their compute spec.
        gradients: The same for gradients.
        optimizer: The same for optimizer state.
        sizes: Size per mesh axis, or empty while they are not known: then storage is
            placed as if everything divided.
    """

    rules: tuple[tuple[str, tuple[str, ...]], ...]
    params: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    optimizer: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)

    def size(self, axes: tuple[str, ...]) -> int:
        """Product of the axes' sizes, where known."""
        product = 1
        for axis in axes:
            product *= self.sizes.get(axis, 1)
        return product

    @staticmethod
    def of(strategy: Strategy, sizes: dict[str, int] | None = None) -> Layout:
        """The layout of a strategy without holes."""
        storage = strategy.storage
        rules = []
        for rule in strategy.rules:
            assert rule.axes != "auto", rule
            rules.append((rule.logical, tuple(rule.axes)))
        assert "auto" not in (storage.params, storage.gradients, storage.optimizer)
        return Layout(
            rules=tuple(rules),
            params=tuple(storage.params),
            gradients=tuple(storage.gradients),
            optimizer=tuple(storage.optimizer),
            sizes=sizes or {},
        )


Dims = tuple[tuple[str, ...], ...]
"""Axes per dim of a value."""

OUTPUT = -1
"""Op index of a reshard at the end of the program."""


@dataclass(frozen=True, slots=True)
class Reshard:
    """A value whose spec differs from what is needed.

    Attributes:
        op: The op that needs or makes it, `OUTPUT` at the program's results.
        slot: `in0`, ... for an operand, `out0`, ... for a result.
        value: The value.
        source: Axes per dim before.
        unreduced: Axes over which `source` holds partial sums.
        target: Axes per dim after.
    """

    op: int
    slot: str
    value: int
    source: Dims
    unreduced: tuple[str, ...]
    target: Dims


@dataclass(frozen=True, slots=True)
class ShardedProgram:
    """A program with a layout applied.

    Attributes:
        traced: The program.
        classes: Its dim classes and rules.
        layout: What was applied.
        specs: Axes per dim per value.
        factor_axes: Axes per factor per op.
        reshards: Every place where data moves.
        free: Values made of constants only, which any device makes for itself.
        stored: Values that are, or descend point by point from, sharded state.
        pins: `(op, slot)` whose value is pinned although nothing moves there.
        divides: `(dim size, axes)` pairs that must divide.
        compute: Compute spec per program input.
        notes: Conflicts and leaves that could not be sharded, in words.
    """

    traced: Traced
    classes: DimClasses
    layout: Layout
    specs: tuple[Dims, ...]
    factor_axes: tuple[Dims, ...]
    reshards: tuple[Reshard, ...]
    free: frozenset[int]
    stored: frozenset[int]
    pins: tuple[tuple[int, str], ...]
    divides: frozenset[tuple[int, tuple[str, ...]]]
    compute: tuple[Dims, ...]
    notes: tuple[str, ...]
