"""What propagation finds out about a program, as data.

It lies beside the plan, below both propagation, which makes it, and cost and search,
which read it, so that neither has to know the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from autoshard.ir.mesh import canonical_axis
from autoshard.ir.ties import Blocks
from autoshard.ir.trace import Traced
from autoshard.plan.early import Early
from autoshard.plan.ragged import Ragged
from autoshard.plan.strategy import Strategy
from autoshard.rules import FactorRule

LAYERS = "layers"
"""Name of the dims a loop runs over, unless the user named them."""

Dims = tuple[tuple[str, ...], ...]
"""Axes per dim of a value."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two wishes that cannot both be met, and which of them was.

    Attributes:
        where: The value or op, with its source line.
        kept: What holds there.
        kept_origin: Where that wish comes from.
        lost: What was wanted instead.
        lost_origin: Where that wish comes from.
        moved_bytes: Bytes of the side that is moved to fit, unsharded; 0 where
            nothing moves.
    """

    where: str
    kept: str
    kept_origin: str
    lost: str
    lost_origin: str
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class Fixed:
    """Specs that follow from what the user fixed in mesh axes, before any strategy.

    Attributes:
        dims: Axes per dim per value; a value that is not here is open, and so is a dim
            whose entry is None. An entry without axes is closed.
        storage: Axes per dim in memory, for state that the user placed himself.
        factors: Axes per factor per op, where some operand or result is fixed.
        why: Per `(value, dim)`, the index in `origins` of what fixed it.
        origins: What fixed anything, in words.
        conflicts: Seeds that met.
    """

    dims: dict[int, tuple[tuple[str, ...] | None, ...]] = field(default_factory=dict)
    storage: dict[int, Dims] = field(default_factory=dict)
    factors: dict[int, Dims] = field(default_factory=dict)
    why: dict[tuple[int, int], int] = field(default_factory=dict)
    origins: tuple[str, ...] = ()
    conflicts: tuple[Conflict, ...] = ()


@dataclass(frozen=True, slots=True)
class DimClasses:
    """The classes of a program.

    Attributes:
        rules: Factor rule per op, kept because every later pass needs it.
        of_value: Class per dim per value.
        of_factor: Class per factor per op, -1 for a factor that leads no dim.
        names: Logical names per class, by alphabet.
        blocks: Repeated structure.
        batched: Per value, whether a microbatch holds only a part of it.
        early: Values that are made of state alone.
        origins: Per class and name, where it was first given, in words.
        named_at: Dims that carry a name themselves: `(value, dim, name, origin)`.
        fixed: What the user fixed in mesh axes.
        replicated: Ops that the `replicate` opt-in covers.
        aliases: Canonical axis per name that the user gave an axis.
    """

    rules: tuple[FactorRule, ...]
    of_value: Ragged
    of_factor: Ragged
    names: dict[int, tuple[str, ...]]
    blocks: Blocks
    batched: tuple[bool, ...]
    early: Early
    origins: dict[tuple[int, str], str] = field(default_factory=dict)
    named_at: tuple[tuple[int, int, str, str], ...] = ()
    fixed: Fixed = field(default_factory=Fixed)
    replicated: tuple[int, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)

    def canonical(self, axes: tuple[str, ...], where: str) -> tuple[str, ...]:
        """The user's axes in canonical names.

        Raises:
            NameUnknownError: An axis is neither canonical, nor well known, nor aliased.
        """
        return tuple(canonical_axis(axis, self.aliases, where) for axis in axes)


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
        axes: Mesh axes there are, or None for all of them.
    """

    rules: tuple[tuple[str, tuple[str, ...]], ...]
    params: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    optimizer: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    axes: frozenset[str] | None = None

    def has(self, spec: Dims) -> bool:
        """Whether some axis of a spec exists in the mesh."""
        return any(self.axes is None or a in self.axes for dim in spec for a in dim)

    def size(self, axes: tuple[str, ...]) -> int:
        """Product of the axes' sizes, where known."""
        product = 1
        for axis in axes:
            product *= self.sizes.get(axis, 1)
        return product

    def along(self, active: frozenset[str]) -> Layout:
        """The layout without the axes that have one device: they shard nothing."""

        def of(axes: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(a for a in axes if a in active)

        return replace(
            self,
            rules=tuple((logical, of(axes)) for logical, axes in self.rules),
            params=of(self.params),
            gradients=of(self.gradients),
            optimizer=of(self.optimizer),
        )

    @staticmethod
    def of(strategy: Strategy, sizes: dict[str, int] | None = None) -> Layout:
        """The layout of a strategy without holes.

        Args:
            strategy: The strategy.
            sizes: Of all its axes, if known: those of one device are left out.
        """
        storage = strategy.storage
        rules = []
        for rule in strategy.rules:
            assert rule.axes != "auto", rule
            rules.append((rule.logical, tuple(rule.axes)))
        assert "auto" not in (storage.params, storage.gradients, storage.optimizer)
        found = Layout(
            rules=tuple(rules),
            params=tuple(storage.params),
            gradients=tuple(storage.gradients),
            optimizer=tuple(storage.optimizer),
            sizes=sizes or {},
            axes=frozenset(strategy.mesh),
        )
        if sizes is None:
            return found
        return found.along(frozenset(a for a, n in sizes.items() if n > 1))


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
        at_once: All partial sums are completed by one all-reduce before anything
            else, as the partitioner does it for lookups, scatters and reductions.
    """

    op: int
    slot: str
    value: int
    source: Dims
    unreduced: tuple[str, ...]
    target: Dims
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """Data that an op moves by itself, its operands and results staying as they are.

    A window over a sharded dim reads rows of the neighbouring device; a manual region
    calls collectives of its own.

    Attributes:
        op: The op.
        slot: The operand whose data moves, or the result where that is larger.
        value: The value.
        kind: As in `plan.schema.Collective`.
        axes: Mesh axes it runs over.
        held: Axes that shard the value.
        rows: For a permute between neighbours, how many of `dim_size` rows each
            device sends; 0 where all of the value moves.
        dim_size: See `rows`.
    """

    op: int
    slot: str
    value: int
    kind: str
    axes: tuple[str, ...]
    held: frozenset[str]
    rows: int = 0
    dim_size: int = 1


@dataclass(frozen=True, slots=True)
class Delayed:
    """Partial sums that meet before they are reduced: one collective for several.

    Attributes:
        roots: Ops that make the partial sums.
        carriers: Ops that work on partial sums, the last of which makes the value that
            is then reduced.
        axes: Mesh axes over which the sums are pending.
        split: Per root, the factor that the axes shard.
    """

    roots: tuple[int, ...]
    carriers: tuple[int, ...]
    axes: tuple[str, ...]
    split: tuple[int, ...]


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
        divides: `(dim size, axes)` pairs that must divide: those of arguments and
            results, which JAX does not pad.
        padded: The same for intermediates, which the partitioner pads.
        compute: Compute spec per program input.
        notes: Conflicts and leaves that could not be sharded, in words.
        exchanges: Data that ops move by themselves.
        delayed: Partial sums that are added before they are reduced.
        conflicts: Wishes that could not all be met.
        asked: `(size, axes)` pairs that decided something by whether they divide. On
            meshes that answer alike the layout does the same.
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
    padded: frozenset[tuple[int, tuple[str, ...]]] = frozenset()
    exchanges: tuple[Exchange, ...] = ()
    delayed: tuple[Delayed, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    asked: frozenset[tuple[int, tuple[str, ...]]] = frozenset()
