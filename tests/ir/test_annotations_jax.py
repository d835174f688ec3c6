"""Shardings that JAX itself knows: constraints, reshard, shardings of inputs."""

from __future__ import annotations

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import with_sharding_constraint
from jax.sharding import AbstractMesh, AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from autoshard.ir.annotate import annotate
from autoshard.ir.errors import InputError
from autoshard.ir.interpret import evaluate
from autoshard.ir.trace import trace

W = jax.ShapeDtypeStruct((4, 8), jnp.float32)
X = jax.ShapeDtypeStruct((8, 4), jnp.float32)
TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
KINDS = pytest.mark.parametrize("kind", ["auto", "explicit"])


def mesh_of(kind):
    return AbstractMesh((4, 2), ("dp", "tp"), axis_types=(TYPES[kind],) * 2)


def under(kind):
    return jax.sharding.use_abstract_mesh(mesh_of(kind))


def found(traced):
    return [(s.kind, s.dims) for s in traced.seeds]


def constrained(sharding, w, x):
    return jax.lax.with_sharding_constraint(x @ w, sharding).sum()


ONE = [("with_sharding_constraint", (("dp",), ()))]


@KINDS
def test_a_constraint_with_a_mesh_of_its_own(kind):
    sharding = NamedSharding(mesh_of(kind), P("dp"))
    traced = trace(partial(constrained, sharding), [W, X])
    assert found(traced) == ONE
    [seed] = traced.seeds
    assert "with_sharding_constraint at " in seed.origin
    assert "test_annotations_jax.py:" in seed.origin
    assert "(constrained)" in seed.origin
    assert traced.program.values[seed.value].shape == (8, 8)
    assert traced.annotations.found == {"with_sharding_constraint": 1}
    assert traced.annotations.reached == {"with_sharding_constraint": 1}


@pytest.mark.parametrize("kind", ["auto", "explicit", "none"])
def test_a_constraint_with_a_bare_spec(kind):
    with contextlib.nullcontext() if kind == "none" else under(kind):
        traced = trace(partial(constrained, P("dp")), [W, X])
    assert found(traced) == ONE


@pytest.mark.filterwarnings("ignore:.*with mesh:DeprecationWarning")
@KINDS
def test_a_constraint_under_the_old_mesh_context(kind):
    with jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(TYPES[kind],) * 2):
        traced = trace(partial(constrained, P("dp")), [W, X])
    assert found(traced) == ONE


def test_a_constraint_on_a_concrete_explicit_mesh_in_force():
    mesh = jax.make_mesh((4, 2), ("dp", "tp"))
    with jax.set_mesh(mesh):
        traced = trace(partial(constrained, P("dp")), [W, X])
    assert found(traced) == ONE


def test_a_constraint_imported_by_name_and_of_a_pytree():
    def fn(x):
        tree = with_sharding_constraint(
            {"a": x, "b": [x + 1]}, {"a": P("dp"), "b": P()}
        )
        return tree["a"] + tree["b"][0]

    kind = "with_sharding_constraint"
    assert found(trace(fn, [X])) == [(kind, (("dp",), ())), (kind, ((), ()))]


@pytest.mark.parametrize("own_mesh", [False, True])
def test_an_unconstrained_dim_is_open(own_mesh):
    spec = P(P.UNCONSTRAINED, ("dp", "tp"))
    target = NamedSharding(mesh_of("auto"), spec) if own_mesh else spec
    traced = trace(partial(constrained, target), [W, X])
    assert found(traced) == [("with_sharding_constraint", (None, ("dp", "tp")))]


@pytest.mark.parametrize("own_mesh", [False, True])
@KINDS
def test_reshard(kind, own_mesh):
    target = NamedSharding(mesh_of(kind), P("dp")) if own_mesh else P("dp")

    def fn(w, x):
        return (jax.sharding.reshard(x, target) @ w + reshard(x, target) @ w).sum()

    with contextlib.nullcontext() if own_mesh else under(kind):
        traced = trace(fn, [W, X])
    assert found(traced) == [("reshard", (("dp",), ()))] * 2
    assert traced.annotations.found == {"reshard": 2}
    assert traced.annotations.reached == {"reshard": 2}


