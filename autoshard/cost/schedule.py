"""The order in which compilers run a program's ops, and how long values live in it.

Compilers for TPUs and GPUs schedule a body from its end: whatever no later run waits
for is put off until then. In a backward loop that are the gradients of weights, which
run after all that the next layer waits for; before such a loop it is the gradient of
the output projection, whose operands (logits among them) stay until the loop is over.
"""

from __future__ import annotations

from autoshard.ir.program import BARRIER, LINK, Program
from autoshard.ir.trace import Traced


def positions(program: Program) -> tuple[int, ...]:
    """Position of each op in the order of execution.

    Ops run in program order, but for products that neither the last inner loop of a
    body needs nor, where it has none, what it carries to its next run: these, and what
    depends on them, come last in it.

    >>> import jax, jax.numpy as jnp
    >>> from autoshard.ir.program import build
    >>> def fn(x):
    ...     late = x @ x
    ...     return late, jax.lax.scan(lambda c, _: (c * 2, None), x, None, 3)[0]
    >>> program = build(jax.make_jaxpr(fn)(jnp.ones((4, 4))), ["x"])
    >>> [op.primitive for op in program.ops][0], positions(program)[0]
    ('dot_general', 4)
    """
    order: list[int] = []
    _flatten(program, _items(program), 0, order)
    found = [0] * len(program.ops)
    for position, op in enumerate(order):
        found[op] = position
    return tuple(found)


_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")

Item = tuple[str, int]
"""`("op", index)` or `("region", index)`."""


def _items(program: Program) -> list[dict[Item, list[int]]]:
    """Per region its own ops and inner regions, each with all ops inside it."""
    found: list[dict[Item, list[int]]] = [{} for _ in program.regions]
    for op in program.ops:
        item: Item = ("op", op.index)
        region = op.region
        while region >= 0:
            found[region].setdefault(item, []).append(op.index)
            item, region = ("region", region), program.regions[region].parent
    return found


def _flatten(
    program: Program,
    items: list[dict[Item, list[int]]],
    region: int,
    order: list[int],
) -> None:
    own = items[region]
    late = _put_off(program, own)
    for later in (False, True):
        for item in own:
            if (item in late) is later:
                if item[0] == "op":
                    order.append(item[1])
                else:
                    _flatten(program, items, item[1], order)


def _put_off(program: Program, own: dict[Item, list[int]]) -> set[Item]:
    """Products that no later run waits for, and what depends on these or on scatters.

    What is waited for is what the last inner loop needs or, where there is none, what
    is carried on. Point-by-point work stays where it is: it is fused with what else
    reads its operands.
    """
    loops = [item for item in own if item[0] == "region"]
    pending = loops[-1:] or [item for item in own if _is_carry(program, item)]
    if not pending:
        return set()
    makers: dict[int, Item] = {}
    for item, ops in own.items():
        for op in ops:
            for value in program.ops[op].outputs:
                makers.setdefault(value, item)
    needs = {
        item: {
            makers[v]
            for op in ops
            for v in program.ops[op].inputs
            if v in makers and makers[v] != item
        }
        for item, ops in own.items()
    }
    awaited: set[Item] = set()
    while pending:
        item = pending.pop()
        if item not in awaited:
            awaited.add(item)
            pending += needs[item]
    late: set[Item] = set()
    scatters: set[Item] = set()
    for item in own:  # in order, so what an op needs comes before it
        if item in awaited:
            continue
        primitive = program.ops[item[1]].primitive if item[0] == "op" else ""
        if primitive in _PRODUCTS or not needs[item].isdisjoint(late | scatters):
            late.add(item)
        elif primitive.startswith("scatter"):
            scatters.add(item)  # a product runs beside the sum of its result
    return late


def _is_carry(program: Program, item: Item) -> bool:
    op = program.ops[item[1]] if item[0] == "op" else None
    return op is not None and op.primitive == LINK and op.params["kind"] == "carry"


