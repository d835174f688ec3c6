"""What a factor rule is, and the registry of them.

A factor rule says, like an einsum, which dims of which operands and results are the
same index. Propagation, cost and lowering all read the one rule of a primitive; the
idea is that of Shardy's op sharding rules (openxla/shardy, docs/propagation.md).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from autoshard.ir.errors import RuleMissingError
from autoshard.ir.program import Op, Program

FactorKind = Literal["pass", "reduce", "blocked"]
"""`pass`: sharded freely. `reduce`: sharded, the results are partial sums. `blocked`:
every device needs all of it."""

OpKind = Literal[
    "elementwise", "data", "move", "reduce", "matmul", "gather", "scatter", "link"
]
"""What the cost model needs to know of an op: `data` makes values from less data than
they hold (broadcast, iota) and fuses for free; `move` only rearranges."""

Dim = tuple[int, ...]
"""The factors of one dim, major first; empty for a dim of size one, and for one that is
needed whole and that no factor counts."""


@dataclass(frozen=True, slots=True)
class FactorRule:
    """The einsum-like form of one op.

    Attributes:
        operands: Factors per dim per operand.
        results: Factors per dim per result.
        sizes: Size of each factor.
        kinds: Kind of each factor.
        op_kind: See `OpKind`.
        flops_per_point: Floating-point operations per point of the factor space.

    >>> FactorRule(
    ...     operands=(((0,), (1,)), ((1,), (2,))), results=(((0,), (2,)),),
    ...     sizes=(8, 4, 2), kinds=("pass", "reduce", "pass"), op_kind="matmul",
    ...     flops_per_point=2,
    ... ).text
    'i j, j k -> i k {i=8 j=4 k=2} reduce j'
    """

    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    sizes: tuple[int, ...]
    kinds: tuple[FactorKind, ...]
    op_kind: OpKind
    flops_per_point: float = 0.0

    @property
    def text(self) -> str:
        """The rule as one line; `(ij)` is a dim made of two factors, `1` of none."""
        letters = "ijklmnopqrstuvwxyzabcdefgh" + string.ascii_uppercase

        def show(dims: tuple[Dim, ...]) -> str:
            words = [
                "1"
                if not d
                else letters[d[0]]
                if len(d) == 1
                else "(" + "".join(letters[f] for f in d) + ")"
                for d in dims
            ]
            return " ".join(words) if words else "."

        sizes = " ".join(f"{letters[i]}={n}" for i, n in enumerate(self.sizes))
        line = ", ".join(map(show, self.operands))
        line += " -> " + ", ".join(map(show, self.results)) + f" {{{sizes}}}"
        for kind in ("reduce", "blocked"):
            which = [letters[i] for i, k in enumerate(self.kinds) if k == kind]
            line += f" {kind} {' '.join(which)}" if which else ""
        return line


@dataclass(frozen=True, slots=True)
class RuleContext:
    """What a rule function sees of an op: global shapes and parameters."""

    primitive: str
    params: dict[str, Any]
    operands: tuple[tuple[int, ...], ...]
    results: tuple[tuple[int, ...], ...]


@dataclass
class Factors:
    """Collects factors while a rule is built."""

    sizes: list[int] = field(default_factory=list)
    kinds: list[FactorKind] = field(default_factory=list)

    def new(self, size: int, kind: FactorKind = "pass") -> Dim:
        """A new factor as a dim of its own; a dim of size one has none."""
        if size == 1:
            return ()
        self.sizes.append(size)
        self.kinds.append(kind)
        return (len(self.sizes) - 1,)

    def dims(self, shape: Sequence[int], kind: FactorKind = "pass") -> tuple[Dim, ...]:
        """New factors for every dim of a shape."""
        return tuple(self.new(size, kind) for size in shape)

    def rule(
        self,
        operands: Sequence[tuple[Dim, ...]],
        results: Sequence[tuple[Dim, ...]],
        op_kind: OpKind,
        flops_per_point: float = 0.0,
    ) -> FactorRule:
        """Finishes the rule."""
        return FactorRule(
            tuple(operands),
            tuple(results),
            tuple(self.sizes),
            tuple(self.kinds),
            op_kind,
            flops_per_point,
        )


RuleFn = Callable[[RuleContext], FactorRule]
_RULES: dict[str, RuleFn] = {}


def register(*primitives: str) -> Callable[[RuleFn], RuleFn]:
    """Registers the rule function of one or more primitives.

    Raises:
        ValueError: A primitive has a rule already.
    """

    def add(fn: RuleFn) -> RuleFn:
        for primitive in primitives:
            if primitive in _RULES:
                raise ValueError(f"primitive {primitive!r} already has a rule")
            _RULES[primitive] = fn
        return fn

    return add


def covered() -> list[str]:
    """Names of all primitives that have a rule.

    >>> {"dot_general", "add", "gather"} <= set(covered())
    True
    """
    return sorted(_RULES)


def rule_of(program: Program, op: Op) -> FactorRule:
    """The factor rule of one op.

    Raises:
        RuleMissingError: Its primitive has none.
    """
    fn = _RULES.get(op.primitive)
    if fn is None:
        raise RuleMissingError(
            f"primitive {op.primitive!r} at {op.source or op.address} has no factor "
            "rule, so how it shards and what it costs is unknown. Register one "
            "(CONTRIBUTING.md, 'Add a rule'), or write the computation with other "
            "operations."
        )
    operands = op.params.get("_operand_shapes")
    if operands is None:
        operands = tuple(program.values[v].shape for v in op.inputs)
    results = tuple(program.values[v].shape for v in op.outputs)
    return fn(RuleContext(op.primitive, op.params, operands, results))
