"""Laws of propagation: it repeats itself, and the order of visiting does not matter."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from autoshard.ir.program import Program
from autoshard.ir.seeds import Seed
from autoshard.ir.ties import find_blocks
from autoshard.ir.trace import Traced
from autoshard.plan.sharded import ShardedProgram
from autoshard.propagate import find_classes, propagate
from autoshard.propagate.fixed import STORAGE_AXES


def again(sharded: ShardedProgram) -> list[str]:
    """Fixes every spec that was found and propagates again: nothing may change.

    How state is stored is left out, as a spec that a user gives a parameter says both
    how it is stored and how it is used: `data` and `fsdp` only the former, so a program
    that computes with a parameter sharded over these is not asked. Left out are also
    values of constants only, which no device takes from another one.
    """
    traced, classes = sharded.traced, sharded.classes
    layout = replace(sharded.layout, params=(), gradients=(), optimizer=())
    if layout != sharded.layout:
        sharded = propagate(traced, classes, layout)
    state = {
        value
        for value, info in zip(traced.program.inputs, traced.inputs, strict=True)
        if info.state != "data"
    }
    if any(STORAGE_AXES & {a for dim in sharded.specs[v] for a in dim} for v in state):
        return []
    seeds = tuple(
        Seed(v, tuple(spec), "found", f"found spec of value {v}")
        for v, spec in enumerate(sharded.specs)
        if v not in sharded.free
    )
    fixed = replace(traced, seeds=seeds)
    other = propagate(fixed, find_classes(fixed, aliases=classes.aliases), layout)
    return [
        f"{_show(traced.program, v)} is {_spec(a)}, and {_spec(b)} when that is fixed"
        for v, (a, b) in enumerate(zip(sharded.specs, other.specs, strict=True))
        if a != b and v not in sharded.free
    ]


@dataclass(frozen=True)
class Reordered:
    """The same program with its ops in another order, all numbers given anew.

    Attributes:
        traced: The program.
        value: New index per old index of a value.
        op: New index per old index of an op.
    """

    traced: Traced
    value: list[int]
    op: list[int]


def reordered(traced: Traced, rng: random.Random) -> Reordered:
    """Another valid order of execution; all but inputs are numbered at random."""
    program = traced.program
    order = _order(program, rng)
    op_at = [0] * len(order)
    for new, old in enumerate(order):
        op_at[old] = new
    # A tie between dims of two inputs goes to the first input.
    others = sorted(set(range(len(program.values))) - set(program.inputs))
    value_at = list(range(len(program.values)))
    for old, new in zip(others, rng.sample(others, len(others)), strict=True):
        value_at[old] = new
    values: list[Any] = [None] * len(value_at)
    for value in program.values:
        producer = value.producer if value.producer < 0 else op_at[value.producer]
        new = value_at[value.index]
        values[new] = replace(value, index=new, producer=producer)

    def moved(indices: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i if i < 0 else value_at[i] for i in indices)

    ops = tuple(
        replace(
            program.ops[old],
            index=new,
            inputs=moved(program.ops[old].inputs),
            outputs=moved(program.ops[old].outputs),
            shapes=program.ops[old].operand_shapes,
        )
        for new, old in enumerate(order)
    )
    changed = replace(
        program,
        values=tuple(values),
        ops=ops,
        inputs=moved(program.inputs),
        outputs=moved(program.outputs),
    )
    seeds = tuple(replace(s, value=value_at[s.value]) for s in traced.seeds)
    found = replace(traced, program=changed, seeds=seeds, blocks=find_blocks(changed))
    return Reordered(found, value_at, op_at)


def _order(program: Program, rng: random.Random) -> list[int]:
    """Ops in an order that keeps every read after the writes it came after.

    The ops of a region stay together, as a region runs as one.
    """
    after: dict[int, set[int]] = defaultdict(set)
    writers: dict[int, list[int]] = defaultdict(list)
    readers: dict[int, list[int]] = defaultdict(list)
    for op in program.ops:
        for v in op.inputs:
            if v >= 0:
                after[op.index].update(writers[v])
                readers[v].append(op.index)
        for v in op.outputs:
            after[op.index].update(readers[v])  # a loop's next run
            writers[v].append(op.index)
    chains = [_chain(program, op.region) for op in program.ops]

    def item(op: int, depth: int) -> tuple[str, int]:
        """What stands for an op in a body: itself, or the region that holds it."""
        chain = chains[op]
        return ("op", op) if len(chain) == depth + 1 else ("region", chain[depth + 1])

    found: list[int] = []

    def lay(ops: list[int], depth: int) -> None:
        inside: dict[tuple[str, int], list[int]] = defaultdict(list)
        for op in ops:
            inside[item(op, depth)].append(op)
        here = set(ops)
        waits = {
            name: {item(b, depth) for a in members for b in after[a] & here} - {name}
            for name, members in inside.items()
        }
        done: set[tuple[str, int]] = set()
        while len(done) < len(inside):
            ready = [n for n in inside if n not in done and waits[n] <= done]
            name = rng.choice(ready)
            done.add(name)
            if name[0] == "op":
                found.append(name[1])
            else:
                lay(inside[name], depth + 1)

    lay([op.index for op in program.ops], 0)
    return found


def _chain(program: Program, region: int) -> list[int]:
    chain = []
    while region >= 0:
        chain.append(region)
        region = program.regions[region].parent
    return chain[::-1]


def any_order(sharded: ShardedProgram, rng: random.Random) -> list[str]:
    """Propagates in another order: specs, factors and moves must be the same."""
    traced, classes = sharded.traced, sharded.classes
    other = reordered(traced, rng)
    again_classes = find_classes(other.traced, aliases=classes.aliases)
    found = propagate(other.traced, again_classes, sharded.layout)
    failures = []
    for v, spec in enumerate(sharded.specs):
        w = other.value[v]
        if found.specs[w] != spec:
            failures.append(
                f"{_show(traced.program, v)} is {_spec(spec)}, in another order "
                f"{_spec(found.specs[w])}"
            )
    for op in traced.program.ops:
        axes = found.factor_axes[other.op[op.index]]
        if axes != sharded.factor_axes[op.index]:
            failures.append(
                f"{op.address} runs with {_spec(sharded.factor_axes[op.index])}, in "
                f"another order {_spec(axes)}"
            )
    moves = {
        (
            r.op if r.op < 0 else other.op[r.op],
            r.slot,
            other.value[r.value],
            r.source,
            tuple(sorted(r.unreduced)),
            r.target,
        )
        for r in sharded.reshards
    }
    others = {
        (r.op, r.slot, r.value, r.source, tuple(sorted(r.unreduced)), r.target)
        for r in found.reshards
    }
    if not failures and moves != others:
        failures.append(f"reshards differ in another order: {moves ^ others}")
    return failures


def _show(program: Program, value: int) -> str:
    shape = list(program.values[value].shape)
    producer = program.values[value].producer
    where = program.ops[producer].address if producer >= 0 else "an input"
    return f"value {value} {shape} of {where}"


def _spec(dims: Any) -> str:
    return "[" + ", ".join("+".join(dim) if dim else "-" for dim in dims) + "]"