def lifetimes(
    traced: Traced, at: tuple[int, ...], materialised: tuple[bool, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], frozenset[int]]:
    """First and last position at which each value occupies memory of its own.

    Args:
        traced: The program.
        at: Position of each op, from `positions`.
        materialised: Per value, whether it is ever in memory.

    Returns:
        Births, -1 for a value that is never there by itself; deaths; and values that
        are written over the result of a product.
    """
    program = traced.program
    first = [len(program.ops)] * len(program.regions)
    last = [-1] * len(program.regions)
    for op in program.ops:
        region = op.region
        while region >= 0:
            first[region] = min(first[region], at[op.index])
            last[region] = max(last[region], at[op.index])
            region = program.regions[region].parent
    birth = [-1] * len(program.values)
    death = [-1] * len(program.values)
    for op in program.ops:
        now = at[op.index]
        kind = op.params["kind"] if op.primitive == LINK else ""
        for v in op.outputs:
            if birth[v] < 0:
                birth[v] = now
            if kind == "stack":
                birth[v] = first[op.region]
            if kind == "slice":
                birth[v] = -2  # read in place from the stack
            death[v] = max(death[v], birth[v])
            if kind == "carry_in":
                death[v] = last[program.values[v].region]
        for v in op.inputs:
            maker = program.values[v].producer if v >= 0 else -1
            if kind == "stack" and maker >= 0 and program.values[v].region == op.region:
                now = at[maker]  # written into the stack as it is made
            if v >= 0:
                death[v] = max(death[v], _until(program, v, op.region, now, last))
    for op in sorted(program.ops, key=lambda op: -at[op.index]):
        # What is fused reads its operands where its result is read.
        fused = [v for v in op.outputs if not materialised[v]]
        for v in op.inputs:
            if v >= 0 and fused and op.primitive != LINK:
                death[v] = max(death[v], *(death[result] for result in fused))
    _alias(program, birth, death)
    over = _overwrite(program, at, materialised, birth, death)
    for k, v in enumerate(program.outputs):
        if v >= 0:
            death[v] = len(program.ops)
            if traced.out_source[k] >= 0:
                birth[v] = -2  # written over the argument it replaces
    for v in program.inputs:
        birth[v] = -2  # counted as state
    return tuple(-1 if b < 0 else b for b in birth), tuple(death), over


def _until(program: Program, value: int, region: int, now: int, last: list[int]) -> int:
    """Until when a use needs a value: one in a loop does until the loop ends."""
    until = now
    while region != program.values[value].region and region >= 0:
        until = max(until, last[region])
        region = program.regions[region].parent
    return until


def _alias(program: Program, birth: list[int], death: list[int]) -> None:
    """Values that are in the place of another one."""
    for op in reversed(program.ops):
        if op.primitive == BARRIER:  # its results are its operands
            for v, result in zip(op.inputs, op.outputs, strict=True):
                birth[result] = -2
                if v >= 0:
                    death[v] = max(death[v], death[result])
    for op in program.ops:
        if op.primitive == LINK and op.params["kind"] == "carry":
            # What a loop carries on is written over what it carried in.
            birth[op.inputs[0]] = -2


def _overwrite(
    program: Program,
    at: tuple[int, ...],
    materialised: tuple[bool, ...],
    birth: list[int],
    death: list[int],
) -> frozenset[int]:
    """Ends the result of a product where a value of its type takes its place.

    Point-by-point work that is the last to read a product's result (logits, and their
    gradient) writes over it.
    """
    over: set[int] = set()
    makers = [op for op in program.ops if op.primitive in _PRODUCTS]
    results = {v for op in makers for v in op.outputs if birth[v] >= 0}
    # Per value that is not in memory the products' results that it is fused from.
    seen: dict[int, frozenset[int]] = {v: frozenset([v]) for v in results}
    for op in program.ops:
        if op.primitive == LINK or op.primitive in _PRODUCTS:
            continue
        sources = [seen[v] for v in op.inputs if v in seen]
        if not sources:
            continue
        found = frozenset().union(*sources)
        for out in op.outputs:
            if not materialised[out]:
                seen[out] = found
                continue
            place = program.values[out]
            for v in found:
                value = program.values[v]
                same = (value.shape, value.dtype) == (place.shape, place.dtype)
                if same and death[v] == at[op.index] and birth[v] < birth[out]:
                    death[v] = birth[out] - 1
                    over.add(out)
                    break
    return frozenset(over)
