"""A program as arrays of integers, with a signature per op.

Ops with the same signature do the same with arrays of the same types; only where the
arrays come from may differ. Everything here is linear in the program, for programs of
hundreds of thousands of ops.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from autoshard.ir.values import Op, Program

Ints = np.ndarray
"""int64, or bool where a mask is meant."""

IGNORED = {
    "autoshard_annotate": frozenset({"path"}),
    "name": frozenset({"name"}),
    "slice": frozenset({"start_indices", "limit_indices"}),
}
"""Parameters that name an op rather than say what it does, or are read otherwise."""

_OUTPUT_CODE = -2
"""Stands for the end of the program among the consumers of a value."""


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """A program's wiring as flat arrays.

    Per-value arrays have one element more than there are values; the last one stands
    for literals, whose value index is -1.

    Attributes:
        primitive: Per op, a number for primitive and parameters.
        code: Per op, the same for ops whose operand and result types agree, too.
        begin: Per op, where its operands begin in `taken`; one more at the end.
        taken: Value per operand, then per result that another op makes (what a loop
            carries is made by two links).
        taker: Op per element of `taken`.
        made: Value per result, in order of ops, without those of other ops.
        made_begin: Per op, where its results begin in `made`; one more at the end.
        kind: Per value, a number for shape and type.
        producer: Per value, the op that makes it, -1 for inputs and constants.
        rank: Per value, which result of its producer it is.
        consumers: Per value, a hash of all that consumes it: codes and operand slots.
        region: Per op, its region.
    """

    primitive: Ints
    code: Ints
    begin: Ints
    taken: Ints
    taker: Ints
    made: Ints
    made_begin: Ints
    kind: Ints
    producer: Ints
    rank: Ints
    consumers: np.ndarray
    region: Ints


def flatten(program: Program) -> Flat:
    """Reads a program into arrays.

    Args:
        program: The program.

    Returns:
        Its wiring and signatures.

    >>> import jax, jax.numpy as jnp
    >>> from autoshard.ir.program import build
    >>> jaxpr = jax.make_jaxpr(lambda x: jnp.sin(jnp.sin(jnp.cos(x))))(1.0)
    >>> flatten(build(jaxpr, ["x"])).code.tolist()
    [0, 1, 1]
    """
    values, ops = program.values, program.ops
    types: dict[Any, int] = {}
    kind = [types.setdefault((v.shape, v.dtype), len(types)) for v in values]
    producer = np.array([v.producer for v in values] + [-1], dtype=np.int64)
    operands = _chained([op.inputs for op in ops])
    results = _chained([op.outputs for op in ops])
    n = len(ops)
    operand_op, result_op = _owners(operands[0]), _owners(results[0])
    own = producer[results[1]] == result_op
    # An operand's place within its op; results of other ops come after the operands.
    slot = np.concatenate([_places(operands[0]), _places(results[0])[~own] + _RESULTS])
    taken = np.concatenate([operands[1], results[1][~own]])
    taker = np.concatenate([operand_op, result_op[~own]])
    order = np.argsort(taker, kind="stable")
    taken, taker, slot = taken[order], taker[order], slot[order]
    rank = np.zeros(len(producer), dtype=np.int64)
    rank[results[1][own]] = _places(results[0])[own]

    kinds = np.array([*kind, -1], dtype=np.int64)
    primitive = _primitives(ops)
    # Types are mixed into a hash here; who relies on equal codes compares them exactly.
    mixed = mix(primitive) + mix(np.diff(operands[0])) * _ODD
    np.add.at(mixed, operand_op, hashed(kinds[operands[1]], _places(operands[0])))
    # What another op makes, this one takes: so do all that are like it.
    after = _places(results[0]) + np.where(own, _RESULTS, 2 * _RESULTS)
    np.add.at(mixed, result_op, hashed(kinds[results[1]], after))
    code = _numbered(mixed)
    consumers = np.zeros(len(producer), dtype=np.uint64)
    np.add.at(consumers, taken, hashed(code[taker], slot))
    ends = np.array(program.outputs, dtype=np.int64)
    np.add.at(consumers, ends, hashed(np.full(len(ends), _OUTPUT_CODE), 0))
    return Flat(
        primitive=primitive,
        code=code,
        begin=np.searchsorted(taker, np.arange(n + 1)),
        taken=taken,
        taker=taker,
        made=results[1][own],
        made_begin=np.searchsorted(result_op[own], np.arange(n + 1)),
        kind=kinds,
        producer=producer,
        rank=rank,
        consumers=consumers,
        region=np.array([op.region for op in ops], dtype=np.int64),
    )


_ODD = np.uint64(0xBF58476D1CE4E5B9)
_RESULTS = 1 << 33
"""Place of the first result; no op has as many operands."""


def mix(numbers: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each number (the finaliser of splitmix64)."""
    x = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * _ODD
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(numbers: Ints, places: Ints | int) -> np.ndarray:
    """A hash of each number at its place among the operands, then the results."""
    return mix(numbers * (1 << 34) + places)


