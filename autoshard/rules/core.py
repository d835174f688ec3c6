"""What a factor rule is, and what rule functions are written with.

A factor rule says, like an einsum, which dims of which operands and results are the
same index. Propagation, cost and lowering all read the one rule of a primitive; the
idea is that of Shardy's op sharding rules (openxla/shardy, docs/propagation.md).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

FactorKind = Literal["pass", "reduce", "blocked", "shift"]
"""`pass`: sharded freely. `reduce`: sharded, the results are partial sums (or maxima,
as the op has it). `blocked`: every device needs all of it. `shift`: sharded freely, but
a device also needs some elements of its neighbours (its halo)."""

OpKind = Literal[
    "collective",
    "data",
    "elementwise",
    "foreign",
    "gather",
    "link",
    "matmul",
    "move",
    "reduce",
    "replicated",
    "scatter",
]
"""What the cost model needs to know of an op: `data` makes values from less data than
they hold (broadcast, iota) and fuses for free; `move` only rearranges; `foreign` is a
call of which only the operands and results are known; `replicated` has no rule and is
computed whole on every device, as the user asked."""

Dim = tuple[int, ...]
"""The factors of one dim, major first; empty for a dim of size one, and for one that is
needed whole and that no factor counts."""

Halo = tuple[int, int]
"""Elements needed of the lower and of the upper neighbour."""

Shape = tuple[int, ...]

_LETTERS = "ijklmnopqrstuvwxyzabcdefgh" + string.ascii_uppercase


def letter(f: int) -> str:
    """The name of a factor in a rule's text."""
    return _LETTERS[f] if f < len(_LETTERS) else f"f{f}"


