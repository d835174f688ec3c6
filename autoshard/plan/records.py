"""What a plan records of how it came about: counts, conflicts, blocks, trails."""

from __future__ import annotations

import re

from autoshard.plan.base import PlanSpec, Record


class Replicated(Record):
    """One use of the `replicate` opt-in: an op that every device computes whole.

    Attributes:
        primitive: The primitive, which has no factor rule.
        address: Address of the op, see `ir.walk`.
        source: The user's source line.
    """

    primitive: str
    address: str
    source: str


class AnnotationCount(Record):
    """How many annotations of one kind were found, and how many reached the jaxpr."""

    kind: str
    found: int
    reached: int


class Annotations(Record):
    """The annotations of a program.

    Attributes:
        counts: By kind.
        hints: Spellings that flax deprecated, and what to write today.
        unused: Call sites whose result the program does not use.
    """

    counts: tuple[AnnotationCount, ...] = ()
    hints: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


class BlockRecord(Record):
    """A repeated unit of the program, whose copies share every decision.

    Attributes:
        kind: `scanned` or `unrolled`.
        copies: How many there are.
        ops: Ops in one copy.
        source: Source line of its first op.
    """

    kind: str
    copies: int
    ops: int
    source: str


class ConflictRecord(Record):
    """Two wishes that could not both be met; see `plan.sharded.Conflict`."""

    where: str
    kept: str
    kept_origin: str
    lost: str
    lost_origin: str
    moved_bytes: int


class Root(Record):
    """A product of a delayed sum.

    Attributes:
        address: Address of the op.
        contraction: Which of its contracted dims the pending axes shard.
    """

    address: str
    contraction: int


class DelayedSum(Record):
    """Partial sums that are added before they are reduced.

    Attributes:
        roots: The products.
        carriers: Addresses of the ops between the products and the reduction, the last
            of which makes the value that is reduced.
        axes: Mesh axes over which the sums are pending.
        specs: Spec of the partial sum that each root makes.
    """

    roots: tuple[Root, ...]
    carriers: tuple[str, ...]
    axes: tuple[str, ...]
    specs: tuple[PlanSpec, ...]


class TrailDim(Record):
    """Where the axes of one dim came from.

    Attributes:
        axes: The axes, without those of one device.
        step: Index of the step the dim takes them from, or None where all began here.
        dim: Which dim of that step.
        origin: The annotation, rule or decision behind the axes that began here: those
            that the step before does not have.
    """

    axes: tuple[str, ...]
    step: int | None = None
    dim: int = 0
    origin: str = ""


class TrailStep(Record):
    """One value on the way from an annotation to wherever its axes reach.

    Copies of a block and values that are alike have one step between them.

    Attributes:
        what: Path of an argument, or the primitive that makes the value.
        source: The user's source line.
        address: Address of the op, empty for an argument.
        shape: Global shape.
        dims: Per dim, None where nothing shards it.
    """

    what: str
    source: str
    address: str
    shape: tuple[int, ...]
    dims: tuple[TrailDim | None, ...]


def numberless(path: str) -> str:
    """A path without the numbers that count: the same for all copies of a layer.

    >>> numberless("params/blocks/12/mlp/up"), numberless("params/layers_3/norm1")
    ('params/blocks/#/mlp/up', 'params/layers_#/norm1')
    """
    return re.sub(r"(?<=[/_.])\d+(?=/|$)", "#", path)
