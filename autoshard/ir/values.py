"""The parts of a `Program`: values, ops, regions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autoshard.ir import _jaxcompat

LINK = "link"

BARRIER = "optimization_barrier"
"""The primitive that orders work: its results are its operands."""


@dataclass(frozen=True, slots=True)
class Value:
    """One array of the program.

    Attributes:
        index: Position in `Program.values`.
        shape: Global shape; in a manual region, that of one device's part.
        dtype: Element type.
        producer: Index of the op that makes it, or -1 for inputs and constants.
        region: The region it lives in.
    """

    index: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    producer: int
    region: int

    @property
    def bytes_(self) -> int:
        """Bytes of the whole, unsharded array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Op:
    """One equation, or a link that ties the inside of a region to its outside.

    Attributes:
        index: Position in `Program.ops`, which is an order of execution.
        primitive: Name of the JAX primitive, or `"link"`.
        params: The primitive's parameters, not to be changed; for a link `kind` and
            `lead`, and `names` where its region is manual.
        inputs: Value index per operand, -1 for a literal.
        outputs: Value index per result.
        region: The region it runs in.
        address: Stable address, see `ir.walk`.
        scope: The name stack, that of enclosing calls and loops included.
        equation: The equation it was read from.
        shapes: Shape per operand where the equation has other operands.
        callers: The equations of the calls and loops it stands in, the innermost
            first, as nested pairs; None at the top.
    """

    index: int
    primitive: str
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    region: int
    address: str
    scope: str
    equation: Any = field(default=None, repr=False, compare=False)
    shapes: tuple[tuple[int, ...], ...] | None = field(default=None, repr=False)
    callers: Any = field(default=None, repr=False, compare=False)

    @property
    def source(self) -> str:
        """The user's `file:line (function)`, or an empty string.

        What a library function is made of has no line of the user's: it is that of
        the call, where the function is jitted and traced on its own.
        """
        equation, callers = self.equation, self.callers
        while equation is not None:
            line = _jaxcompat.source_line(equation)
            if line or callers is None:
                return line
            equation, callers = callers
        return ""

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape per operand, literals included."""
        if self.shapes is not None:
            return self.shapes
        return tuple([_jaxcompat.shape_of(v.aval) for v in self.equation.invars])


@dataclass(frozen=True, slots=True)
class Region:
    """A body of code that runs `trips` times for each run of its parent.

    Attributes:
        parent: The region it stands in, -1 for the whole function.
        trips: Runs per run of the parent; 0 for a branch that another one of its
            `cond` outweighs.
        note: What is not known about `trips`; empty where it is exact.
        manual: User's mesh axes over which values here are one device's part, and
            their sizes; those of enclosing regions included.
    """

    parent: int
    trips: int
    note: str = ""
    manual: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Program:
    """A traced function.

    Attributes:
        values: All arrays, by index.
        ops: All ops in order of execution.
        regions: Region 0 is the whole function.
        inputs: Value index per flat argument.
        outputs: Value index per flat result (-1 for a literal).
        input_paths: Name of each flat argument.
        fingerprint: Hash of structure and shapes, blind to names and source lines.
    """

    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    regions: tuple[Region, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_paths: tuple[str, ...]
    fingerprint: str

    def runs(self, region: int) -> int:
        """How often a region runs in one call of the program."""
        runs = 1
        while region > 0:
            runs *= self.regions[region].trips
            region = self.regions[region].parent
        return runs
