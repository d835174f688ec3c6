"""Holding a rule against what its op computes.

A rule is right if cutting the op along any of its free factors and joining the pieces
gives the whole. That needs no mesh and no second rule, so it finds mistakes in the
rules of this package and in those that users write for their own kernels alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autoshard.ir.errors import InputError
from autoshard.ir.program import Op, Program
from autoshard.rules.core import Dim, FactorRule, letter
from autoshard.rules.foreign import foreign, registered, rule_name
from autoshard.rules.pieces import Arrays, Whole, count, cut, has_halo, joined
from autoshard.rules.registry import rule_of, shapes_of
from autoshard.rules.runs import runner, sample_operands

MOST_BYTES = 1 << 28
"""Operands larger than this are not made up to try a rule on."""

UNTIED = {("ragged_dot_general", 2): "groups are counted from the first row on"}
"""Operands of a primitive with a dim that no factor counts, and why."""

Order = Callable[[np.ndarray[Any, Any]], Any]
"""`places from 1 on -> numbers` along a dim."""

_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "max": jnp.maximum,
    "min": jnp.minimum,
    "prod": jnp.multiply,
    "mul": jnp.multiply,
    "and": jnp.logical_and,
    "or": jnp.logical_or,
    "xor": jnp.logical_xor,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a rule.

    Attributes:
        factor: The factor that is to blame; None if it is a dim without one.
        what: In words.
    """

    factor: int | None
    what: str


def check_rule(
    program: Program,
    op: Op,
    rule: FactorRule | None = None,
    operands: Sequence[Any] | None = None,
) -> tuple[str, ...]:
    """Runs an op whole and in pieces, and stops if its rule has a mistake.

    A rule that is too careful passes: see `loose_factors`.

    Args:
        program: A built program; its shapes should be small.
        op: One of its ops.
        rule: The rule to try; the registered one if None.
        operands: What to run it on; random numbers if None.

    Returns:
        What could not be tried, and why; empty if all was.

    Raises:
        InputError: The rule is wrong, or the op cannot be run here.

    >>> from autoshard.ir.program import build
    >>> program = build(jax.make_jaxpr(lambda x: x.sum(1))(jnp.ones((4, 6))), [])
    >>> check_rule(program, program.ops[0])
    ()
    >>> rule = rule_of(program, program.ops[0])
    >>> check_rule(program, program.ops[0], replace(rule, kinds=("pass", "pass")))
    Traceback (most recent call last):
    ...
    autoshard.ir.errors.InputError: the rule of 'reduce_sum' at ... factor j is pass...
    """
    rule = rule_of(program, op) if rule is None else rule
    found = fault(program, op, rule, operands)
    if isinstance(found, tuple):
        return found
    name = rule_name(op)
    text = registered().get(name) if foreign(op) else None
    given = f"{text!r}, read as {rule.text!r}," if text else f"{rule.text!r},"
    way_out = (
        f"Correct the text given to autoshard.register_rule({name!r}, ...)"
        if text
        else f"Correct the function that is registered for {name!r}"
    )
    raise InputError(
        f"the rule of {name!r} at {op.source or op.address}, {given} is wrong: "
        f"{found.what}. Each free factor must be such that the op, run on pieces of "
        f"its operands along it, gives pieces of its results (pass, shift) or partial "
        f"results (reduce). {way_out}; a factor of which every device needs all is "
        "blocked."
    )


