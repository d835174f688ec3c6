"""Ops of manual regions, places, host calls and tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rules.case import F32, I32, Arg, Case


@functools.cache
def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("x",), axis_types=(kind,))


HALVES = P("x")


def _inside(fn, *, spec=HALVES, check=True, rest=0):
    """Runs a function on each device's half of the first dim; its result is dropped."""

    def run(*args):
        def body(*parts):
            fn(*parts)
            return parts[0]

        specs = (spec, *(P() for _ in range(rest)))
        return jax.shard_map(
            body, mesh=_mesh(), in_specs=specs, out_specs=spec, check_vma=check
        )(*args)

    return run


# Every device has 4 of the 8 rows. All dims are blocked, and keep their factor where
# they keep their size.
X = Arg((8, 6))
SAME = "i j -> i j {i=4 j=6} blocked i j"


def _gathered(**how):
    return lambda x: lax.all_gather(x, "x", **how)


def _unreduced(x):
    return lax.pcast(x, "x", to="unreduced")


COLLECTIVE = [
    Case("psum", _inside(lambda x: lax.psum(x, "x"), check=False), (X,), SAME),
    Case("psum_invariant", _inside(lambda x: lax.psum(x, "x")), (X,), SAME),
    Case("pmax", _inside(lambda x: lax.pmax(x, "x")), (X,), SAME),
    Case("pmin", _inside(lambda x: lax.pmin(x, "x")), (X,), SAME),
    Case("pbroadcast", _inside(lambda x: lax.pbroadcast(x, "x", 0)), (X,), SAME),
    Case("pbroadcast_dynamic",
         _inside(lambda x, at: lax.pbroadcast(x, "x", at), rest=1),
         (X, Arg((), I32, 2)), "i j, . -> i j {i=4 j=6} blocked i j",
         since=(0, 11)),
    Case("ppermute", _inside(lambda x: lax.ppermute(x, "x", [(0, 1), (1, 0)])),
         (X,), SAME),
    Case("unreduced_psum", _inside(lambda x: lax.psum(_unreduced(x), "x")), (X,),
         SAME),
    # Gathered along the rows, along a dim of its own before, and after the columns.
    Case("all_gather", _inside(_gathered(tiled=True)), (X,),
         "i j -> k j {i=4 j=6 k=8} blocked i j k"),
    Case("all_gather", _inside(_gathered()), (X,),
         "i j -> k i j {i=4 j=6 k=2} blocked i j k"),
    Case("all_gather", _inside(_gathered(axis=2)), (X,),
         "i j -> i j k {i=4 j=6 k=2} blocked i j k"),
    Case("all_gather_invariant", _inside(_gathered(tiled=True, to="invarying")),
         (X,), "i j -> k j {i=4 j=6 k=8} blocked i j k"),
    Case("all_gather_reduced", _inside(_gathered(tiled=True, to="reduced")),
         (X,), "i j -> k j {i=4 j=6 k=8} blocked i j k"),
    Case("reduce_scatter", _inside(lambda x: lax.psum_scatter(x, "x", tiled=True)),
         (X,), "i j -> k j {i=4 j=6 k=2} blocked i j k"),
    Case("reduce_scatter",
         _inside(lambda x: lax.psum_scatter(x, "x", scatter_dimension=1)),
         (Arg((8, 2)),), "i j -> i {i=4 j=2} blocked i j"),
    Case("reduce_scatter", _inside(lambda x: lax.psum_scatter(x, "x")),
         (Arg((4, 6)),), "i j -> j {i=2 j=6} blocked i j"),
    Case("unreduced_reduce_scatter",
         _inside(lambda x: lax.psum_scatter(_unreduced(x), "x", tiled=True)),
         (X,), "i j -> k j {i=4 j=6 k=2} blocked i j k"),
    Case("all_to_all", _inside(lambda x: lax.all_to_all(x, "x", 1, 0, tiled=True)),
         (Arg((8, 6, 5)),),
         "i j k -> l m k {i=4 j=6 k=5 l=8 m=3} blocked i j k l m"),
    Case("all_to_all", _inside(lambda x: lax.all_to_all(x, "x", 1, 1, tiled=True)),
         (X,), SAME),
    Case("ragged_all_to_all",
         _inside(lambda x, out, *lists: lax.ragged_all_to_all(
             x, out, *lists, axis_name="x"), check=False, rest=5),
         (X, Arg((5, 6)), *[Arg((2,), I32, 1)] * 4),
         "j i, k i, l, m, n, o -> k i {i=6 j=4 k=5 l=2 m=2 n=2 o=2} "
         "blocked i j k l m n o"),
    Case("axis_index", _inside(lambda x: lax.axis_index("x")), (X,), " -> . {}"),
    Case("psend", _inside(lambda x: lax.psend(x, "x", [(0, 1)])), (X,),
         "i j -> . {i=4 j=6} blocked i j", before=(0, 11)),  # deprecated
    Case("precv", _inside(lambda x: lax.precv(
        lax.psend(x, "x", [(0, 1)]), jax.typeof(x), "x", [(0, 1)])), (X,),
         ". -> i j {i=4 j=6} blocked i j", before=(0, 11)),
]  # fmt: skip

