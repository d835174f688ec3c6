"""Turning loops, branches and manual regions into regions and links."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from autoshard.ir import _jaxcompat, static
from autoshard.ir.errors import NoForwardDerivativeError
from autoshard.ir.walk import used

if TYPE_CHECKING:
    from autoshard.ir.build import Builder


def _scan(
    builder: Builder,
    eqn: Any,
    operands: list[int],
    region: int,
    address: str,
    scope: str,
) -> list[int]:
    n_consts, n_carry = _jaxcompat.scan_counts(eqn.params)
    inner = builder.region(region, eqn.params["length"], {})
    opened, _ = _jaxcompat.open_jaxpr(eqn.params["jaxpr"])
    inputs: list[int] = []
    for i, (var, atom, outer) in enumerate(
        zip(opened.invars, eqn.invars, operands, strict=True)
    ):
        if i < n_consts:
            inputs.append(builder.held(atom, outer, inner))  # the same value
            continue
        carried = i < n_consts + n_carry
        same = carried and opened.outvars[i - n_consts] is var
        inputs.append(builder.enter(var, atom, outer, inner, same=same))
        if outer >= 0:
            builder.link(
                "carry_in" if carried else "slice",
                outer,
                inputs[i],
                region=inner,
                address=f"{address}:in{i}",
                eqn=eqn,
                lead=not carried,
            )
    outputs = builder.walk(eqn.params["jaxpr"], inputs, inner, f"{address}/", scope)
    results = [builder.value(var.aval, region) for var in eqn.outvars]
    enters = inputs[n_consts : n_consts + n_carry]
    _leave(builder, eqn, outputs, enters, results, inner, region, address)
    return results


def _leave(
    builder: Builder,
    eqn: Any,
    outputs: list[int],
    enters: list[int],
    results: list[int],
    inner: int,
    region: int,
    address: str,
) -> None:
    """Links from a loop's body to its next run and to what follows it."""
    for i, (value, result) in enumerate(zip(outputs, results, strict=True)):
        if value < 0:
            continue
        carried = i < len(enters)
        builder.link(
            "carry" if carried else "stack",
            value,
            enters[i] if carried else result,
            region=inner,
            address=f"{address}:{'carry' if carried else 'out'}{i}",
            eqn=eqn,
            lead=not carried,
        )
    # All links that run in the loop come before those that run after it.
    for i, _ in enumerate(enters):
        if outputs[i] >= 0:
            builder.link(
                "carry_out",
                outputs[i],
                results[i],
                region=region,
                address=f"{address}:out{i}",
                eqn=eqn,
            )


def _while(
    builder: Builder,
    eqn: Any,
    operands: list[int],
    region: int,
    address: str,
    scope: str,
) -> list[int]:
    tests, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    n_tests, n_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    first = n_tests + n_consts
    inner = builder.region(region, 1, {})
    # Part of every run, and it reads what the run begins with.
    test_region = builder.region(inner, 1, {})
    consts = [
        builder.held(atom, outer, inner)
        for atom, outer in zip(eqn.invars[:first], operands[:first], strict=True)
    ]
    opened, _ = _jaxcompat.open_jaxpr(body)
    enters: list[int] = []
    starts: list[int | None] = []
    for i in range(first, len(operands)):
        var, atom, outer = opened.invars[i - n_tests], eqn.invars[i], operands[i]
        same = opened.outvars[i - first] is var
        enters.append(builder.enter(var, atom, outer, inner, same=same))
        if outer >= 0:
            starts.append(builder.scalars.of_value(outer))
            builder.link(
                "carry_in",
                outer,
                enters[-1],
                region=inner,
                address=f"{address}:in{i}",
                eqn=eqn,
            )
        else:
            starts.append(static.integer(atom.val))
    [predicate] = builder.walk(
        tests, consts[:n_tests] + enters, test_region, f"{address}:cond/", scope
    )
    outputs = builder.walk(body, consts[n_tests:] + enters, inner, f"{address}/", scope)
    trips = builder.scalars.trip_count(predicate, enters, outputs, starts)
    if trips is None:
        builder.count(inner, 1, static.unknown_trips(eqn, address))
    else:
        builder.count(inner, trips)
    results = [builder.value(var.aval, region) for var in eqn.outvars]
    _leave(builder, eqn, outputs, enters, results, inner, region, address)
    return results


