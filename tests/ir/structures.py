"""Programs of every structure, alone and nested: f32[3,4,4], f32[8,4] -> f32[]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

RENAME = {"dp": "data", "mp": "tensor"}
TABLE = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)


def user_mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("dp", "mp"), axis_types=(kind, kind))


def plan_mesh():
    """The plan's axes, in another order and with one that the user has not."""
    return jax.make_mesh(
        (2, 1, 4), ("tensor", "fsdp", "data"), axis_types=(AxisType.Auto,) * 3
    )


def mapped(fn, in_specs, out_specs, **options):
    return jax.shard_map(
        fn, mesh=user_mesh(), in_specs=in_specs, out_specs=out_specs, **options
    )


def branch_in_scan_in_remat(ws, x):
    def body(c, w):
        c = lax.cond(c.sum() > 0, lambda c: jnp.tanh(c @ w), lambda c: c - 1.0, c)
        return c, c.sum()

    @jax.checkpoint
    def run(x):
        c, sums = lax.scan(body, x, ws)
        return c + sums.sum()

    return run(jnp.sin(x)).sum()


def three_branches(ws, x):
    which = (x[0, 0] > 0).astype(jnp.int32) + 1
    small = lax.switch(
        which,
        [lambda x: x[:4], lambda x: x[4:] @ ws[0], lambda x: jnp.zeros((4, 4))],
        x,
    )
    pair = lax.cond(
        which > 1, lambda a, b: (a, 2.0), lambda a, b: (b * 3.0, b.sum()), small, ws[1]
    )
    return pair[0].sum() + pair[1]


def call_in_branch_in_branch(ws, x):
    @jax.jit
    def inner(x, w):
        return lax.cond(x[0, 0] < 5.0, lambda: x @ w, lambda: x + TABLE[0])

    return lax.cond(
        x.sum() > 0, lambda: inner(x, ws[0]), lambda: inner(-x, ws[1])
    ).sum()


@jax.custom_vjp
def _bent(x, w):
    return jnp.sin(x @ w)


_bent.defvjp(
    lambda x, w: (_bent(x, w), (x, w)),
    lambda kept, ct: (ct @ kept[1].T * 0.5, kept[0].T @ ct * 2.0),
)


def own_derivative_in_scan(ws, x):
    return lax.scan(lambda c, w: (_bent(c, w), None), x, ws)[0].sum()


def nested_remat_with_constants(ws, x):
    @jax.checkpoint
    def outer(x):
        inner = jax.checkpoint(jax.jit(lambda y: jnp.tanh(y @ TABLE)))
        return inner(x @ ws[0]) + inner(x)

    return outer(x).sum()


def solved(ws, x):
    return jnp.linalg.solve(ws[0] @ ws[0].T + 3 * jnp.eye(4), x.T).sum()


def composed(ws, x):
    inner = lax.composite(lambda x, w: jnp.sin(x) @ w, "autoshard.tests")
    return inner(x, ws[0]).sum()


def literal_results(ws, x):
    def body(c, w):
        _, total = c
        return (0.0, total + (x @ w).sum()), 1.0

    (zero, total), ones = lax.scan(body, (3.0, 0.0), ws)
    return zero + total + ones.sum()


def manual_sum(ws, x):
    def body(w, x):
        part = x @ w[:2]
        return lax.psum(part, "mp") + lax.axis_index("dp")

    return mapped(body, (P(), P("dp", "mp")), P("dp"))(ws[0], x).sum()


def manual_ring_in_scan(ws, x):
    def body(ws, x):
        def step(c, w):
            c = lax.ppermute(jnp.sin(c @ w), "dp", [(i, (i + 1) % 4) for i in range(4)])
            return c, lax.pmean(c, ("dp", "mp")).sum()

        return lax.scan(step, x, ws)

    out, sums = mapped(body, (P(), P("dp")), (P("dp"), P()), check_vma=False)(ws, x)
    return out.sum() + sums.sum()


def manual_partly(ws, x):
    def body(w, x):
        full = lax.all_gather(x, "mp", axis=1, tiled=True) @ w
        return lax.psum_scatter(full, "mp", scatter_dimension=1, tiled=True)

    fn = mapped(body, (P(), P(None, "mp")), P(None, "mp"), axis_names={"mp"})
    return jax.jit(fn)(ws[0], x).sum()


