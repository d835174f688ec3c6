"""One device's share of an op: its operands, its parameters, its results.

Nothing here asks a rule function: an op is cut along a factor as a rule says, the
primitive runs on the piece as a device would run it, and `rules.check` holds what the
pieces give against the whole. Cutting and padding is done by NumPy, which has nothing
to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from autoshard.ir.errors import InputError
from autoshard.rules.core import Dim, FactorRule, Halo, Shape

Arrays = list[Any]
Run = Callable[[Arrays, dict[str, Any]], Arrays]
"""`(operands, parameters) -> results` of an op, for operands of any size."""


@dataclass(frozen=True, slots=True)
class Whole:
    """An op that has run, to be cut.

    Attributes:
        name: Its primitive.
        params: Its parameters.
        run: See `Run`.
        operands: What it ran on.
        results: What came out.
    """

    name: str
    params: dict[str, Any]
    run: Run
    operands: Arrays
    results: Arrays


def count(rule: FactorRule, factor: int) -> int:
    """How many pieces a factor is cut into: two, or all if it is odd."""
    size = rule.sizes[factor]
    return 2 if size % 2 == 0 else size


def has_halo(rule: FactorRule, factor: int) -> bool:
    """Whether pieces along the factor lend each other rows, or could."""
    shifts = rule.kinds[factor] == "shift"
    return shifts or bool(rule.halos and any(rule.halos[factor]))


def cut(op: Whole, rule: FactorRule, factor: int, which: int) -> Arrays:
    """The results of piece number `which` of an op that is cut along a factor.

    Raises:
        ValueError: What the piece gives has not the shape that the rule says.
        Exception: Whatever the primitive raises where it refuses the piece.
    """
    if has_halo(rule, factor):
        return _with_halo(op, rule, factor, which)
    ways = count(rule, factor)
    operands = [
        _piece(x, dims, rule, factor, which, ways)
        for x, dims in zip(op.operands, rule.operands, strict=True)
    ]
    shapes = [
        _shape(x.shape, dims, factor, ways)
        for x, dims in zip(op.results, rule.results, strict=True)
    ]
    params, operands = _local(op, rule, operands, shapes, factor, which)
    ragged = op.name == "ragged_dot_general"
    if ragged:
        operands = _ragged(op, rule, operands, factor, which, ways)
    out = op.run(operands, params)
    if ragged and rule.results[0][0] == (factor,) and _own_groups(op.params):
        own = shapes[0][0]
        out = [out[0][which * own : (which + 1) * own]]
    if [x.shape for x in out] != shapes:
        raise ValueError(f"a piece gives {[x.shape for x in out]} in place of {shapes}")
    return out


def joined(
    parts: Arrays, whole: Any, dims: tuple[Dim, ...], rule: FactorRule, factor: int
) -> Any:
    """Pieces of a result, set side by side along a factor."""
    [d] = [d for d, dim in enumerate(dims) if factor in dim]
    sizes = [rule.sizes[f] for f in dims[d]]
    sizes = sizes if len(sizes) > 1 else [whole.shape[d]]
    at = dims[d].index(factor)
    sizes[at] //= len(parts)
    before, after = whole.shape[:d], whole.shape[d + 1 :]
    spread = [host(x).reshape(*before, *sizes, *after) for x in parts]
    join = np if isinstance(spread[0], np.ndarray) else jnp
    return join.concatenate(spread, d + at).reshape(whole.shape)


def host(x: Any) -> Any:
    """The same array as NumPy's; keys stay what they are."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else np.asarray(x)


def _rows(x: Any, d: int, begin: int, end: int) -> Any:
    return host(x)[(slice(None),) * d + (slice(begin, end),)]


def _shape(whole: Shape, dims: tuple[Dim, ...], factor: int, ways: int) -> Shape:
    return tuple(
        n // ways if factor in dim else n for n, dim in zip(whole, dims, strict=True)
    )