def _cond(
    builder: Builder,
    eqn: Any,
    operands: list[int],
    region: int,
    address: str,
    scope: str,
) -> list[int]:
    results = [builder.value(var.aval, region) for var in eqn.outvars]
    inners: list[int] = []
    weights: list[tuple[float, float]] = []
    for b, branch in enumerate(eqn.params["branches"]):
        inner = builder.region(region, 1, {})
        begin = len(builder.ops)
        opened, _ = _jaxcompat.open_jaxpr(branch)
        # What a branch does not use does not cross into it.
        crosses = used(opened, opened.invars)
        inputs: list[int] = []
        for i, (var, atom, outer) in enumerate(
            zip(opened.invars, eqn.invars[1:], operands[1:], strict=True), start=1
        ):
            inputs.append(builder.enter(var, atom, outer, inner, same=True))
            if outer >= 0 and crosses[i - 1]:
                builder.link(
                    "branch_in",
                    outer,
                    inputs[-1],
                    region=inner,
                    address=f"{address}:{b}:in{i}",
                    eqn=eqn,
                )
        outputs = builder.walk(branch, inputs, inner, f"{address}:{b}/", scope)
        for k, (value, result) in enumerate(zip(outputs, results, strict=True)):
            if value >= 0:
                builder.link(
                    "branch_out",
                    value,
                    result,
                    region=inner,
                    address=f"{address}:{b}:out{k}",
                    eqn=eqn,
                )
        inners.append(inner)
        weights.append(
            static.weight(builder.ops[begin:], builder.values, builder.regions, inner)
        )
    kept = max(range(len(inners)), key=lambda b: (weights[b], -b))
    for b, inner in enumerate(inners):
        if b != kept:
            builder.count(inner, 0, static.outweighed(eqn, address, b, kept))
    return results


def _shard_map(
    builder: Builder,
    eqn: Any,
    operands: list[int],
    region: int,
    address: str,
    scope: str,
) -> list[int]:
    params = eqn.params
    sizes = dict(params["mesh"].shape)
    manual = {a: sizes[a] for a in sorted(params["newly_manual_axes"])}
    inner = builder.region(region, 1, manual)
    opened, _ = _jaxcompat.open_jaxpr(params["jaxpr"])
    inputs: list[int] = []
    for i, (var, atom, outer, spec) in enumerate(
        zip(opened.invars, eqn.invars, operands, params["in_specs"], strict=True)
    ):
        inputs.append(builder.enter(var, atom, outer, inner, same=True))
        if outer >= 0:
            builder.link(
                "manual_in",
                outer,
                inputs[i],
                region=inner,
                address=f"{address}:in{i}",
                eqn=eqn,
                names=_names(spec, len(builder.values[outer].shape)),
            )
    outputs = builder.walk(params["jaxpr"], inputs, inner, f"{address}/", scope)
    results = [builder.value(var.aval, region) for var in eqn.outvars]
    for k, (value, result, spec) in enumerate(
        zip(outputs, results, params["out_specs"], strict=True)
    ):
        if value >= 0:
            builder.link(
                "manual_out",
                value,
                result,
                region=inner,
                address=f"{address}:out{k}",
                eqn=eqn,
                names=_names(spec, len(builder.values[result].shape)),
            )
    return results


def _names(spec: Any, rank: int) -> tuple[tuple[str, ...], ...]:
    """The axes of a partition spec, per dim."""
    entries = [
        () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for entry in spec
    ]
    return (*entries, *[()] * (rank - len(entries)))


def _custom_lin(
    builder: Builder,
    eqn: Any,
    operands: list[int],
    region: int,
    address: str,
    scope: str,
) -> list[int]:
    line = _jaxcompat.source_line(eqn)
    raise NoForwardDerivativeError(
        f"forward-mode differentiation (jax.jvp, jax.jacfwd, jax.linearize) of a "
        f"jax.custom_vjp function at {line or address}: it defines a backward pass "
        "only. Take its gradient in reverse mode, or write it with jax.custom_jvp."
    )


STRUCTURES: dict[str, Callable[[Builder, Any, list[int], int, str, str], list[int]]] = {
    "cond": _cond,
    "custom_lin": _custom_lin,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
"""Per primitive, what adds it to a builder and returns the values of its results."""
