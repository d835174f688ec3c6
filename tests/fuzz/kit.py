"""What the ops of a random program are drawn with: values so far, and choices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fuzz.describe import Array, Body, Node

T = TypeVar("T")
SIZES = (8, 16, 4, 2, 6, 3, 12, 5, 7, 1)
MOST_ELEMENTS = 4096
MOST_INPUTS = 10
DEEPEST = 2
ATTEMPTS = 6


class Skip(Exception):
    """This op cannot be drawn here: no value so far fits it."""


class Chooser(Protocol):
    """Where choices come from."""

    def integer(self, low: int, high: int) -> int:
        """An integer in `[low, high]`."""
        ...


@dataclass(frozen=True)
class Value:
    """A value that exists while a program is drawn.

    Attributes:
        id: How ops name it.
        shape: Its shape.
        dtype: Its element type, `"key"` for a PRNG key.
        exact: Whether every correct execution gives the same bits, so that a jump
            (rounding, comparing, ordering) may follow.
        below: For integers, a bound that makes them an index; 0 if there is none.
        mag: How large floats are, roughly.
    """

    id: int
    shape: tuple[int, ...]
    dtype: str = "float32"
    exact: bool = False
    below: int = 0
    mag: float = 1.0

    @property
    def rank(self) -> int:
        """Number of dims."""
        return len(self.shape)


@dataclass
class Kit:
    """The state of one body while it is drawn.

    Attributes:
        choose: Source of choices.
        budget: How many ops may still be drawn, shared with outer and inner bodies.
        depth: How many bodies this one lies in.
        smooth: How often it is differentiated: then no jumps, and kinks only where
            the operand is exact.
        batched: Whether it is under `vmap`.
        forward: Whether it is under `jvp`.
        parent: The body around it.
        mesh: Size per mesh axis.
        rules: Mesh axes per logical axis.
        families: The families that ops are drawn from.
        family: That of the op which is being drawn.
        values: All values so far, inputs included.
        inputs: The inputs.
        nodes: The ops.
        used: Ids of values that are operands.
        outer: Per input of an inner body, the outer value it gets.
        roles: Per input of an inner body, how it gets it.
    """

    choose: Chooser
    budget: list[int]
    depth: int = 0
    smooth: int = 0
    batched: bool = False
    forward: bool = False
    parent: Kit | None = None
    mesh: dict[str, int] = field(default_factory=dict)
    rules: dict[str, list[str]] = field(default_factory=dict)
    families: Sequence[str] = ()
    family: str = ""
    values: list[Value] = field(default_factory=list)
    inputs: list[Array] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    outer: list[Value] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)

    # -- choices -------------------------------------------------------------------

    def integer(self, low: int, high: int) -> int:
        """An integer in `[low, high]`."""
        return low if low >= high else self.choose.integer(low, high)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items; none is a reason to skip."""
        if not items:
            raise Skip
        return items[self.integer(0, len(items) - 1)]

    def flip(self, one_in: int = 2) -> bool:
        """True once in so many times."""
        return self.integer(1, one_in) == one_in

    def some(self, items: Sequence[T], least: int = 1, most: int = 99) -> list[T]:
        """Distinct items, in random order."""
        left = list(items)
        if len(left) < least:
            raise Skip
        count = self.integer(least, min(most, len(left)))
        return [left.pop(self.integer(0, len(left) - 1)) for _ in range(count)]

    def dim(self, value: Value, least: int = 1) -> int:
        """A dim of at least this size."""
        return self.pick([d for d, n in enumerate(value.shape) if n >= least])

    def size(self) -> int:
        """A size for a new dim: often a multiple of a mesh axis, often not."""
        if self.mesh and self.flip():
            return self.pick(list(self.mesh.values())) * self.integer(1, 2)
        return SIZES[min(self.integer(0, 9), self.integer(0, 9))]

    def shape(self, low: int = 1, high: int = 3) -> tuple[int, ...]:
        """A shape for a new value."""
        dims = [self.size() for _ in range(self.integer(low, high))]
        while math.prod(dims) > 1024:
            dims[dims.index(max(dims))] //= 2
        return tuple(dims)

    # -- values --------------------------------------------------------------------

    def any(self, fits: Callable[[Value], bool]) -> Value:
        """A value that fits, rather a late one."""
        found = [v for v in reversed(self.values) if fits(v)]
        if not found:
            raise Skip
        last = len(found) - 1
        return found[min(self.integer(0, last), self.integer(0, last))]

    def floats(
        self, low: int = 0, high: int = 9, exact: bool = False, kink: bool = False
    ) -> Value:
        """A float value of such a rank.

        Args:
            low: Lowest rank.
            high: Highest rank.
            exact: Whether a jump follows; never under differentiation.
            kink: Whether a kink follows, which makes the same demand only there.
        """
        if exact and self.smooth:
            raise Skip
        exact = exact or (kink and self.smooth)
        return self.any(
            lambda v: (
                v.dtype == "float32"
                and low <= v.rank <= high
                and (v.exact or not exact)
            )
        )

    def new_input(
        self, shape: tuple[int, ...], dtype: str = "float32", below: int = 0
    ) -> Value:
        """A new input; in an inner body the outermost one gets it."""
        exact, mag = True, 1.5
        if self.parent is not None:
            outer = self.parent.new_input(shape, dtype, below)
            return self.take(outer, shape)
        if len(self.inputs) >= MOST_INPUTS:
            raise Skip
        self.inputs.append(Array(shape, dtype, below))
        value = Value(-len(self.inputs), shape, dtype, exact, below, mag)
        self.values.append(value)
        return value

    def take(
        self,
        outer: Value,
        shape: tuple[int, ...],
        *,
        role: str = "",
        exact: bool = True,
    ) -> Value:
        """An input of an inner body that gets (a part of) a value of the outer one."""
        self.inputs.append(Array(shape, outer.dtype, outer.below))
        self.outer.append(outer)
        self.roles.append(role)
        exact = exact and outer.exact
        value = Value(
            -len(self.inputs), shape, outer.dtype, exact, outer.below, outer.mag
        )
        self.values.append(value)
        return value

    def emit(
        self,
        op: str,
        args: Sequence[Value],
        results: Sequence[tuple[int, ...]],
        *,
        dtype: str = "float32",
        mag: float = 1.0,
        exact: bool = False,
        below: int = 0,
        **params: Any,
    ) -> list[Value]:
        """Adds an op and its results."""
        if any(math.prod(shape) > MOST_ELEMENTS for shape in results):
            raise Skip
        scale = 1.0
        if dtype == "float32" and mag > 0 and not 0.25 <= mag <= 4:
            scale = 2.0 ** -round(math.log2(mag))
        made = [
            Value(0, tuple(shape), dtype, exact, below, mag * scale)
            for shape in results
        ]
        return self.emit_all(op, args, made, scale=scale, **params)

    def emit_all(
        self,
        op: str,
        args: Sequence[Value],
        results: Sequence[Value],
        *,
        scale: float = 1.0,
        **params: Any,
    ) -> list[Value]:
        """Adds an op whose results are like the given ones, each in its own way."""
        if any(math.prod(value.shape) > MOST_ELEMENTS for value in results):
            raise Skip
        start = sum(node.count for node in self.nodes)
        self.nodes.append(
            Node(
                op,
                tuple(a.id for a in args),
                params,
                len(results),
                scale,
                self.family,
            )
        )
        self.budget[0] -= 1
        self.used.update(a.id for a in args)
        made = [dataclasses.replace(v, id=start + k) for k, v in enumerate(results)]
        self.values += made
        return made

    # -- inner bodies ----------------------------------------------------------------

    def inner(
        self, *, smooth: bool = False, batched: bool = False, forward: bool = False
    ) -> Kit:
        """The kit of a body inside this one."""
        if self.depth >= DEEPEST or self.budget[0] < 2:
            raise Skip
        return Kit(
            self.choose,
            self.budget,
            depth=self.depth + 1,
            smooth=self.smooth + smooth,
            batched=self.batched or batched,
            forward=self.forward or forward,
            parent=self,
            mesh=self.mesh,
            rules=self.rules,
            families=self.families,
        )

    def leaves(self) -> list[Value]:
        """Results that no op uses."""
        return [v for v in self.values if v.id >= 0 and v.id not in self.used]

    def grow(self, count: int) -> None:
        """Draws so many ops, as far as the budget and the values allow."""
        for _ in range(count):
            for _ in range(ATTEMPTS):
                if self.budget[0] <= 0:
                    return
                undo = self._marks()
                self.family = self.pick(self.families)
                draw = self.pick(DRAWS[self.family])
                try:
                    draw(self)
                    break
                except Skip:
                    undo()

    def _marks(self) -> Callable[[], None]:
        """How to forget what is drawn from now on, here and in the outer bodies."""
        kit, undos = self, []
        while kit is not None:
            lists = [kit.values, kit.inputs, kit.nodes, kit.outer, kit.roles]
            undos.append((kit, [(x, len(x)) for x in lists], set(kit.used)))
            kit = kit.parent
        budget = self.budget[0]

        def undo() -> None:
            self.budget[0] = budget
            for kit, lengths, used in undos:
                kit.used = used
                for items, length in lengths:
                    del items[length:]

        return undo

    def body(self, outputs: Sequence[Value]) -> Body:
        """The finished body."""
        return Body(tuple(self.inputs), tuple(self.nodes), tuple(v.id for v in outputs))


Draw = Callable[[Kit], None]
DRAWS: dict[str, list[Draw]] = {}
"""How the ops of each family are drawn."""

RUNS: dict[str, Callable[..., Any]] = {}
"""What each op does: `(*operands, **params) -> result` or a tuple of results."""


def draws(family: str) -> Callable[[Draw], Draw]:
    """Registers how an op is drawn."""

    def add(fn: Draw) -> Draw:
        DRAWS.setdefault(family, []).append(fn)
        return fn

    return add


def runs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Registers what the op of this name does."""
    name = fn.__name__.strip("_").removesuffix("_run")
    # Collecting doctests imports each module a second time, under another name.
    known = RUNS.get(name)
    assert known is None or known.__code__.co_filename == fn.__code__.co_filename, name
    RUNS[name] = fn
    return fn