def fault(
    program: Program,
    op: Op,
    rule: FactorRule,
    operands: Sequence[Any] | None = None,
) -> Fault | tuple[str, ...]:
    """The first mistake of a rule, or what could not be tried; see `check_rule`."""
    wrong = misfit(program, op, rule)
    if wrong is not None:
        return wrong
    run = runner(program, op)
    if run.whole_only:
        for f, kind in enumerate(rule.kinds):
            if kind != "blocked":
                return Fault(f, f"factor {letter(f)} is {kind}, but {run.whole_only}")
        return ()
    free = [f for f, kind in enumerate(rule.kinds) if kind != "blocked"]
    if run.unchecked:
        return (f"{op.primitive}: {run.unchecked}",) if free else ()
    skipped = []
    wholes = list(_wholes(program, op, rule, run.run, operands)) if free else []
    for f in free:
        reason = _untried(op, rule, f, run.made_alone)
        if reason:
            skipped.append(f"{op.primitive}, factor {letter(f)}: {reason}")
            continue
        for whole in wholes if has_halo(rule, f) else wholes[:1]:
            wrong = _wrong_factor(whole, rule, f, built_in=not foreign(op))
            if wrong is not None:
                return Fault(f, wrong)
    return tuple(skipped)


def loose_factors(
    program: Program,
    op: Op,
    rule: FactorRule,
    operands: Sequence[Any] | None = None,
) -> dict[int, str]:
    """Factors that are blocked without need, or whose halo is longer than needed.

    Such a rule is safe, and makes plans that move more than they must.

    Args:
        program: A built program.
        op: One of its ops.
        rule: Its rule, in which `check_rule` finds no mistake.
        operands: What to run the op on; random numbers if None.

    Returns:
        What each of them could be.

    >>> from autoshard.ir.program import build
    >>> program = build(jax.make_jaxpr(lambda x: x.sum(1))(jnp.ones((4, 6))), [])
    >>> rule = rule_of(program, program.ops[0])
    >>> careful = replace(rule, kinds=("blocked", "reduce"))
    >>> loose_factors(program, program.ops[0], careful)
    {0: 'pass'}
    """
    run = runner(program, op)
    if run.whole_only or run.unchecked:
        return {}
    loose: dict[int, str] = {}
    wholes = list(_wholes(program, op, rule, run.run, operands))
    # Indices may have pointed into one piece only.
    others = list(_wholes(program, op, rule, run.run, None))[:1]
    made = {f for dims in rule.results for dim in dims for f in dim}
    for f, kind in enumerate(rule.kinds):
        if _untried(op, rule, f, run.made_alone):
            continue
        for freer, name in _freer(rule, f, "pass" if f in made else "reduce"):
            if loose.get(f) or (kind == "blocked" and rule.sizes[f] < 2):
                continue
            tried = wholes if has_halo(freer, f) else (*wholes[:1], *others)
            if all(
                _wrong_factor(whole, freer, f, built_in=not foreign(op)) is None
                for whole in tried
            ):
                loose[f] = name
    return loose


def _freer(rule: FactorRule, f: int, free: Any) -> Iterator[tuple[FactorRule, str]]:
    """The rule with one factor freer than it is."""
    if rule.kinds[f] == "blocked":
        kinds = tuple(free if k == f else kind for k, kind in enumerate(rule.kinds))
        yield replace(rule, kinds=kinds), free
    low, high = rule.halos[f] if rule.halos else (0, 0)
    for halo in ((low - 1, high), (low, high - 1)):
        if min(halo) >= 0:
            halos = tuple(halo if k == f else h for k, h in enumerate(rule.halos))
            yield replace(rule, halos=halos), f"{rule.kinds[f]} {halo}"


