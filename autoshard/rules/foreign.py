"""Rules of foreign calls, written as text by whoever knows the kernel.

A Pallas kernel, a call through the foreign function interface and a primitive of
another library say nothing about their dims. One line does:

    register_rule("flash", "b s h d, b t h d, b t h d -> b s h d; blocked t d")

reads: `flash` may be cut along b, s and h, and each device needs all of t and d.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn

from autoshard.ir.errors import InputError
from autoshard.ir.program import Op
from autoshard.rules.core import Dim, FactorKind, FactorRule, Factors, Halo, Shape
from autoshard.rules.registry import covered

CALLS = ("ffi_call", "pallas_call")
"""Primitives that call foreign code, told apart by the name of what they call."""

_BY_PARTS = frozenset({"approx_top_k", "select_and_gather_add", "top_k"})
"""Primitives that the partitioner makes whole although their rule divides them, or that
it aborts at."""

_NAME = r"[A-Za-z_]\w*"
_WORD = re.compile(rf"({_NAME})(?:\((\d+),(\d+)\))?")
_DIM = re.compile(rf"\(\s*({_NAME}(?:\s+{_NAME})*)\s*\)|({_NAME})|(1)|(\S+)")

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A rule before it meets shapes.

    Attributes:
        name: Of the kernel, target or primitive.
        text: As the user wrote it.
        operands: Names of the factors per dim per operand; none for a dim written 1.
        results: The same of the results.
        kinds: Kind of the factors that are not sharded freely.
        halos: Halo of each `shift` factor.
        flops_per_point: Floating-point operations per point of the factor space; None
            if the user did not say.
    """

    name: str
    text: str
    operands: tuple[tuple[Names, ...], ...]
    results: tuple[tuple[Names, ...], ...]
    kinds: dict[str, FactorKind] = field(default_factory=dict)
    halos: dict[str, Halo] = field(default_factory=dict)
    flops_per_point: float | None = None

    def fail(self, what: str) -> NoReturn:
        """Stops with what is wrong and how a rule is written."""
        raise InputError(
            f"the rule {self.text!r} of {self.name!r}: {what}. A rule names the dims "
            'of each operand and result, as in "b s h, b t h -> b s h; blocked t": '
            "`1` is a dim of size one, `.` a scalar, `(h d)` a dim made of two. "
            "Behind semicolons stand the names that are not sharded freely: "
            "`blocked` (needed whole), `reduce` (summed up), `shift s(1,1)` (with so "
            "many elements of the neighbours), and `flops 2`, the operations per point."
        )


_PATTERNS: dict[str, Pattern] = {}


_CALLS: dict[str, Callable[..., Any]] = {}


def register_rule(
    name: str, text: str, *, call: Callable[..., Any] | None = None
) -> None:
    """Says how a foreign call or a primitive without a rule is sharded.

    Args:
        name: Name of a Pallas kernel (its `name`, else that of the kernel function),
            of the target of an `ffi_call`, or of a primitive.
        text: The rule. Operands and results as in an einsum with names of any length;
            then, each behind a semicolon, `blocked`, `reduce` or `shift` and names,
            and `flops N`, the floating-point operations per point of the factor space.
            Without `flops` the call is priced by a Pallas kernel's own cost estimate
            if it has one, else by the bytes of its operands and results alone. A
            second rule of the same name replaces the first.
        call: `(*operands) -> result or tuple of results`, the same computation for
            operands of any size. A Pallas kernel or an `ffi_call` is traced for whole
            arrays and cannot run on parts of them; with this it is built again for
            the part that a device holds. A primitive that infers its own shapes needs
            none.

    Raises:
        InputError: The text is no rule, or the primitive has a rule that is built in.

    >>> register_rule("my_kernel", "b s h, b t h -> b s h; blocked t h; flops 4")
    >>> register_rule("my_kernel", "b s h, b t h")
    Traceback (most recent call last):
    ...
    autoshard.ir.errors.InputError: the rule 'b s h, b t h' of 'my_kernel': there is...
    """
    if name in covered() or name in CALLS:
        whose = (
            "name the kernel or target that it calls instead"
            if name in CALLS
            else "it is built in, and every pass relies on it"
        )
        raise InputError(f"no rule can be registered for {name!r}: {whose}.")
    _PATTERNS[name] = parse(name, text)
    _CALLS.pop(name, None)
    if call is not None:
        _CALLS[name] = call


def call_on_parts(op: Op) -> Callable[..., Any] | None:
    """What computes an op on a device's part; None if the op itself can.

    Args:
        op: A foreign op, or the equation of one.

    Raises:
        InputError: It cannot, and nothing was registered that does.
    """
    name = rule_name(op)
    if name in _CALLS:
        return _CALLS[name]
    if _primitive(op) not in CALLS:
        return None
    where = getattr(op, "source", "") or name
    raise InputError(
        f"the kernel {name!r} at {where} is traced for whole arrays, and its rule "
        f"{_PATTERNS[name].text!r} lets each device compute a part. Say how to call it "
        f"on parts, register_rule({name!r}, ..., call=lambda *operands: ...), or "
        "declare its names blocked, so that every device computes the whole."
    )