def manual_in_manual(ws, x):
    def inner(x):
        return lax.psum(x, "mp")

    def body(x):
        total = jax.shard_map(
            inner, in_specs=P(None, "mp"), out_specs=P(), axis_names={"mp"}
        )(jnp.sin(x))
        return total * lax.axis_size("dp")

    fn = mapped(body, P("dp"), P("dp"), axis_names={"dp"})
    return jax.jit(fn)(x).sum() + ws.sum()


def manual_remat_and_branch(ws, x):
    def body(w, x):
        @jax.checkpoint
        def run(x):
            turned = lax.all_to_all(
                x @ w, "mp", split_axis=1, concat_axis=0, tiled=True
            )
            positive = lax.psum(x.sum(), ("dp", "mp")) > 0
            return lax.cond(positive, jnp.sin, jnp.cos, turned)

        return run(x)

    fn = mapped(body, (P(), P("dp")), P("dp", "mp"), check_vma=False)
    return fn(ws[0], x).sum()


def pinned_call(ws, x):
    mesh = user_mesh()
    pinned = jax.jit(
        lambda x, w: (jnp.sin(x) @ w, w),
        in_shardings=(NamedSharding(mesh, P("dp")), None),
        out_shardings=(NamedSharding(mesh, P("dp", "mp")), None),
    )
    y, w = pinned(x, ws[0])
    return y.sum() + w.sum()


def pinned_values(ws, x):
    mesh = user_mesh()
    x = lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, P("dp", None)))
    x = jax.device_put(x @ ws[0], NamedSharding(mesh, P(None, "mp")))

    def body(c, w):
        return lax.with_sharding_constraint(c @ w, NamedSharding(mesh, P("mp"))), None

    return lax.scan(body, x, ws)[0].sum()


DIFFERENTIABLE = [
    branch_in_scan_in_remat,
    call_in_branch_in_branch,
    literal_results,
    manual_in_manual,
    manual_partly,
    manual_remat_and_branch,
    manual_ring_in_scan,
    manual_sum,
    nested_remat_with_constants,
    own_derivative_in_scan,
    pinned_call,
    pinned_values,
    solved,
    three_branches,
]


def while_until(ws, x):
    def body(c):
        i, x = c
        return i + 1, jnp.tanh(x @ ws[0]) + 0.5

    _, x = lax.while_loop(lambda c: (c[1].sum() < 40) & (c[0] < 9), body, (0, x))
    return x.sum()


def while_in_manual(ws, x):
    def body(w, x):
        def more(c):
            return lax.psum(c.sum(), ("dp", "mp")) < 30

        return lax.while_loop(more, lambda c: c @ jnp.abs(w) + 1.0, x)

    return mapped(body, (P(), P("dp")), P("dp"), check_vma=False)(ws[0], x).sum()


def while_in_while(ws, x):
    def inner(i, c):
        return lax.while_loop(lambda c: c[0] < i, lambda c: (c[0] + 1, c[1] @ ws[0]), c)

    def outer(c):
        i, x = c
        return i + 1, inner(i, (0, jnp.cos(x)))[1]

    return lax.while_loop(lambda c: c[0] < 3, outer, (0, x))[1].sum()


def own_kernel(ws, x):
    def double(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2.0

    kernel = pl.pallas_call(
        double,
        out_shape=jax.ShapeDtypeStruct((8, 4), jnp.float32),
        interpret=True,
        name="double",
    )
    return kernel(x).sum() + kernel(x + 1.0).sum()


def manual_kernel(ws, x):
    """A kernel that asks for its place on the mesh, by the name of the axis."""

    def scale(x_ref, o_ref):
        o_ref[...] = x_ref[...] * (1.0 + lax.axis_index("mp"))

    def body(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(scale, out_shape=shape, interpret=True, name="scale")(x)

    return mapped(body, P("dp", "mp"), P("dp", "mp"), check_vma=False)(x).sum()


@custom_partitioning
def _opaque(x):
    return jnp.sin(x)


_opaque.def_partition(
    partition=lambda mesh, args, result: (
        mesh,
        jnp.sin,
        result.sharding,
        (args[0].sharding,),
    ),
    infer_sharding_from_operands=lambda mesh, args, result: args[0].sharding,
    sharding_rule="i j -> i j",
)


def own_partitioning(ws, x):
    return _opaque(x).sum()


FORWARD = [
    composed,
    manual_kernel,
    own_kernel,
    own_partitioning,
    while_in_manual,
    while_in_while,
    while_until,
]


def arguments():
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32),
        jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
    ]


def whole(fn, grad):
    return jax.value_and_grad(fn, argnums=(0, 1)) if grad else fn


def same(address, slot, value):
    return value