def test_operations_with_an_out_sharding_on_an_explicit_mesh():
    def fn(w, x):
        y = jnp.einsum("ab,bc->ac", x, w, out_sharding=P("dp", "tp"))
        return reshard(y * 2, P("dp", None)).sum()

    with under("explicit"):
        traced = trace(fn, [W, X])
    assert ("out_sharding", (("dp",), ("tp",))) in found(traced)
    assert ("reshard", (("dp",), ())) in found(traced)
    w, x = np.ones((4, 8), np.float32), np.ones((8, 4), np.float32)
    [got] = evaluate(traced.jaxpr, [w, x], lambda address, slot, value: value)
    np.testing.assert_allclose(got, 2 * 4 * 64)


def test_an_explicit_program_that_no_mesh_suits():
    def fn(w, x):
        return jnp.einsum("ab,bc->ac", x, w, out_sharding=P("unknown")).sum()

    with under("explicit"), pytest.raises(InputError) as caught:
        trace(fn, [W, X])
    assert "axis_types=(jax.sharding.AxisType.Auto,) * n" in str(caught.value)
    assert "jax.lax.with_sharding_constraint(y, spec)" in str(caught.value)


# -- inputs ----------------------------------------------------------------------


@KINDS
def test_shardings_of_abstract_inputs(kind):
    def lies(like, spec):
        return jax.ShapeDtypeStruct(
            like.shape, like.dtype, sharding=NamedSharding(mesh_of(kind), spec)
        )

    def fn(params, batch):
        # On an Explicit mesh this product would need to be told its result's sharding.
        return (batch["x"] @ params["w"]).sum()

    args = [{"w": lies(W, P("tp", None))}, {"x": lies(X, P("dp", "tp"))}]
    traced = trace(fn, args)
    assert [(s.origin, s.dims) for s in traced.seeds] == [
        ("NamedSharding of 0/w", (("tp",), ())),
        ("NamedSharding of batch/x", (("dp",), ("tp",))),
    ]
    assert traced.annotations.found == {"NamedSharding": 2}
    assert all(leaf.sharding is None for leaf in jax.tree.leaves(traced.args))


def test_shardings_of_arrays():
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh, P(None, "tp")))
    here = jnp.ones((8, 4))  # on one device, which says nothing
    alone = jax.make_mesh((1,), ("dp",), axis_types=(AxisType.Auto,))
    one = jax.device_put(jnp.ones((8, 4)), NamedSharding(alone, P("dp")))
    traced = trace(lambda w, y, x: (x @ w).sum() + y.sum(), [spread, one, here])
    assert [(s.origin, s.dims) for s in traced.seeds] == [
        ("NamedSharding of 0", ((), ("tp",)))
    ]


@KINDS
def test_arrays_made_under_a_mesh_are_not_annotated_by_it(kind):
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(TYPES[kind],) * 2)
    with jax.set_mesh(mesh):
        w = jax.jit(lambda: jnp.ones((4, 8)))()
        abstract = jax.eval_shape(lambda: jnp.ones((8, 4)))
        assert trace(lambda w, x: (x @ w).sum(), [w, abstract]).seeds == ()


def test_a_whole_copy_on_every_device_may_be_asked_for():
    lies = NamedSharding(mesh_of("auto"), P())
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=lies)
    assert found(trace(lambda x: x.sum(), [x])) == [("NamedSharding", ((), ()))]


def test_a_sharding_without_axes_is_lost():
    class Odd(jax.sharding.Sharding):
        num_devices = 8

        def __repr__(self):
            return "Odd()"

    class Leaf:
        shape, dtype, sharding = (8, 4), np.dtype(np.float32), Odd()
        ndim = 2

    report = trace(lambda x: x.sum(), [Leaf()]).annotations
    with pytest.raises(InputError, match=r"Odd\(\), which names no mesh axes"):
        report.check()


@pytest.mark.parametrize("side", ["in", "out"])
def test_shardings_of_a_jit(side):
    lies = NamedSharding(mesh_of("auto"), P("dp"))
    if side == "in":
        fn = jax.jit(lambda w, x: (x @ w).sum(), in_shardings=(None, lies))
    else:
        fn = jax.jit(lambda w, x: x @ w, out_shardings=lies)
    traced = trace(fn, [W, X])
    assert found(traced) == [("jit shardings", (("dp",), ()))]