def runs_by_parts(op: Op, rule: FactorRule) -> bool:
    """Whether each device runs an op by itself, under `shard_map`.

    So run the calls that the partitioner cannot look into, what it makes whole although
    the rule divides it, and what it aborts at.
    """
    return (
        rule.op_kind == "foreign"
        or op.primitive in _BY_PARTS
        or (op.primitive == "reduce_window" and len(op.outputs) > 1)
    )


def _primitive(op: Any) -> str:
    """The primitive's name, of an op or of an equation."""
    return getattr(op.primitive, "name", op.primitive)


def registered() -> dict[str, str]:
    """The text of every registered rule by name, in alphabetical order."""
    return {name: _PATTERNS[name].text for name in sorted(_PATTERNS)}


def foreign(op: Op) -> bool:
    """Whether an op is a foreign call, or runs by a rule that the user registered."""
    return op.primitive in CALLS or op.primitive in _PATTERNS


def rule_name(op: Op) -> str:
    """The name under which the rule of an op without a built-in rule is looked up."""
    params, primitive = op.params, _primitive(op)
    if primitive == "ffi_call":
        return str(params["target_name"])
    if primitive == "pallas_call":
        return str(params.get("name") or params["jaxpr"].debug_info.func_name)
    return primitive


def registered_rule(
    name: str, op: Op, operands: tuple[Shape, ...], results: tuple[Shape, ...]
) -> FactorRule | None:
    """The user's rule for an op of these shapes; None if there is none of the name.

    Raises:
        InputError: The rule does not fit the shapes.
    """
    pattern = _PATTERNS.get(name)
    if pattern is None:
        return None
    estimate = op.params.get("cost_estimate")
    flops = float(estimate.flops) if estimate is not None else None
    return fit(pattern, operands, results, op.source or op.address, flops)


def parse(name: str, text: str) -> Pattern:
    """Reads a rule's text.

    Raises:
        InputError: It is no rule.

    >>> parse("norm", "b (h d), d -> b (h d); blocked d").operands
    ((('b',), ('h', 'd')), (('d',),))
    """
    bare = Pattern(name, text, (), ())
    body, *clauses = text.split(";")
    left, arrow, right = body.partition("->")
    if not arrow:
        bare.fail("there is no '->' between operands and results")

    def arrays(part: str) -> tuple[tuple[Names, ...], ...]:
        words = part.split(",") if part.strip() else []
        return tuple(_dims(bare, word) for word in words)

    operands, results = arrays(left), arrays(right)
    if not results:
        bare.fail("no result stands behind '->'")
    kinds: dict[str, FactorKind] = {}
    halos: dict[str, Halo] = {}
    flops: float | None = None
    known = {n for dims in (*operands, *results) for dim in dims for n in dim}
    for clause in clauses:
        kind, *_ = (*clause.split(), "")
        # A halo is one word, however it is spaced.
        rest = re.sub(r"\s*([(,)])\s*", r"\1", clause.strip()[len(kind) :])
        words = rest.replace(")", ") ").split()
        if kind == "flops":
            try:
                [number] = words
                flops = float(number)
            except ValueError:
                bare.fail(f"'flops' is followed by {rest.strip()!r}, not one number")
            if flops < 0:
                bare.fail(f"{flops:g} operations per point are less than none")
            continue
        if kind not in ("blocked", "reduce", "shift"):
            bare.fail(f"{kind!r} is none of blocked, reduce, shift and flops")
        if not words:
            bare.fail(f"{kind!r} is followed by no name")
        for word in words:
            found = _WORD.fullmatch(word)
            if found is None:
                bare.fail(f"{word!r} behind {kind!r} is no name")
            factor, low, high = found.groups()
            if factor not in known:
                bare.fail(f"{factor!r} is {kind}, but it is no dim of any array")
            if factor in kinds:
                bare.fail(f"{factor!r} is both {kinds[factor]} and {kind}")
            if (low is not None) != (kind == "shift"):
                bare.fail(
                    f"{word!r}: a shift, and only a shift, says how many elements of "
                    "the lower and the upper neighbour it needs"
                )
            kinds[factor] = kind
            if low is not None:
                halos[factor] = (int(low), int(high))
    pattern = Pattern(name, text, operands, results, kinds, halos, flops)
    _check_kinds(pattern)
    return pattern


def _dims(bare: Pattern, word: str) -> tuple[Names, ...]:
    if word.strip() == ".":
        return ()
    dims: list[Names] = []
    for many, one, unit, wrong in _DIM.findall(word):
        if wrong:
            bare.fail(f"{wrong!r} in {word.strip()!r} is no name of a dim")
        dims.append(() if unit else tuple(many.split()) or (one,))
    if not dims:
        bare.fail("an array has no dims between two commas; a scalar is written '.'")
    flat = [name for dim in dims for name in dim]
    for name in flat:
        if flat.count(name) > 1:
            bare.fail(f"{name!r} stands twice in {word.strip()!r}")
    return tuple(dims)