def misfit(program: Program, op: Op, rule: FactorRule) -> Fault | None:
    """What in a rule cannot be for the shapes of its op, whatever the op computes."""
    operands, results = shapes_of(program, op)
    for what, dims, shapes in (
        ("operands", rule.operands, operands),
        ("results", rule.results, results),
    ):
        if len(dims) != len(shapes):
            return Fault(None, f"it has {len(dims)} {what}, the op {len(shapes)}")
    slots, shapes = (*rule.operands, *rule.results), (*operands, *results)
    largest: dict[int, int] = {}
    for k, (dims, shape) in enumerate(zip(slots, shapes, strict=True)):
        ahead = len(rule.operands)
        what = f"operand {k}" if k < ahead else f"result {k - ahead}"
        if len(dims) != len(shape):
            return Fault(None, f"{what} has {len(dims)} dims, the op's {shape}")
        flat = [f for dim in dims for f in dim]
        for f in flat:
            if flat.count(f) > 1:
                return Fault(f, f"factor {letter(f)} stands twice in {what}")
            if rule.kinds[f] == "reduce" and k >= ahead:
                return Fault(f, f"factor {letter(f)} is reduced, yet {what} has it")
        for d, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            untied = (op.primitive, k) in UNTIED
            wrong = None if untied else _wrong_dim(rule, dim, size, largest)
            if wrong is not None:
                return replace(wrong, what=f"dim {d} of {what}, {shape}, {wrong.what}")
    for f, size in enumerate(rule.sizes):
        if largest.get(f, size) != size:
            return Fault(
                f, f"factor {letter(f)} is {size}, but its dims are {largest[f]}"
            )
    return None


def _wrong_dim(
    rule: FactorRule, dim: Dim, size: int, largest: dict[int, int]
) -> Fault | None:
    if not dim:
        wrong = "has no factor, so nothing says how it is sharded"
        return Fault(None, wrong) if size != 1 else None
    [f, *others] = dim
    if others:
        held = math.prod(rule.sizes[f] for f in dim)
        wrong = f"is made of factors that hold {held} elements"
        return Fault(f, wrong) if held != size else None
    if rule.kinds[f] == "blocked":
        largest[f] = max(size, largest.get(f, 0))
    elif not has_halo(rule, f) and rule.sizes[f] != size:
        return Fault(f, f"has the factor {letter(f)} of size {rule.sizes[f]}")
    return None


def _untried(op: Op, rule: FactorRule, f: int, made_alone: str) -> str:
    """Why a factor is not tried; empty if it is."""
    read = any(f in dim for dims in rule.operands for dim in dims)
    if made_alone and not read:
        return made_alone
    if has_halo(rule, f) and foreign(op):
        return "how a foreign call takes its neighbours' elements is not known"
    if 0 in rule.sizes:
        return "it is empty"
    return ""


# -- running -----------------------------------------------------------------------


def _wholes(
    program: Program,
    op: Op,
    rule: FactorRule,
    run: Callable[[Arrays, dict[str, Any]], Arrays],
    operands: Sequence[Any] | None,
) -> Iterator[Whole]:
    """The op, run on the operands; where it has a halo, on others too."""
    size_bytes = sum(
        8 * math.prod(shape) for shapes in shapes_of(program, op) for shape in shapes
    )
    where = op.source or op.address
    if size_bytes > MOST_BYTES:
        raise InputError(
            f"{op.primitive!r} at {where} works on about {size_bytes:.2g} bytes; a "
            f"rule is tried on at most {MOST_BYTES:.2g}. Trace the program with "
            "smaller arguments."
        )
    given = list(operands) if operands is not None else sample_operands(op)
    sets = [given]
    if any(has_halo(rule, f) for f in range(len(rule.sizes))):
        sets += [_ordered(given, order) for order in _orders(op)]
        sets += [[_mixed(x, seed) for x in given] for seed in range(2)]
    for operands_ in sets:
        try:
            results = run(operands_, dict(op.params))
        except Exception as error:
            raise InputError(
                f"{op.primitive!r} at {where} cannot be run here, so its rule cannot "
                f"be tried: {type(error).__name__}: {error}"
            ) from error
        yield Whole(op.primitive, dict(op.params), run, operands_, results)


def _ordered(operands: Arrays, order: Order) -> Arrays:
    """Real operands with the elements of each dim in an order."""

    def one(x: Any) -> Any:
        if not np.ndim(x) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        total = sum(
            order(np.arange(1.0, n + 1)).reshape((n,) + (1,) * (np.ndim(x) - d - 1))
            for d, n in enumerate(x.shape)
        )
        return np.broadcast_to(total, x.shape).astype(x.dtype)

    return [one(x) for x in operands]