def _piece(
    x: Any, dims: tuple[Dim, ...], rule: FactorRule, factor: int, which: int, ways: int
) -> Any:
    """Part of a value; a factor may be one of several in a dim."""
    for d, dim in enumerate(dims):
        if factor in dim:
            sizes = [rule.sizes[f] for f in dim] if len(dim) > 1 else [x.shape[d]]
            spread = host(x).reshape(*x.shape[:d], *sizes, *x.shape[d + 1 :])
            at = d + dim.index(factor)
            own = sizes[dim.index(factor)] // ways
            part = _rows(spread, at, which * own, (which + 1) * own)
            return part.reshape(_shape(x.shape, dims, factor, ways))
    return x


def _local(
    op: Whole,
    rule: FactorRule,
    operands: Arrays,
    results: list[Shape],
    factor: int,
    which: int,
) -> tuple[dict[str, Any], Arrays]:
    """Parameters and operands of one piece, where they name sizes or positions."""
    name, params = op.name, dict(op.params)
    if name in ("broadcast_in_dim", "rng_uniform"):
        params["shape"] = results[0]
    elif name == "reshape":
        params["new_sizes"] = results[0]
    elif name == "tile":
        params["reps"] = tuple(
            n // m for n, m in zip(results[0], operands[0].shape, strict=True)
        )
    elif name == "slice":
        steps = params["strides"] or (1,) * len(results[0])
        params["limit_indices"] = tuple(
            lo + (n - 1) * step + 1
            for lo, n, step in zip(
                params["start_indices"], results[0], steps, strict=True
            )
        )
    elif name.startswith("reduce_window"):
        # A window over all of a dim is one over all of the piece.
        params["window_dimensions"] = tuple(
            n if m > 1 and factor in dim and rule.kinds[factor] == "reduce" else m
            for m, n, dim in zip(
                params["window_dimensions"],
                operands[0].shape,
                rule.operands[0],
                strict=True,
            )
        )
    elif name == "dynamic_slice":
        params["slice_sizes"] = results[0]
    elif name == "conv_general_dilated":
        # A piece of the groups is fewer groups.
        numbers = params["dimension_numbers"].lhs_spec
        for key, dim in (("feature", numbers[1]), ("batch", numbers[0])):
            grouped = params[f"{key}_group_count"] > 1
            if grouped and rule.operands[0][dim][:1] == (factor,):
                params[f"{key}_group_count"] //= count(rule, factor)
    elif name == "gather" or name.startswith("scatter"):
        operands = _indexed(name, params, rule, operands, factor, which)
    return params, operands


def _indexed(
    name: str,
    params: dict[str, Any],
    rule: FactorRule,
    operands: Arrays,
    factor: int,
    which: int,
) -> Arrays:
    """A device answers for the rows it holds and drops all others."""
    operands, table = list(operands), rule.operands[0]
    numbers = params["dimension_numbers"]
    params["mode"] = GatherScatterMode.FILL_OR_DROP
    if name == "gather":
        windows = zip(params["slice_sizes"], operands[0].shape, strict=True)
        params["slice_sizes"] = tuple(min(s, n) for s, n in windows)
        params["fill_value"] = 0
        gone, at = numbers.collapsed_slice_dims, numbers.start_index_map
    else:
        gone = numbers.inserted_window_dims
        at = numbers.scatter_dims_to_operand_dims
    held = [d for d in gone if factor in table[d]]
    if held:
        [d] = held
        offset = np.zeros(len(at), np.int32)
        offset[at.index(d)] = which * operands[0].shape[d]
        operands[1] = host(operands[1]) - offset
    elif (
        rule.kinds[factor] == "reduce"
        and which
        # A gather changes nothing, and the largest of equals is both.
        and name not in ("gather", "scatter-max", "scatter-min")
    ):
        # What was there before counts once.
        same = 1 if name == "scatter-mul" else 0
        operands[0] = np.full(operands[0].shape, same, operands[0].dtype)
    return operands


def _own_groups(params: dict[str, Any]) -> bool:
    """Whether each group has a result of its own."""
    numbers = params["ragged_dot_dimension_numbers"]
    (lhs_sum, _), _ = numbers.dot_dimension_numbers
    return numbers.lhs_ragged_dimensions[0] in lhs_sum


