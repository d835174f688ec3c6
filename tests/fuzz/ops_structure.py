"""Programs inside programs: loops, branches, calls, derivatives, batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from fuzz.describe import Body, floating
from fuzz.kit import RUNS, Kit, Skip, Value, draws, runs
from jax import lax

LONGEST_LOOP = 8


def run_body(body: Body, args: Sequence[Any]) -> list[Any]:
    """Runs a program."""
    made: list[Any] = []

    def read(index: int) -> Any:
        return args[-index - 1] if index < 0 else made[index]

    for node in body.nodes:
        results = RUNS[node.op](*map(read, node.args), **node.params)
        results = list(results) if isinstance(results, tuple | list) else [results]
        assert len(results) == node.count, node
        if node.scale != 1:
            results = [r * node.scale if floating(r) else r for r in results]
        made += results
    return [read(index) for index in body.outputs]


def _operands(kit: Kit, inner: Kit, count: int) -> list[Value]:
    """Passes some values of any kind into an inner body, floats first."""
    taken = [kit.floats()]
    taken += [kit.any(lambda _: True) for _ in range(kit.integer(0, count - 1))]
    return [inner.take(v, v.shape) for v in dict.fromkeys(taken)]


def _results(inner: Kit, most: int = 3, *, floats: bool = False) -> list[Value]:
    """What an inner body returns: results that nothing in it uses."""
    found = [
        v
        for v in inner.leaves()
        if v.dtype == "float32" or (v.dtype != "key" and not floats)
    ]
    if not found:
        raise Skip
    return found[-most:]


def _same(inner: Kit, wanted: Value) -> Value:
    """A float of the inner body with this shape, rather a computed one."""
    fitting = [
        v for v in inner.values if v.dtype == "float32" and v.shape == wanted.shape
    ]
    return inner.pick([v for v in reversed(fitting) if v.id >= 0] or fitting)


def _call(kit: Kit, op: str, *, floats: bool = False) -> None:
    inner = kit.inner()
    _operands(kit, inner, 3)
    inner.grow(kit.integer(1, 4))
    outputs = _results(inner, floats=floats)
    kit.emit_all(op, inner.outer, outputs, body=inner.body(outputs))


@draws("jit")
def _jit(kit: Kit) -> None:
    _call(kit, "jit")


@runs
def _jit_run(*args: Any, body: Body) -> list[Any]:
    return jax.jit(lambda *xs: run_body(body, xs))(*args)


@draws("remat")
def _remat(kit: Kit) -> None:
    _call(kit, "remat")


@runs
def _remat_run(*args: Any, body: Body) -> list[Any]:
    return jax.checkpoint(lambda *xs: run_body(body, xs))(*args)


@draws("custom")
def _custom_jvp(kit: Kit) -> None:
    _call(kit, "custom_jvp", floats=True)


@runs
def _custom_jvp_run(*args: Any, body: Body) -> list[Any]:
    fn = jax.custom_jvp(lambda *xs: run_body(body, xs))
    fn.defjvp(lambda xs, ts: jax.jvp(lambda *ys: run_body(body, ys), xs, ts))
    return fn(*args)


@draws("custom")
def _custom_vjp(kit: Kit) -> None:
    if kit.forward:  # it has no forward derivative
        raise Skip
    _call(kit, "custom_vjp", floats=True)


@runs
def _custom_vjp_run(*args: Any, body: Body) -> list[Any]:
    def plain(*xs: Any) -> list[Any]:
        return run_body(body, xs)

    fn = jax.custom_vjp(plain)
    fn.defvjp(lambda *xs: jax.vjp(plain, *xs), lambda vjp, ct: vjp(ct))
    return fn(*args)


@draws("grad")
def _grad(kit: Kit) -> None:
    inner = kit.inner(smooth=True)
    _operands(kit, inner, 4)
    inner.grow(kit.integer(2, 8))
    outputs = _results(inner, floats=True)
    floats = [k for k, a in enumerate(inner.inputs) if a.dtype == "float32"]
    wrt = sorted(kit.some(floats, 1, 4))
    results = [Value(0, (), mag=1.0)]
    results += [Value(0, inner.inputs[k].shape, mag=0.5) for k in wrt]
    kit.emit_all("grad", inner.outer, results, body=inner.body(outputs), wrt=wrt)


def loss_of(outputs: Sequence[Any]) -> Any:
    """A number that depends on all floats, each about equally."""
    total = jnp.zeros((), float)
    for out in outputs:
        if floating(out):
            total += jnp.sum(jnp.sin(out)) / jnp.sqrt(jnp.asarray(out.size, float))
    return total


@runs
def _grad_run(*args: Any, body: Body, wrt: list[int]) -> list[Any]:
    def loss(*xs: Any) -> Any:
        return loss_of(run_body(body, xs))

    value, gradients = jax.value_and_grad(loss, argnums=tuple(wrt))(*args)
    return [value, *gradients]


@draws("grad")
def _jvp(kit: Kit) -> None:
    inner = kit.inner(smooth=True, forward=True)
    _operands(kit, inner, 3)
    inner.grow(kit.integer(1, 4))
    outputs = _results(inner, floats=True)
    results = [Value(0, v.shape) for v in outputs] * 2
    kit.emit_all("jvp", inner.outer, results, body=inner.body(outputs))


@runs
def _jvp_run(*args: Any, body: Body) -> list[Any]:
    floats = [k for k, a in enumerate(args) if floating(a)]

    def fn(*xs: Any) -> list[Any]:
        given = dict(zip(floats, xs, strict=True))
        return run_body(body, [given.get(k, a) for k, a in enumerate(args)])

    primals = [args[k] for k in floats]
    tangents = [jnp.cos(x) for x in primals]
    values, derivatives = jax.jvp(fn, primals, tangents)
    return [*values, *derivatives]


@draws("vmap")
def _vmap(kit: Kit) -> None:
    """Some operands lose a dim, the rest comes whole."""
    inner = kit.inner(batched=True)
    x = kit.floats(1, 4)
    axis = kit.dim(x)
    n = x.shape[axis]
    taken = {x: axis}
    for _ in range(kit.integer(0, 2)):
        v = kit.any(lambda v: v not in taken)
        where = [d for d, m in enumerate(v.shape) if m == n]
        taken[v] = kit.pick([*where, -1])
    for v, d in taken.items():
        inner.take(v, v.shape if d < 0 else (*v.shape[:d], *v.shape[d + 1 :]))
    inner.grow(kit.integer(1, 4))
    outputs = _results(inner)
    axes = list(taken.values())
    axes += [-1] * (len(inner.inputs) - len(axes))
    results = [
        Value(0, (n, *v.shape), v.dtype, v.exact, v.below, v.mag) for v in outputs
    ]
    kit.emit_all("vmap", inner.outer, results, body=inner.body(outputs), axes=axes)


@runs
def _vmap_run(*args: Any, body: Body, axes: list[int]) -> list[Any]:
    in_axes = tuple(None if d < 0 else d for d in axes)
    return jax.vmap(lambda *xs: run_body(body, xs), in_axes=in_axes)(*args)


def _carried(kit: Kit, inner: Kit, most: int) -> list[Value]:
    """Floats that a loop carries; rounding makes them inexact in it."""
    taken = dict.fromkeys(kit.floats() for _ in range(kit.integer(1, most)))
    return [inner.take(v, v.shape, role="carry", exact=False) for v in taken]


@draws("scan")
def _scan(kit: Kit) -> None:
    inner = kit.inner()
    first = kit.any(
        lambda v: v.dtype != "key" and v.rank > 0 and 1 < v.shape[0] <= LONGEST_LOOP
    )
    length = first.shape[0]
    carried = _carried(kit, inner, 2)
    inner.take(first, first.shape[1:], role="slice")
    for _ in range(kit.integer(0, 2)):
        v = kit.any(lambda v: v.id != first.id)
        if v.rank and v.shape[0] == length and v.dtype != "key":
            inner.take(v, v.shape[1:], role="slice")
        else:
            inner.take(v, v.shape)
    inner.grow(kit.integer(1, 5))
    carry = [_same(inner, v) for v in carried]
    stacked = [v for v in inner.leaves() if v.dtype != "key"][:2]
    results = [Value(0, v.shape, mag=v.mag) for v in carried]
    results += [
        Value(0, (length, *v.shape), v.dtype, v.exact, v.below, v.mag) for v in stacked
    ]
    kit.emit_all(
        "scan",
        inner.outer,
        results,
        body=inner.body([*carry, *stacked]),
        roles=list(inner.roles),
        length=length,
        reverse=kit.flip(3),
    )


def _step(
    body: Body, roles: Sequence[str], args: Sequence[Any]
) -> Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]]:
    """One turn of a loop: carried values move half-way to what the body makes."""

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        carried, slices = iter(carry), iter(xs)
        given = [
            next(carried) if r == "carry" else next(slices) if r == "slice" else a
            for r, a in zip(roles, args, strict=True)
        ]
        made = run_body(body, given)
        new = [0.5 * (a + b) for a, b in zip(carry, made, strict=False)]
        return new, made[len(carry) :]

    return step


@runs
def _scan_run(
    *args: Any, body: Body, roles: list[str], length: int, reverse: bool
) -> list[Any]:
    carry = [a for a, r in zip(args, roles, strict=True) if r == "carry"]
    xs = [a for a, r in zip(args, roles, strict=True) if r == "slice"]
    last, ys = lax.scan(
        _step(body, roles, args), carry, xs, length=length, reverse=reverse
    )
    return [*last, *ys]


@draws("while")
def _while(kit: Kit) -> None:
    """A fixed number of turns, or one that the data decides."""
    if kit.smooth:  # it has no reverse derivative
        raise Skip
    inner = kit.inner()
    trips = kit.integer(1, 3)
    turns = []
    if kit.flip():
        turns = [kit.any(lambda v: v.dtype == "int32" and not v.rank and v.below)]
    carried = _carried(kit, inner, 2)
    for _ in range(kit.integer(0, 2)):
        v = kit.any(lambda _: True)
        inner.take(v, v.shape)
    inner.grow(kit.integer(1, 4))
    carry = [_same(inner, v) for v in carried]
    kit.emit_all(
        "while",
        [*inner.outer, *turns],
        [Value(0, v.shape, mag=v.mag) for v in carried],
        body=inner.body(carry),
        roles=list(inner.roles),
        trips=trips,
    )


@runs
def _while_run(*args: Any, body: Body, roles: list[str], trips: int) -> list[Any]:
    bound = trips if len(args) == len(roles) else lax.rem(args[-1], jnp.int32(4))
    args = args[: len(roles)]
    step = _step(body, roles, args)
    start = [a for a, r in zip(args, roles, strict=True) if r == "carry"]
    _, last = lax.while_loop(
        lambda state: state[0] < bound,
        lambda state: (state[0] + 1, step(state[1], [])[0]),
        (jnp.int32(0), start),
    )
    return last


@draws("cond")
def _cond(kit: Kit) -> None:
    """Two or three branches, each with operands of its own."""
    try:
        index = kit.any(lambda v: v.dtype in ("bool", "int32") and not v.rank)
    except Skip:
        index = kit.new_input((), "int32", 3)
    outcome = [kit.floats() for _ in range(kit.integer(1, 2))]
    count = 2 if index.dtype == "bool" else kit.integer(2, 3)
    args: list[Value] = [index]
    branches, takes = [], []
    results: list[list[Value]] = []
    for _ in range(count):
        inner = kit.inner()
        for v in dict.fromkeys(outcome):
            inner.take(v, v.shape)
        _operands(kit, inner, 2)
        inner.grow(kit.integer(1, 3))
        results.append([_same(inner, v) for v in outcome])
        branches.append(inner.body(results[-1]))
        takes.append(list(range(len(args), len(args) + len(inner.outer))))
        args += inner.outer
    like = [
        Value(0, v.shape, exact=all(r[k].exact for r in results), mag=v.mag)
        for k, v in enumerate(outcome)
    ]
    kit.emit_all("cond", args, like, branches=branches, takes=takes)


@runs
def _cond_run(
    index: Any, *args: Any, branches: list[Body], takes: list[list[int]]
) -> list[Any]:
    def branch(body: Body, take: list[int]) -> Callable[..., list[Any]]:
        return lambda *xs: run_body(body, [xs[k - 1] for k in take])

    made = [branch(b, t) for b, t in zip(branches, takes, strict=True)]
    if index.dtype == bool:
        return lax.cond(index, made[0], made[1], *args)
    return lax.switch(index, made, *args)