def _orders(op: Op) -> Iterator[Order]:
    """Rising, falling and jumping; for where a gradient goes, valleys.

    What a piece lacks of its neighbours shows in the largest of a window only if it is
    the largest there. Where a gradient goes shows it only if the next largest is a row
    of the piece: a window's ends are its two largest if it has a valley between them.
    """
    yield lambda rows: rows
    yield lambda rows: -rows
    yield lambda rows: np.where(rows % 2 == 0, rows, -rows)
    if op.primitive == "select_and_scatter_add":
        longest = max(size for shape in op.operand_shapes for size in shape)
        for tilt in (0.1, -0.1):
            for middle in range(2, 2 * longest + 1):
                yield functools.partial(_valley, middle / 2, tilt)


def _valley(middle: float, tilt: float, rows: Any) -> Any:
    return np.abs(rows - middle) + tilt * rows


def _mixed(x: Any, seed: int) -> Any:
    """The elements of a real operand in another order."""
    if not np.ndim(x) or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    flat = np.random.default_rng(seed).permutation(np.asarray(x).ravel())
    return flat.reshape(x.shape)


def _wrong_factor(
    whole: Whole, rule: FactorRule, f: int, *, built_in: bool
) -> str | None:
    """What shows that a factor is not what the rule says; None if it is."""
    kind, name = rule.kinds[f], letter(f)
    if has_halo(rule, f):
        kind += "({},{})".format(*rule.halos[f])
    try:
        parts = [cut(whole, rule, f, which) for which in range(count(rule, f))]
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        return (
            f"factor {name} is {kind}, but a piece along it cannot be computed "
            f"({type(error).__name__}: {first_line})"
        )
    for k, (*got, expected, dims) in enumerate(
        zip(*parts, whole.results, rule.results, strict=True)
    ):
        if any(f in dim for dim in dims):
            try:
                made, how = joined(got, expected, dims, rule, f), "set side by side"
            except ValueError:
                return f"factor {name} is {kind}, but result {k} does not divide by it"
        elif rule.kinds[f] == "reduce":
            combine = _combine(whole.name) if built_in else jnp.add
            made, how = functools.reduce(combine, got), "combined"
        else:
            if not all(_same(x, got[0], whole, exact=True) for x in got):
                return (
                    f"factor {name} is {kind} and no dim of result {k}, yet each piece "
                    f"along it gives another result: is it summed up (reduce), or "
                    "needed whole (blocked)?"
                )
            made, how = got[0], "each"
        if not _same(made, expected, whole):
            return (
                f"factor {name} is {kind}, but the pieces along it, {how}, are not "
                f"result {k}"
            )
    return None


def _combine(primitive: str) -> Callable[[Any, Any], Any]:
    """Reductions, windows and scatters end in the name of what they do."""
    return _COMBINE.get(primitive.replace("-", "_").rpartition("_")[2], jnp.add)


def _same(a: Any, b: Any, whole: Whole, *, exact: bool = False) -> bool:
    a, b = _numbers(a), _numbers(b)
    if a.shape != b.shape:
        return False
    if exact or not np.issubdtype(b.dtype, np.inexact):
        return np.array_equal(a, b, equal_nan=np.issubdtype(b.dtype, np.inexact))
    return np.allclose(a, b, rtol=_tolerance(whole), atol=1e-6, equal_nan=True)


def _numbers(x: Any) -> np.ndarray[Any, Any]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.floating):  # NumPy cannot compare the short ones
        return np.asarray(x).astype(np.float64)
    return np.asarray(x)


def _tolerance(whole: Whole) -> float:
    """Sums in another order differ by some units in the last place."""
    floats = [
        x.dtype
        for x in (*whole.operands, *whole.results)
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    # Elements of 8 bits are multiplied as such of 16.
    widest = max((float(jnp.finfo(d).eps) for d in floats), default=0.0)
    return max(2e-5, min(4 * widest, 1e-2))