def test_a_device_put_onto_a_mesh():
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    target = NamedSharding(mesh, P("dp"))
    traced = trace(lambda x: jax.device_put(x * 2, target).sum(), [X])
    assert found(traced) == [("device_put", (("dp",), ()))]


# -- counting --------------------------------------------------------------------


def layer(x):
    return jnp.tanh(annotate(x, "batch", "embed"))


def test_a_line_counts_once_however_often_it_is_traced():
    @jax.custom_vjp
    def custom(x):
        return annotate(x * 2, "batch", "embed")

    def forward(x):
        return annotate(x * 2, "batch", "embed"), None

    custom.defvjp(forward, lambda _, ct: (ct * 2,))

    def loss(w, x):
        x = jax.checkpoint(layer)(x @ w)
        x, _ = jax.lax.scan(lambda c, _: (layer(c), None), x, None, length=3)
        x = jax.lax.cond(x.sum() > 0, layer, lambda x: x, x)
        return custom(x).sum()

    w = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    report = trace(jax.grad(loss), [w, X]).annotations
    # That of `layer` and that of `forward`; `custom` itself is never run.
    assert (report.found, report.reached) == ({"annotate": 2}, {"annotate": 2})
    assert report.unused == report.lost == ()
    report.check()


def test_a_line_of_which_no_equation_is_left_is_unused_not_lost():
    def fn(x):
        jax.eval_shape(layer, x)
        return x.sum()

    report = trace(fn, [X]).annotations
    assert report.counts == report.lost == ()
    [unused] = report.unused
    assert unused.startswith("annotate at ")
    assert unused.endswith("(layer)")
    report.check()
    assert str(report) == f"unused: {unused}"


def test_mesh_axes_in_annotate_are_seeds():
    traced = trace(lambda x: annotate(x, "dp", "embed").sum(), [X])
    assert found(traced) == [("annotate", (("dp",), None))]
    [op] = [o for o in traced.program.ops if o.primitive == "autoshard_annotate"]
    assert op.params["names"] == (None, "embed")


def test_names_of_a_strategy_say_what_a_name_is():
    def fn(x):
        return annotate(x, "rows", "tp").sum()

    traced = trace(fn, [X], aliases={"rows": "data"}, logical=["tp"])
    assert found(traced) == [("annotate", (("rows",), None))]
    [op] = [o for o in traced.program.ops if o.primitive == "autoshard_annotate"]
    assert op.params["names"] == (None, "tp")


def test_vmap_leaves_its_dim_open():
    fn = jax.vmap(lambda row: jax.lax.with_sharding_constraint(row, P("tp")))
    traced = trace(lambda x: fn(x).sum(), [X])
    assert found(traced) == [("with_sharding_constraint", (None, ("tp",)))]


def test_what_is_answered_is_as_before_afterwards():
    with pytest.raises(ZeroDivisionError):
        trace(lambda x: 1 / 0, [X])
    for function in (jax.lax.with_sharding_constraint, jax.sharding.reshard):
        assert function.__code__.co_name == function.__name__
    with pytest.raises(RuntimeError, match="non-empty mesh"):
        jax.jit(lambda x: jax.lax.with_sharding_constraint(x, P("dp")))(jnp.ones(8))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P("dp", None, None), "has 3 entries, but the array has 2 dims"),
        (P(unreduced={"dp"}), "asks for partial sums"),
    ],
)
def test_specs_that_do_not_fit(spec, message):
    with pytest.raises(InputError, match=message):
        trace(partial(constrained, spec), [W, X])


def test_a_manual_region_tells_the_sizes_of_its_axes():
    part = jax.shard_map(
        lambda x: jax.lax.psum(x, "dp"),
        mesh=mesh_of("auto"),
        in_specs=P("dp"),
        out_specs=P(),
    )
    assert trace(lambda x: part(x).sum(), [X]).mesh_sizes == {"dp": 4, "tp": 2}