def _ragged(
    op: Whole, rule: FactorRule, cut: Arrays, factor: int, which: int, ways: int
) -> Arrays:
    """Sizes of groups tell each device which of its rows are whose."""
    numbers = op.params["ragged_dot_dimension_numbers"]
    (lhs_sum, _), (lhs_batch, _) = numbers.dot_dimension_numbers
    [at] = numbers.lhs_ragged_dimensions
    lhs, rhs, sizes = cut
    if at in lhs_batch:
        return cut
    ends = np.cumsum(np.asarray(sizes), -1)
    starts = ends - np.asarray(sizes)
    if factor in rule.operands[0][at]:
        # Its own rows are first .. first + own - 1 of all.
        own = lhs.shape[at]
        low, high = which * own, (which + 1) * own
        sizes = np.clip(ends, low, high) - np.clip(starts, low, high)
        return [lhs, rhs, jnp.asarray(sizes, jnp.int32)]
    groups = [d for d in numbers.rhs_group_dimensions if factor in rule.operands[1][d]]
    if groups:
        # Rows of the groups that others hold meet matrices of zeros.
        [d] = groups
        own = rhs.shape[d]
        wide = [(0, 0)] * rhs.ndim
        wide[d] = (which * own, (ways - 1 - which) * own)
        return [lhs, np.pad(host(rhs), wide), sizes]
    if at in lhs_sum and rule.results[0][0] == (factor,):
        # Rows of the groups that others hold count nothing.
        own = sizes.shape[-1] // ways
        low, high = starts[..., which * own], ends[..., (which + 1) * own - 1]
        row = np.arange(lhs.shape[at])
        mine = (row >= low[..., None]) & (row < high[..., None])
        if tuple(lhs_sum) != tuple(range(at + 1)):
            raise InputError(
                f"ragged_dot_general with dims {tuple(lhs_sum)} of its first operand "
                "before the rows cannot be cut into groups to try its rule: put the "
                "batch dims first."
            )
        rest = (1,) * (lhs.ndim - mine.ndim)
        return [host(lhs) * mine.reshape(*mine.shape, *rest), rhs, sizes]
    return cut


# -- pieces that have some rows of their neighbours ------------------------------------


def _with_halo(op: Whole, rule: FactorRule, factor: int, which: int) -> Arrays:
    """A piece that also has some rows of its neighbours, as many as the rule says."""
    ways = count(rule, factor)
    if op.name == "conv_general_dilated":
        return _conv(op, rule, factor, which, ways)
    if op.name == "select_and_scatter_add":
        return _scattered(op, rule, factor, which, ways)
    return _windowed(op, rule, factor, which, ways)


def _held(size: int, which: int, ways: int, halo: Halo) -> tuple[int, int]:
    """First row and one past the last that a piece has, its halo included."""
    own = size // ways
    return max(0, which * own - halo[0]), min(size, (which + 1) * own + halo[1])


def _fit(
    x: Any, d: int, first: int, last: int, place: int, base: int, fill: Any
) -> np.ndarray[Any, Any]:
    """Cuts and pads a dim so that it covers the places `first` to `last`.

    Row 0 of what is given stands at `place`, and rows are `base` places apart. Rows
    that are missing are filled: a halo that is too short gives a wrong result.
    """
    rows = [place + k * base for k in range(x.shape[d])]
    keep = [k for k, p in enumerate(rows) if first <= p <= last]
    shape = list(x.shape)
    shape[d] = last - first + 1
    out = np.full(shape, fill, x.dtype)
    before = (slice(None),) * d
    for k in keep:
        out[(*before, rows[k] - first)] = host(x)[(*before, k)]
    return out


