"""Which primitive has which rule.

A rule depends on shapes and on the few parameters that its function says it reads.
Ops that agree in these share one rule object: a program of thousands of layers has
some hundred rules, and later passes can treat all ops of one rule at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from autoshard.ir.errors import RuleMissingError
from autoshard.ir.program import Op, Program
from autoshard.ir.signatures import IGNORED
from autoshard.rules.core import FactorRule, Factors, RuleContext, Shape

RuleFn = Callable[[RuleContext], FactorRule]


@dataclass(frozen=True, slots=True)
class Example:
    """An op to show a rule by: its parameters and shapes."""

    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered rule function.

    Attributes:
        fn: The function.
        reads: The parameters it reads; all that the memo and the function see.
        family: The module that holds it.
        example: See `Example`.
    """

    fn: RuleFn
    reads: tuple[str, ...]
    family: str
    example: Example


DTYPE = "operand_dtype"
"""What a rule function reads to learn the first operand's dtype, beside parameters."""

_RULES: dict[str, Entry] = {}


def register(
    *primitives: str, example: Example, reads: Sequence[str] = ()
) -> Callable[[RuleFn], RuleFn]:
    """Registers the rule function of one or more primitives.

    Args:
        primitives: Their names.
        example: An op that every one of them could be.
        reads: Parameters that the function reads; they must be hashable.

    Raises:
        ValueError: A primitive has a rule already.
    """

    def add(fn: RuleFn) -> RuleFn:
        for primitive in primitives:
            if primitive in _RULES:
                raise ValueError(f"primitive {primitive!r} already has a rule")
            family = fn.__module__.rpartition(".")[2]
            _RULES[primitive] = Entry(fn, tuple(reads), family, example)
        return fn

    return add


def entries() -> dict[str, Entry]:
    """The registered rule functions by primitive, in alphabetical order."""
    return dict(sorted(_RULES.items()))


def covered() -> list[str]:
    """Names of all primitives that have a rule.

    >>> {"dot_general", "add", "gather"} <= set(covered())
    True
    """
    return sorted(_RULES)


def example_rule(primitive: str) -> FactorRule:
    """The rule of a primitive's example.

    >>> example_rule("transpose").text
    'i j k -> k i j {i=8 j=4 k=2}'
    """
    entry = _RULES[primitive]
    params = {name: entry.example.params.get(name) for name in entry.reads}
    context = RuleContext(
        primitive, params, entry.example.operands, entry.example.results
    )
    return entry.fn(context)


@functools.lru_cache(maxsize=1 << 16)
def _one(rule: FactorRule) -> FactorRule:
    """The first of all equal rules."""
    return rule


@functools.lru_cache(maxsize=1 << 16)
def _built(
    entry_of: str, params: tuple[Any, ...], operands: Any, results: Any
) -> FactorRule:
    entry = _RULES[entry_of]
    named = dict(zip(entry.reads, params, strict=True))
    return _one(entry.fn(RuleContext(entry_of, named, operands, results)))


def shapes_of(program: Program, op: Op) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """Shapes of an op's operands and of its results."""
    values = program.values
    operands = (
        op.operand_shapes  # a literal has a shape, but is no value of the program
        if -1 in op.inputs
        else tuple([values[v].shape for v in op.inputs])
    )
    return operands, tuple([values[v].shape for v in op.outputs])


def _params(program: Program, op: Op, entry: Entry) -> tuple[Any, ...]:
    params = op.params
    found = tuple([params.get(name) for name in entry.reads])
    if DTYPE in entry.reads and op.inputs[0] >= 0:
        dtype = str(program.values[op.inputs[0]].dtype)
        found = tuple(
            dtype if name == DTYPE else given
            for name, given in zip(entry.reads, found, strict=True)
        )
    return found


def rules_of(
    program: Program,
    replicate: AbstractSet[str] = frozenset(),
    *,
    representative: Sequence[int] = (),
) -> tuple[FactorRule, ...]:
    """The factor rule of every op, in their order; equal rules are one object.

    Args:
        program: The program.
        replicate: Primitives without a rule that every device may compute whole.
        representative: Per op an earlier one, or itself, that has the same rule, as
            `autoshard.ir.ties.find_blocks` finds them; nothing is known if empty.

    Raises:
        RuleMissingError: A primitive has no rule.

    >>> import jax
    >>> from autoshard.ir.program import build
    >>> program = build(jax.make_jaxpr(lambda x: jax.lax.sin(jax.lax.sin(x)))(1.0), [])
    >>> first, second = rules_of(program)
    >>> first is second
    True
    """
    values, rules, built = program.values, _RULES, _built
    found: list[FactorRule] = []
    for op, first in zip(
        program.ops, representative or range(len(program.ops)), strict=True
    ):
        if first < op.index and op.primitive not in IGNORED:
            found.append(found[first])
            continue
        entry = rules.get(op.primitive)
        if entry is None:
            found.append(rule_of(program, op, replicate))
            continue
        inputs = op.inputs
        found.append(
            built(
                op.primitive,
                _params(program, op, entry) if entry.reads else (),
                # As in `shapes_of`: written out, for this loop runs once per op.
                op.operand_shapes
                if -1 in inputs
                else tuple([values[v].shape for v in inputs]),
                tuple([values[v].shape for v in op.outputs]),
            )
        )
    return tuple(found)


def rule_of(
    program: Program, op: Op, replicate: AbstractSet[str] = frozenset()
) -> FactorRule:
    """The factor rule of one op.

    Args:
        program: The program it is part of.
        op: The op.
        replicate: Primitives without a rule that every device may compute whole, by
            the name of the primitive or of the kernel it calls.

    Raises:
        RuleMissingError: Its primitive has none, and is not in `replicate`.
        InputError: It is a foreign call whose registered rule does not fit its shapes.
    """
    operands, results = shapes_of(program, op)
    entry = _RULES.get(op.primitive)
    if entry is not None:
        return _built(op.primitive, _params(program, op, entry), operands, results)
    # Foreign rules are texts of the user's; that module builds on this one.
    from autoshard.rules.foreign import registered_rule, rule_name

    name = rule_name(op)
    where = op.source or op.address
    rule = registered_rule(name, op, operands, results)
    if rule is not None:
        return _one(rule)
    if replicate & {name, op.primitive}:
        return _one(replicated(RuleContext(op.primitive, {}, operands, results)))
    what = f"primitive {op.primitive!r}"
    if name != op.primitive:
        what += f", which calls {name!r},"
    shapes = ", ".join(map(str, operands)) + " -> " + ", ".join(map(str, results))
    raise RuleMissingError(
        f"{what} at {where} has no factor rule, so how it shards and what it costs is "
        f"unknown (shapes {shapes}). Two ways out: say which dims are the same index, "
        f'autoshard.register_rule({name!r}, "i j, j k -> i k; reduce j"), or let every '
        f"device compute the whole of it: --replicate {name} on the command line, "
        f"replicate=[{name!r}] of search, replicate = [{_quoted(name)}] in a strategy "
        "file."
    )


def _quoted(name: str) -> str:
    return f'"{name}"'


def replicated(ctx: RuleContext) -> FactorRule:
    """The rule of an op that every device computes whole: all of its dims are blocked.

    Nothing is known of it, so its dims are tied to none.

    >>> replicated(RuleContext("mystery", {}, ((4, 2),), ((4,),))).text
    'i j -> k {i=4 j=2 k=4} blocked i j k replicated'
    """
    factors = Factors()
    return factors.rule(
        [factors.dims(shape, "blocked") for shape in ctx.operands],
        [factors.dims(shape, "blocked") for shape in ctx.results],
        "replicated",
    )