FREE = "i j -> i j {i=4 j=6}"


def _reduced(x):
    return lax.pcast(x, "x", to="reduced")


def _reshard(x):
    with jax.sharding.use_abstract_mesh(_mesh(AxisType.Explicit).abstract_mesh):
        return jax.sharding.reshard(x, P("x"))


A = Arg((4, 6))
PLACES = [
    Case("pvary", _inside(lambda x: lax.pcast(x, "x", to="varying"), spec=P()),
         (A,), FREE),
    Case("preduced", _inside(_reduced, spec=P()), (A,), FREE),
    Case("reduced_vary_cast_p", _inside(
        lambda x: lax.pcast(_reduced(x), "x", to="varying"), spec=P()), (A,), FREE,
        before=(0, 11)),
    Case("reduced_vary_cast", _inside(
        lambda x: lax.pcast(_reduced(x), "x", to="varying"), spec=P()), (A,), FREE,
        since=(0, 11)),
    Case("vary_unreduced_cast_p", _inside(_unreduced), (X,), FREE, before=(0, 11)),
    Case("vary_unreduced_cast", _inside(_unreduced), (X,), FREE, since=(0, 11)),
    Case("layout_constraint",
         lambda x: with_layout_constraint(x, Layout((1, 0))), (A,), FREE),
    Case("sharding_constraint",
         lambda x: lax.with_sharding_constraint(x, NamedSharding(_mesh(), P("x"))),
         (A,), FREE),
    Case("reshard", _reshard, (A,), FREE),
    Case("xla_metadata_value", lambda x: set_xla_metadata(x, note="kept"), (A,), FREE),
]  # fmt: skip


def _sink(x):
    lax.dce_sink_p.bind(x)
    return x


def _host(x):
    return x[:, 0]


def _seen(fn):
    def run(x):
        fn(x)
        return x

    return run


HALF = jax.ShapeDtypeStruct((4,), F32)
OUT = "i j -> . {i=4 j=6} blocked i j"
EFFECTS = [
    Case("debug_callback", _seen(lambda x: jax.debug.callback(print, x)), (A,),
         "i j ->  {i=4 j=6} blocked i j"),
    Case("debug_print", _seen(lambda x: jax.debug.print("{}", x)), (A,),
         "i j ->  {i=4 j=6} blocked i j"),
    Case("inspect_sharding",
         _seen(lambda x: jax.debug.inspect_array_sharding(x, callback=print)), (A,),
         "i j ->  {i=4 j=6} blocked i j"),
    Case("io_callback", lambda x: io_callback(_host, HALF, x), (A,),
         "i j -> k {i=4 j=6 k=4} blocked i j k"),
    Case("pure_callback", lambda x: jax.pure_callback(_host, HALF, x), (A,),
         "i j -> k {i=4 j=6 k=4} blocked i j k"),
    Case("create_token", lambda x: (lax.create_token(), x)[1], (A,), " -> . {}"),
    Case("after_all", lambda x: (lax.after_all(lax.create_token()), x)[1], (A,),
         ". -> . {}"),
    Case("dce_sink", _seen(getattr(lax, "dce_sink", None) or _sink), (A,),
         "i j ->  {i=4 j=6}"),
    Case("platform_index",
         lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos), (A,),
         " -> . {}"),
]  # fmt: skip