def _conv(op: Whole, rule: FactorRule, factor: int, which: int, ways: int) -> Arrays:
    params = dict(op.params)
    lhs, rhs = op.operands
    numbers = params["dimension_numbers"]
    [k] = [
        k for k, d in enumerate(numbers.lhs_spec[2:]) if factor in rule.operands[0][d]
    ]
    d, at_rhs = numbers.lhs_spec[2 + k], numbers.rhs_spec[2 + k]
    at_out = numbers.out_spec[2 + k]
    stride, base = params["window_strides"][k], params["lhs_dilation"][k]
    dilation, (pad, _) = params["rhs_dilation"][k], params["padding"][k]
    begin, end = _held(lhs.shape[d], which, ways, rule.halos[factor])
    lhs = _rows(lhs, d, begin, end)
    outs, kernels = op.results[0].shape[at_out], rhs.shape[at_rhs]
    out, kernel = (0, outs), (0, kernels)
    if rule.kinds[factor] == "shift":
        own = outs // ways
        out = (which * own, (which + 1) * own)
    else:
        own = kernels // ways
        kernel = (which * own, (which + 1) * own)
        rhs = _rows(rhs, at_rhs, *kernel)
    first = out[0] * stride - pad + kernel[0] * dilation
    last = (out[1] - 1) * stride - pad + (kernel[1] - 1) * dilation
    lhs = _fit(lhs, d, first, last, begin * base, base, 0)

    def at(key: str, value: Any) -> None:
        params[key] = tuple(value if i == k else v for i, v in enumerate(params[key]))

    at("padding", (0, 0))
    at("lhs_dilation", 1)
    return op.run([lhs, rhs], params)


def _lowest(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return -np.inf
    return np.iinfo(dtype).min


def _windowed(
    op: Whole, rule: FactorRule, factor: int, which: int, ways: int
) -> Arrays:
    params = dict(op.params)
    [d] = [d for d, dim in enumerate(rule.results[0]) if factor in dim]
    stride, size = params["window_strides"][d], params["window_dimensions"][d]
    base, dilation = params["base_dilation"][d], params["window_dilation"][d]
    pad, _ = params["padding"][d]
    own = op.results[0].shape[d] // ways
    first = which * own * stride - pad
    last = ((which + 1) * own - 1) * stride - pad + (size - 1) * dilation
    begin, end = _held(op.operands[0].shape[d], which, ways, rule.halos[factor])
    # What is missing must not be chosen; of two operands the last one chooses.
    lowest = _lowest(op.operands[0].dtype)
    fills: dict[str, Any] = {
        "reduce_window": op.operands[-1],
        "reduce_window_max": lowest,
        "reduce_window_min": np.inf if lowest == -np.inf else ~lowest,
        "reduce_window_sum": 0,
        "select_and_gather_add": lowest,
    }
    operands = [
        _fit(_rows(x, d, begin, end), d, first, last, begin * base, base, fill)
        if np.ndim(x)
        else x
        for fill in [fills[op.name]]
        for x in op.operands
    ]
    for key, value in (("padding", (0, 0)), ("base_dilation", 1)):
        params[key] = tuple(value if i == d else v for i, v in enumerate(params[key]))
    return op.run(operands, params)


def _scattered(
    op: Whole, rule: FactorRule, factor: int, which: int, ways: int
) -> Arrays:
    """The windows that touch a piece, and the rows that they cover."""
    params = dict(op.params)
    source, operand = op.operands
    [d] = [d for d, dim in enumerate(rule.results[0]) if factor in dim]
    stride, size = params["window_strides"][d], params["window_dimensions"][d]
    pad, _ = params["padding"][d]
    own = operand.shape[d] // ways
    mine = range(which * own, (which + 1) * own)
    windows = [
        o
        for o in range(source.shape[d])
        if any(o * stride - pad <= row < o * stride - pad + size for row in mine)
    ]
    first = windows[0] * stride - pad
    last = windows[-1] * stride - pad + size - 1
    begin, end = _held(operand.shape[d], which, ways, rule.halos[factor])
    local = _rows(operand, d, begin, end)
    local = _fit(local, d, first, last, begin, 1, _lowest(operand.dtype))
    parts = _rows(source, d, windows[0], windows[-1] + 1)
    params["padding"] = tuple(
        (0, 0) if i == d else v for i, v in enumerate(params["padding"])
    )
    [out] = op.run([parts, local], params)
    # Rows that no window of its own covers have no gradient.
    shape = list(operand.shape)
    shape[d] = own
    made, before = np.zeros(shape, out.dtype), (slice(None),) * d
    for k, row in enumerate(mine):
        if first <= row <= last:
            made[(*before, k)] = host(out)[(*before, row - first)]
    return [made]
