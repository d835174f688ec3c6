"""The constraints of a plan: the few values whose spec the compiler must be told.

Between them the partitioner has nothing left to choose: an op without a pin runs with
the specs of its neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from autoshard.ir.build import is_rematted
from autoshard.ir.mesh import Spec
from autoshard.plan.schema import Constraint
from autoshard.plan.sharded import OUTPUT, Dims, Reshard, ShardedProgram
from autoshard.propagate.project import natural_dims, spec_of
from autoshard.rules.foreign import call_on_parts, runs_by_parts

_Pins = dict[tuple[str, str], Dims]


def constraints(
    sharded: ShardedProgram, sizes: dict[str, int]
) -> tuple[Constraint, ...]:
    """One constraint per place where data moves, per annotation, and per guard.

    Args:
        sharded: The program with its specs.
        sizes: Size per mesh axis; axes of one device are left out of the specs.

    Returns:
        Constraints by address.
    """
    sharded = _without_idle(sharded, sizes)
    pinned: _Pins = {}
    ops = sharded.traced.program.ops
    for reshard in sharded.reshards:
        if reshard.op == OUTPUT:
            continue  # the results' own shardings say it
        address = ops[reshard.op].address
        pinned[address, reshard.slot] = reshard.target
        if _enters_remat(sharded, reshard):
            pinned[address, reshard.slot.replace("in", "had")] = reshard.source
        if _needs_whole(sharded, reshard, sizes):
            pinned[address, reshard.slot.replace("out", "sum")] = reshard.source
    _pin_foreign(sharded, pinned)
    _pin_kernels(sharded, pinned)
    for index, slot in sharded.pins:
        k = int(slot.removeprefix("in").removeprefix("out"))
        if slot.startswith("in"):
            rule = sharded.classes.rules[index]
            spec = spec_of(rule.operands[k], sharded.factor_axes[index])
        else:
            spec = sharded.specs[ops[index].outputs[k]]
        pinned.setdefault((ops[index].address, slot), spec)
    _guard(sharded, pinned)
    _hold(sharded, pinned)
    return tuple(
        Constraint(address=address, slot=slot, spec=Spec(dims))
        for (address, slot), dims in sorted(pinned.items())
    )


def _without_idle(sharded: ShardedProgram, sizes: dict[str, int]) -> ShardedProgram:
    """The same without axes of one device, over which nothing is divided or moved."""
    known: dict[Dims, Dims] = {}

    def active(dims: Dims) -> Dims:
        if dims not in known:
            known[dims] = tuple(
                tuple(a for a in dim if sizes.get(a, 1) > 1) for dim in dims
            )
        return known[dims]

    reshards = (
        replace(
            reshard,
            source=active(reshard.source),
            unreduced=active((reshard.unreduced,))[0],
            target=active(reshard.target),
        )
        for reshard in sharded.reshards
    )
    return replace(
        sharded,
        specs=tuple(active(dims) for dims in sharded.specs),
        factor_axes=tuple(active(axes) for axes in sharded.factor_axes),
        reshards=tuple(r for r in reshards if r.unreduced or r.source != r.target),
    )


def _pin_foreign(sharded: ShardedProgram, pinned: _Pins) -> None:
    """Calls that the partitioner cannot look into run under `shard_map`."""
    for op, rule, axes in zip(
        sharded.traced.program.ops,
        sharded.classes.rules,
        sharded.factor_axes,
        strict=True,
    ):
        if not runs_by_parts(op, rule) or not any(axes):
            continue
        call_on_parts(op)  # an error here rather than when the plan is lowered
        for k, dims in enumerate(natural_dims(rule, axes)):
            pinned[op.address, f"each{k}"] = dims
        for k, (value, dims) in enumerate(zip(op.inputs, rule.operands, strict=True)):
            if value >= 0:
                pinned[op.address, f"in{k}"] = spec_of(dims, axes)


def _pin_kernels(sharded: ShardedProgram, pinned: _Pins) -> None:
    """Keeps kernels as they are where the windows they slide over are divided.

    Else XLA divides a kernel like its windows, or reverses it within the convolution,
    and computes wrongly where a part is smaller than a window and some mesh axis does
    nothing (seen with JAX 0.10.2).
    """
    for op, rule, axes in zip(
        sharded.traced.program.ops,
        sharded.classes.rules,
        sharded.factor_axes,
        strict=True,
    ):
        if op.primitive != "conv_general_dilated":
            continue
        slid = {f for f, kind in enumerate(rule.kinds) if kind == "shift" and axes[f]}
        for k, (value, dims) in enumerate(zip(op.inputs, rule.operands, strict=True)):
            made = op.region or sharded.traced.program.values[value].producer >= 0
            if slid and made and not any(slid.intersection(dim) for dim in dims):
                pinned.setdefault((op.address, f"in{k}"), spec_of(dims, axes))


def _enters_remat(sharded: ShardedProgram, reshard: Reshard) -> bool:
    """Whether something from outside is moved where values are computed again.

    Shown only what it becomes, the partitioner moves it once for the forward and the
    backward pass, and keeps it in between.
    """
    ops = sharded.traced.program.ops
    producer = sharded.traced.program.values[reshard.value].producer
    return (
        reshard.slot.startswith("in")
        and is_rematted(ops[reshard.op])
        and (producer < 0 or not is_rematted(ops[producer]))
    )


def _leaves(reshard: Reshard) -> bool:
    """Whether some axis leaves its dim, so that data moves."""
    pairs = zip(reshard.source, reshard.target, strict=True)
    return any(set(source) - set(target) for source, target in pairs)


def _scatters(reshard: Reshard) -> bool:
    """Whether partial sums end up divided over the axes they are summed over."""
    return any(axis in dim for dim in reshard.target for axis in reshard.unreduced)


def _needs_whole(
    sharded: ShardedProgram, reshard: Reshard, sizes: dict[str, int]
) -> bool:
    """Whether a result is pinned as it is made, before it is pinned as it is wanted.

    Shown only the final spec, the partitioner moves the table or the updates of a
    lookup instead of the partial sums, and operands instead of a result whose axes
    leave their dims; and it divides an op along a dim that the rule says each device
    needs whole, which for some ops it does wrongly.
    """
    rule = sharded.classes.rules[reshard.op]
    if not reshard.slot.startswith("out") or rule.op_kind in ("link", "data"):
        return False
    op = sharded.traced.program.ops[reshard.op]
    if op.primitive == "autoshard_annotate" and op.params["role"]:
        return True  # else the spec of storage leaks back to what makes the gradient
    if _leaves(reshard):
        return True
    if rule.op_kind in ("gather", "scatter") and reshard.unreduced:
        return True
    if rule.op_kind == "matmul" and _scatters(reshard):
        # Over axes that do nothing in a product the partitioner would rather divide
        # it, sum the smaller parts, and exchange them for what is wanted.
        busy = {axis for axes in sharded.factor_axes[reshard.op] for axis in axes}
        return any(n > 1 and axis not in busy for axis, n in sizes.items())
    dims = rule.results[int(reshard.slot[3:])]
    return any(
        set(target) - set(source) and (not dim or rule.kinds[dim[0]] == "blocked")
        for source, target, dim in zip(
            reshard.source, reshard.target, dims, strict=True
        )
    )


def _hold(sharded: ShardedProgram, pinned: _Pins) -> None:
    """Keeps what is moved for some ops from being moved for all.

    Where a value has one constraint, or several alike, the propagation of shardings
    takes that for the value's own spec if nothing else uses it, and else lets every
    later use have the moved value. A second constraint, on what the value is anyway,
    stops both: where it is made, or at another use.
    """
    program = sharded.traced.program
    moves: dict[int, dict[tuple[str, str], Reshard]] = {}
    for reshard in sharded.reshards:
        if reshard.op != OUTPUT and reshard.slot.startswith("in"):
            at = program.ops[reshard.op].address, reshard.slot
            moves.setdefault(reshard.value, {})[at] = reshard
    others: dict[int, dict[int, tuple[str, str]]] = defaultdict(dict)
    for op in program.ops:
        for k, value in enumerate(op.inputs):
            at = op.address, f"in{k}"
            if value in moves and at not in moves[value]:
                others[value].setdefault(op.region, at)
    for value, moved in moves.items():
        if value in sharded.free:
            continue  # constants have no spec to keep
        producer = program.values[value].producer
        here = program.ops[producer].region if producer >= 0 else 0
        # What a loop takes from outside has a spec of its own in there.
        for region in {program.ops[r.op].region for r in moved.values()} - {here}:
            if region in others[value]:
                pinned.setdefault(others[value][region], sharded.specs[value])
        leaving = {r.target for r in moved.values() if _leaves(r)}
        op = program.ops[producer] if producer >= 0 else None
        narrows = op is not None and op.primitive == "convert_element_type"
        if op is None or (value in sharded.stored and not narrows):
            continue  # what lies in memory keeps its spec
        made = op.address, f"out{op.outputs.index(value)}"
        if len(leaving) == 1 and made not in pinned:
            elsewhere = next(iter(others[value].values()), made)
            pinned.setdefault(elsewhere, sharded.specs[value])


def _guard(sharded: ShardedProgram, pinned: _Pins) -> None:
    """Pins what must stay whole although a later op takes only a part of it.

    The partitioner carries a wish back to the ops that make a value, and would rather
    divide a slice or a window along its own dim, and exchange rows, or keep divided
    what a loop carries, or gather for another op that takes the whole, than compute it
    whole and let each device take its part.
    """
    program, rules = sharded.traced.program, sharded.classes.rules
    uses: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for op in program.ops:
        for k, value in enumerate(op.inputs):
            uses[value].append((op.index, k))
    seen: set[tuple[int, int]] = set()
    left = [
        (reshard.value, d, frozenset(target) - frozenset(source))
        for reshard in sharded.reshards
        if not reshard.unreduced
        for d, (source, target) in enumerate(
            zip(reshard.source, reshard.target, strict=True)
        )
        if set(target) - set(source)
    ]

    def whole_elsewhere(value: int, d: int, axes: frozenset[str]) -> bool:
        """Whether some op takes all that each device has along this dim."""
        return any(
            not (dim := rules[i].operands[k][d : d + 1])
            or not dim[0]
            or not axes & set(sharded.factor_axes[i][dim[0][0]])
            for i, k in uses[value]
        )

    while left:
        value, d, axes = left.pop()
        producer = program.values[value].producer
        if (value, d) in seen or producer < 0:
            continue
        seen.add((value, d))
        op, rule = program.ops[producer], rules[producer]
        k = op.outputs.index(value)
        dim = rule.results[k][d]
        if not dim or op.params.get("kind") in ("carry_in", "carry"):
            continue
        leaves = op.params.get("kind") in ("carry_out", "stack")
        if (
            leaves
            or rule.kinds[dim[0]] in ("blocked", "shift")
            or (len(uses[value]) > 1 and whole_elsewhere(value, d, axes))
        ):
            natural = natural_dims(rule, sharded.factor_axes[producer])[k]
            slot = "out" if natural == sharded.specs[value] else "sum"
            pinned.setdefault((op.address, f"{slot}{k}"), natural)
            continue
        left += [
            (operand, e, axes)
            for operand, dims in zip(op.inputs, rule.operands, strict=True)
            for e, other in enumerate(dims)
            if operand >= 0 and other and other[0] == dim[0]
        ]
