"""A smaller program that fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import numpy as np
from fuzz.build import numbers
from fuzz.describe import Array, Body, Case, Node, inner_bodies
from fuzz.ops_structure import run_body

Fails = Callable[[Case], bool]


def shrink(case: Case, fails: Fails, *, tries: int = 400) -> Case:
    """Takes things away as long as the case still fails.

    Args:
        case: A case that fails.
        fails: Whether a case fails; whatever it raises is for the caller to sort out.
        tries: How often `fails` may be called.

    Returns:
        The smallest that was found.
    """
    best = tidy(case)
    if not fails(best):
        best = case
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(best):
            if tries <= 0:
                return best
            tries -= 1
            if fails(smaller):
                best, progress = smaller, True
                break
    return best


def _smaller(case: Case) -> Iterator[Case]:
    body = case.body
    if len(body.outputs) > 1:
        for k in range(len(body.outputs)):
            yield _with(case, outputs=(body.outputs[k],))
        for k in range(len(body.outputs)):
            yield _with(case, outputs=body.outputs[:k] + body.outputs[k + 1 :])
    for state, axes in case.storage.items():
        if axes:
            yield replace(case, storage={**case.storage, state: []})
    for name, axes in case.rules.items():
        if axes:
            yield replace(case, rules={**case.rules, name: []})
    for name in case.rules:
        if not _mentions(body, name):
            yield replace(
                case, rules={n: a for n, a in case.rules.items() if n != name}
            )
    used = {a for axes in (*case.rules.values(), *case.storage.values()) for a in axes}
    for axis in case.mesh:
        if axis not in used and len(case.mesh) > 1:
            yield replace(case, mesh={a: n for a, n in case.mesh.items() if a != axis})
    for at in reversed(range(len(body.nodes))):
        yield from _without_node(case, at)


def _mentions(body: Body, name: str) -> bool:
    return any(
        name in node.params.get("names", ())
        or any(_mentions(inner, name) for inner in inner_bodies(node))
        for node in body.nodes
    )


def _with(case: Case, **changes: object) -> Case:
    return tidy(replace(case, body=replace(case.body, **changes)))


def _starts(body: Body) -> list[int]:
    starts = [0]
    for node in body.nodes:
        starts.append(starts[-1] + node.count)
    return starts


def _without_node(case: Case, at: int) -> Iterator[Case]:
    """An op gone from the outermost body: bypassed, or an input from now on."""
    for smaller in _changed_at(case.body, at):
        yield tidy(replace(case, body=smaller))
    body = case.body
    node, start = body.nodes[at], _starts(body)[at]
    kinds = kinds_of(body)
    results = range(start, start + node.count)
    if all(r in kinds for r in results):
        added = tuple(kinds[r] for r in results)
        # New inputs come first among the state, so that the batch stays last.
        moved = {-(k + 1): -(k + 1 + len(added)) for k in range(len(body.inputs))}
        moved |= {r: -(k + 1) for k, r in enumerate(results)}
        made = replace(body, **_replaced(body, moved))
        made = replace(made, inputs=(*added, *body.inputs))
        yield tidy(replace(case, body=made, state=case.state + len(added)))


def _replaced(body: Body, by: dict[int, int]) -> dict[str, object]:
    nodes = tuple(
        replace(n, args=tuple(by.get(a, a) for a in n.args)) for n in body.nodes
    )
    return {"nodes": nodes, "outputs": tuple(by.get(o, o) for o in body.outputs)}


def _changed_at(body: Body, at: int) -> Iterator[Body]:
    """Bodies with the same inputs and results in which one op is simpler."""
    node, start = body.nodes[at], _starts(body)[at]
    if node.op in ("jit", "remat", "custom_jvp", "custom_vjp"):
        yield _inlined(body, at)
    if node.count == 1:
        for arg in dict.fromkeys(node.args):
            yield _drop_dead(replace(body, **_replaced(body, {start: arg})))
    kinds = kinds_of(body)
    results = range(start, start + node.count)
    if node.op != "constant" and all(r in kinds for r in results):
        constants = tuple(
            Node(
                "constant", (), {"shape": list(kinds[r].shape), "dtype": kinds[r].dtype}
            )
            for r in results
        )
        if all(kinds[r].dtype != "key" for r in results):
            nodes = (*body.nodes[:at], *constants, *body.nodes[at + 1 :])
            yield _drop_dead(replace(body, nodes=nodes))
    for inner, swap in _inner_swaps(node):
        for smaller in _smaller_bodies(inner):
            nodes = (*body.nodes[:at], swap(smaller), *body.nodes[at + 1 :])
            yield replace(body, nodes=nodes)
    if node.op == "grad":
        inner = node.params["body"]
        for k in range(len(inner.outputs) if len(inner.outputs) > 1 else 0):
            params = {
                **node.params,
                "body": replace(inner, outputs=(inner.outputs[k],)),
            }
            new = replace(node, params=params)
            yield replace(body, nodes=(*body.nodes[:at], new, *body.nodes[at + 1 :]))


def _inlined(body: Body, at: int) -> Body:
    """A call written in place."""
    node, start = body.nodes[at], _starts(body)[at]
    inner = node.params["body"]
    total = _starts(inner)[-1]
    by = {-(k + 1): a for k, a in enumerate(node.args)}
    by |= {k: start + k for k in range(total)}
    placed = replace(inner, **_replaced(inner, by))
    shifted = {
        k: k + total - node.count for k in range(start + node.count, _starts(body)[-1])
    }
    shifted |= {start + k: o for k, o in enumerate(placed.outputs)}
    outer = replace(body, **_replaced(body, shifted))
    before = body.nodes[:at]  # these read nothing that comes later
    return replace(outer, nodes=(*before, *placed.nodes, *outer.nodes[at + 1 :]))


def _inner_swaps(node: Node) -> Iterator[tuple[Body, Callable[[Body], Node]]]:
    if "body" in node.params:
        yield (
            node.params["body"],
            lambda b: replace(node, params={**node.params, "body": b}),
        )
    for k, branch in enumerate(node.params.get("branches", ())):

        def swap(b: Body, k: int = k) -> Node:
            branches = list(node.params["branches"])
            branches[k] = b
            return replace(node, params={**node.params, "branches": branches})

        yield branch, swap


def kinds_of(body: Body) -> dict[int, Array]:
    """What the values of a program are; nothing is computed.

    Empty for a program that JAX refuses, which is then as small as it gets.
    """
    rng = np.random.default_rng(0)
    given = [numbers(a, rng) for a in body.inputs]
    every = replace(body, outputs=tuple(range(_starts(body)[-1])))
    try:
        made = jax.eval_shape(lambda xs: run_body(every, xs), given)
    except Exception:
        return {}
    found: dict[int, Array] = {}
    for k, x in enumerate(made):
        key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        dtype = "key" if key else x.dtype.name
        if dtype in ("float32", "int32", "key"):
            found[k] = Array(tuple(x.shape), dtype, 2 if dtype == "int32" else 0)
    return found


def _smaller_bodies(body: Body) -> Iterator[Body]:
    """Inputs and the number of outputs stay, as the op around relies on them."""
    less = _drop_dead(body)
    if len(less.nodes) < len(body.nodes):
        yield less
    for at in reversed(range(len(body.nodes))):
        yield from _changed_at(body, at)


def _drop_dead(body: Body) -> Body:
    """Without the ops whose results nothing uses."""
    starts = _starts(body)
    needed = set(body.outputs)
    keep = []
    for at in reversed(range(len(body.nodes))):
        node = body.nodes[at]
        if needed & set(range(starts[at], starts[at] + node.count)):
            keep.append(at)
            needed |= set(node.args)
    keep.reverse()
    by: dict[int, int] = {}
    total = 0
    for at in keep:
        for k in range(body.nodes[at].count):
            by[starts[at] + k] = total
            total += 1
    kept = replace(body, nodes=tuple(body.nodes[at] for at in keep))
    return replace(kept, **_replaced(kept, by))


def tidy(case: Case) -> Case:
    """Without ops and inputs that nothing uses; one input of the batch stays."""
    body = _drop_dead(case.body)
    used = set(body.outputs) | {a for node in body.nodes for a in node.args}
    keep = [k for k in range(len(body.inputs)) if -(k + 1) in used]
    if not any(k >= case.state for k in keep):
        keep.append(case.state)
    by = {-(old + 1): -(new + 1) for new, old in enumerate(keep)}
    body = replace(body, **_replaced(body, by))
    body = replace(body, inputs=tuple(body.inputs[k] for k in keep))
    return replace(case, body=body, state=sum(k < case.state for k in keep))