def _check_kinds(pattern: Pattern) -> None:
    """Every name comes from somewhere and goes somewhere, or says why not."""
    read = {n for dims in pattern.operands for dim in dims for n in dim}
    made = {n for dims in pattern.results for dim in dims for n in dim}
    for name in sorted(read | made):
        kind = pattern.kinds.get(name, "pass")
        if kind == "reduce" and name in made:
            pattern.fail(f"{name!r} is reduced, yet it is a dim of a result")
        if kind in ("pass", "shift") and name not in made:
            pattern.fail(
                f"{name!r} is a dim of no result: is it summed up (reduce {name}), or "
                f"needed whole (blocked {name})?"
            )
        if kind in ("pass", "shift") and name not in read:
            pattern.fail(
                f"{name!r} is a dim of no operand, so a call cannot know which part "
                f"of it to make: write blocked {name}"
            )


def fit(
    pattern: Pattern,
    operands: tuple[Shape, ...],
    results: tuple[Shape, ...],
    where: str,
    flops: float | None = None,
) -> FactorRule:
    """The factor rule of a pattern for given shapes.

    Args:
        pattern: The parsed rule.
        operands: Global shapes.
        results: Global shapes.
        where: The op, for messages.
        flops: Operations of the whole call, if something else than the rule says so.

    Raises:
        InputError: It does not fit.

    >>> pattern = parse("k", "b (h d) -> b h; blocked d")
    >>> fit(pattern, ((4, 6),), ((4, 2),), "model.py:3").text
    'i (jk) -> i j {i=4 j=2 k=3} blocked k'
    """
    for what, names, shapes in (
        ("operands", pattern.operands, operands),
        ("results", pattern.results, results),
    ):
        if len(names) != len(shapes):
            pattern.fail(
                f"it has {len(names)} {what}, but the call at {where} has "
                f"{len(shapes)}: {', '.join(map(str, shapes))}"
            )
        for k, (named, shape) in enumerate(zip(names, shapes, strict=True)):
            if len(named) != len(shape):
                pattern.fail(
                    f"number {k} of its {what} has {len(named)} dims, but at {where} "
                    f"the shape is {shape}"
                )
    sizes = _sizes(pattern, operands, results, where)
    factors = Factors()
    of_name: dict[str, Dim] = {
        name: factors.new(
            size, pattern.kinds.get(name, "pass"), pattern.halos.get(name, (0, 0))
        )
        for name, size in sizes.items()
    }

    def dims(names: Sequence[Names], shape: Shape) -> tuple[Dim, ...]:
        return tuple(
            tuple(f for name in dim for f in of_name[name]) if size > 1 else ()
            for dim, size in zip(names, shape, strict=True)
        )

    told = pattern.flops_per_point
    if told is not None:
        flops = told * prod(factors.sizes)
    return factors.rule(
        [dims(n, s) for n, s in zip(pattern.operands, operands, strict=True)],
        [dims(n, s) for n, s in zip(pattern.results, results, strict=True)],
        "foreign",
        flops=flops or 0.0,
    )


def _sizes(
    pattern: Pattern,
    operands: tuple[Shape, ...],
    results: tuple[Shape, ...],
    where: str,
) -> dict[str, int]:
    """Size per name, in order of first appearance.

    A dim of size one may be read over and over along a longer one. Dims of a blocked
    or shifted name may differ; the result's counts.
    """
    slots: list[tuple[Names, int]] = [
        (names, size)
        # Results first: where sizes may differ, theirs is kept.
        for arrays, shapes in (
            (pattern.results, results),
            (pattern.operands, operands),
        )
        for dims, shape in zip(arrays, shapes, strict=True)
        for names, size in zip(dims, shape, strict=True)
    ]
    sizes: dict[str, int] = {}
    for names, size in slots:
        if len(names) == 1:
            [name] = names
            old = sizes.get(name, 1)
            loose = pattern.kinds.get(name) in ("blocked", "shift")
            if 1 not in (old, size) and old != size and not loose:
                pattern.fail(f"{name!r} is {old} and {size} at {where}")
            if old == 1:
                sizes[name] = size
    for _ in slots:  # a compound dim may need the sizes that another one gives
        for names, size in slots:
            unknown = [name for name in names if name not in sizes]
            if len(names) > 1 and len(unknown) == 1:
                rest = prod(sizes[name] for name in names if name in sizes)
                if not rest or size % rest:
                    pattern.fail(f"a dim of {size} at {where} does not hold {rest}")
                sizes[unknown[0]] = size // rest
    order = {
        name: None
        for dims in (*pattern.operands, *pattern.results)
        for dim in dims
        for name in dim
    }
    missing = [name for name in order if name not in sizes]
    if missing:
        pattern.fail(
            f"the size of {missing[0]!r} cannot be told at {where}: it stands nowhere "
            "alone, and its dims have another unknown name"
        )
    for names, size in slots:
        if not names and size != 1:
            pattern.fail(f"a dim written 1 is {size} at {where}")
        if len(names) > 1 and prod(sizes[name] for name in names) != size:
            pattern.fail(f"({' '.join(names)}) is not {size} at {where}")
    return {name: sizes[name] for name in order}