@dataclass(frozen=True, slots=True)
class FactorRule:
    """The einsum-like form of one op.

    Dims that share a `pass` factor are of the same size, but for the other factors of a
    compound dim; so are those of a `reduce` factor without halo. Dims that share a
    `shift` or `blocked` factor need not be: a window shrinks what it slides over, a
    slice cuts a row off.

    Attributes:
        operands: Factors per dim per operand.
        results: Factors per dim per result.
        sizes: Size of each factor. Where its dims differ it is that of the result if
            the factor is shifted, that of the kernel if it is reduced, and the larger
            one if it is blocked.
        kinds: Kind of each factor.
        op_kind: See `OpKind`.
        flops_per_point: Floating-point operations per point of the factor space.
        halos: Empty if nothing has a halo; else one per factor, in elements of the
            operand that is the largest there. A `shift` factor has one, and so may a
            `reduce` factor: the gradient of a convolution's kernel sums over the places
            of the input, and each device needs a margin of its neighbours' input. Of
            the operands that share a `reduce` factor only the first has the halo.
        divisible: Per factor, whether an op may run with a part of it on each device:
            it is not blocked, and leads every dim of a result that it is in. The parts
            of a minor factor are strided there, and a spec divides into blocks.

    Raises:
        ValueError: Factors, sizes, kinds and halos do not fit together.

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
    halos: tuple[Halo, ...] = ()
    divisible: tuple[bool, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        count = len(self.sizes)
        slots = (*self.operands, *self.results)
        used = {f for dims in slots for dim in dims for f in dim}
        if not used <= set(range(count)):
            raise ValueError(f"factors {sorted(used)} of a rule with {count} sizes")
        if len(self.kinds) != count or len(self.halos) not in (0, count):
            raise ValueError(
                f"{count} factors have {len(self.kinds)} kinds and "
                f"{len(self.halos)} halos"
            )
        for kind, halo in zip(self.kinds, self.halos, strict=False):
            if min(halo) < 0 or (any(halo) and kind not in ("shift", "reduce")):
                raise ValueError(f"a {kind} factor has the halo {halo}")
        minor = {f for dims in self.results for dim in dims for f in dim[1:]}
        divisible = tuple(
            kind != "blocked" and f not in minor for f, kind in enumerate(self.kinds)
        )
        object.__setattr__(self, "divisible", divisible)

    @property
    def text(self) -> str:
        """The rule as one line.

        `(ij)` is a dim made of two factors, `1` one of none, `.` a value without dims.
        Behind the sizes stand the factors that are not sharded freely; a halo follows
        its factor, as in `shift i(1,1)`.
        """

        def show(dims: tuple[Dim, ...]) -> str:
            words = [
                "1"
                if not d
                else letter(d[0])
                if len(d) == 1
                else "(" + "".join(map(letter, d)) + ")"
                for d in dims
            ]
            return " ".join(words) if words else "."

        def halo(f: int) -> str:
            low, high = self.halos[f] if self.halos else (0, 0)
            shown = self.kinds[f] == "shift" or low or high
            return f"({low},{high})" if shown else ""

        sizes = " ".join(f"{letter(i)}={n}" for i, n in enumerate(self.sizes))
        line = ", ".join(map(show, self.operands))
        line += " -> " + ", ".join(map(show, self.results)) + f" {{{sizes}}}"
        for kind in ("reduce", "blocked", "shift"):
            which = [letter(i) + halo(i) for i, k in enumerate(self.kinds) if k == kind]
            line += f" {kind} {' '.join(which)}" if which else ""
        return line + (" replicated" if self.op_kind == "replicated" else "")


@dataclass(frozen=True, slots=True)
class RuleContext:
    """What a rule function sees of an op: global shapes, and the parameters it reads.

    A parameter that the function reads and the op does not have is None: JAX versions
    differ in a few names.
    """

    primitive: str
    params: dict[str, Any]
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]


@dataclass
class Factors:
    """Collects factors while a rule is built."""

    sizes: list[int] = field(default_factory=list)
    kinds: list[FactorKind] = field(default_factory=list)
    halos: list[Halo] = field(default_factory=list)

    def new(self, size: int, kind: FactorKind = "pass", halo: Halo = (0, 0)) -> Dim:
        """A new factor as a dim of its own; a dim of size one has none."""
        if size == 1:
            return ()
        self.sizes.append(size)
        self.kinds.append(kind)
        self.halos.append(halo)
        return (len(self.sizes) - 1,)

    def dims(self, shape: Sequence[int], kind: FactorKind = "pass") -> tuple[Dim, ...]:
        """New factors for every dim of a shape."""
        return tuple(self.new(size, kind) for size in shape)

    def kept(self, m: int, n: int, *, moved: bool = False) -> tuple[Dim, Dim]:
        """The same dim before and after an op that may keep only part of it.

        Args:
            m: Its size on one side.
            n: Its size on the other.
            moved: Its elements change places even where the sizes agree.

        Returns:
            One factor for both sides where they are the same thing to a user, see
            `same_dim`: free if nothing changed, else blocked. Otherwise a blocked
            factor for each.
        """
        if m == n:
            dim = self.new(m, "blocked" if moved else "pass")
            return dim, dim
        if same_dim(m, n):
            dim = self.new(max(m, n), "blocked")
            # A dim of size one has no part of the other to hold.
            return (dim if m > 1 else ()), (dim if n > 1 else ())
        return self.new(m, "blocked"), self.new(n, "blocked")

    def rule(
        self,
        operands: Sequence[tuple[Dim, ...]],
        results: Sequence[tuple[Dim, ...]],
        op_kind: OpKind,
        flops_per_point: float = 0.0,
        *,
        flops: float | None = None,
    ) -> FactorRule:
        """Finishes the rule; `flops` are those of the whole op, if that is simpler."""
        if flops is not None:
            flops_per_point = flops / max(prod(self.sizes), 1)
        shifts = "shift" in self.kinds or any(low or up for low, up in self.halos)
        return FactorRule(
            tuple(operands),
            tuple(results),
            tuple(self.sizes),
            tuple(self.kinds),
            op_kind,
            flops_per_point,
            tuple(self.halos) if shifts else (),
        )


FEW_ROWS = 8
"""So many elements may be cut off or added, and the dim is still the same thing."""


def same_dim(m: int, n: int) -> bool:
    """Whether a dim of size m, cut or padded to n, is still the same dim to a user.

    It is if at least half of it survives, or if only a few rows come or go: names then
    pass through a slice such as `x[:, :-1]`, a padded sequence, half of a rotary
    embedding. It is not if one of three or more equal parts is taken: a query out of a
    fused query-key-value projection is another thing than the whole. Two dims of which
    one is empty are not the same.

    >>> same_dim(1024, 1023), same_dim(10, 4), same_dim(3072, 1024), same_dim(12, 4)
    (True, True, False, False)
    """
    small, large = min(m, n), max(m, n)
    if not small:
        return not large
    return 2 * small >= large or (large - small <= FEW_ROWS and large % small != 0)