def refined(flat: Flat, classes: Ints, free: Ints) -> Ints:
    """Codes that also tell operands of different classes apart.

    Args:
        flat: The program.
        classes: Class per value, -1 where it has none, as in `Flat`.
        free: Mask of the ops that are wanted.

    Returns:
        Code per op; -1 for the others.
    """
    mixed = mix(flat.code)
    known = classes[flat.taken] >= 0
    place = np.arange(len(flat.taken)) - flat.begin[flat.taker]
    np.add.at(
        mixed,
        flat.taker[known],
        hashed(classes[flat.taken][known], place[known]) * _ODD,
    )
    return np.where(free, _numbered(mixed), -1)


def _numbered(hashes: np.ndarray) -> Ints:
    """Equal hashes as equal small numbers, in order of first appearance."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[inverse.reshape(-1)]


def _chained(parts: list[tuple[int, ...]]) -> tuple[Ints, Ints]:
    """Where each part begins (and the last one ends), and all parts in a row."""
    begin = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=begin[1:])
    flat = np.fromiter(chain.from_iterable(parts), dtype=np.int64, count=int(begin[-1]))
    return begin, flat


def _owners(begin: Ints) -> Ints:
    return np.repeat(np.arange(len(begin) - 1), np.diff(begin))


def _places(begin: Ints) -> Ints:
    return np.arange(begin[-1]) - np.repeat(begin[:-1], np.diff(begin))


# -- primitives and parameters ---------------------------------------------------------


def _primitives(ops: tuple[Op, ...]) -> Ints:
    codes: dict[Any, int] = {}
    seen: dict[int, int] = {}
    plain: dict[str, bool] = {}
    texts: dict[int, str] = {}
    found = []
    for op in ops:
        name, params = op.primitive, op.params
        # A function that is traced once and called often has the same equations.
        equation = op.equation
        known = seen.get(id(equation))
        if known is not None and equation.primitive.name == name:
            found.append(known)
            continue
        if name not in plain:
            plain[name] = name not in IGNORED and all(map(_is_plain, params.values()))
        key: tuple[Any, ...]
        try:
            if plain[name]:
                key = (name, *params, *params.values())
                code = codes.setdefault(key, len(codes))
            else:
                key = _careful(op, texts)
                code = codes.setdefault(key, len(codes))
        except TypeError:  # something that cannot be hashed
            key = _careful(op, texts)
            code = codes.setdefault(key, len(codes))
        # A loop has one equation for all its links, and a call for its constraints.
        if equation is not None and equation.primitive.name == name:
            seen[id(equation)] = code
        found.append(code)
    return np.array(found, dtype=np.int64)


def _is_plain(param: Any) -> bool:
    """Whether equality of a parameter is equality of what it means."""
    return not (hasattr(param, "eqns") or hasattr(param, "jaxpr"))


def _careful(op: Op, texts: dict[int, str]) -> tuple[Any, ...]:
    """The key of an op with parameters that are to be ignored or compared by content.

    A jaxpr equals only itself, so it is compared as printed, once for each.
    """
    ignored = IGNORED.get(op.primitive, frozenset())
    key: list[Any] = [op.primitive]
    for name, param in op.params.items():
        if name in ignored:
            continue
        value = param
        if not _is_plain(param):
            value = texts.get(id(param))
            if value is None:
                value = texts[id(param)] = str(param)
        else:
            try:
                hash(param)
            except TypeError:
                # An array may be large, and is the same only if it is this one.
                value = (
                    id(param) if hasattr(param, "shape") else f"{type(param)}{param!r}"
                )
        key += (name, value)
    if op.primitive == "slice":
        key.append(_slice_key(op.params))
    return tuple(key)


def _slice_key(params: dict[str, Any]) -> tuple[Any, ...]:
    """Where a slice begins, but for the dims of which it takes one row.

    Layers may take their rows of one stack; a wider slice that begins elsewhere needs
    another part of its neighbours.
    """
    pairs = zip(params["start_indices"], params["limit_indices"], strict=True)
    return tuple([(0, 1) if b - a == 1 else (a, b) for a, b in pairs])
