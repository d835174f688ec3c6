"""Gathers, scatters, and random numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import random as extended
from rules.case import I32, KEY, U32, Arg, Case

X = Arg((4, 6))


def _windows(size: int) -> Any:
    return jax.vmap(lambda row, at: lax.dynamic_slice(row, (at,), (size,)))


def _updates(row: Any, window: Any, at: Any) -> Any:
    return lax.dynamic_update_slice(row, window, (at,))


IDS, ROWS, TABLE = Arg((4, 3), I32, 10), Arg((4, 3, 6)), Arg((10, 6))
PUT = "k l, i j 1, i j l -> k l {i=4 j=3 k=10 l=6} "
INDEXING = [
    Case("gather", lambda t, ids: t.at[ids].get(mode="fill"), (TABLE, IDS),
         "k l, i j 1 -> i j l {i=4 j=3 k=10 l=6} reduce k"),
    # Along a batch dim that indices and table share.
    Case("gather", lambda x, ids: jnp.take_along_axis(x, ids, 1, mode="fill"),
         (X, Arg((4, 2), I32)), "i k, i j 1 -> i j {i=4 j=2 k=6} reduce k"),
    # Rows of the result stand behind the window's dim.
    Case("gather", lambda t, ids: t.at[:, ids].get(mode="fill"),
         (Arg((5, 10)), IDS), "k l, i j 1 -> k i j {i=4 j=3 k=5 l=10} reduce l"),
    # Two dims are indexed by pairs of numbers.
    Case("gather", lambda t, a, b: t.at[a, b].get(mode="fill"),
         (Arg((10, 7)), Arg((4,), I32, 10), Arg((4,), I32, 7)),
         "j k, i l -> i {i=4 j=10 k=7 l=2} reduce j k blocked l"),
    # A window that is most of a dim, and one that is not.
    Case("gather", _windows(12), (Arg((3, 16)), Arg((3,), I32)),
         "i j, i 1 -> i j {i=3 j=16} blocked j"),
    Case("gather", _windows(4), (Arg((3, 16)), Arg((3,), I32)),
         "i j, i 1 -> i k {i=3 j=16 k=4} blocked j k"),
    Case("scatter-add", lambda t, ids, u: t.at[ids].add(u), (TABLE, IDS, ROWS),
         PUT + "reduce i j"),
    Case("scatter-sub", lambda t, ids, u: t.at[ids].subtract(u), (TABLE, IDS, ROWS),
         PUT + "reduce i j"),
    Case("scatter", lambda t, ids, u: t.at[ids].set(u), (TABLE, IDS, ROWS),
         PUT + "blocked i j"),
    Case("scatter-max", lambda t, ids, u: t.at[ids].max(u), (TABLE, IDS, ROWS),
         PUT + "reduce i j"),
    Case("scatter-min", lambda t, ids, u: t.at[ids].min(u), (TABLE, IDS, ROWS),
         PUT + "reduce i j"),
    Case("scatter-mul", lambda t, ids, u: t.at[ids].multiply(u), (TABLE, IDS, ROWS),
         PUT + "reduce i j"),
    Case("scatter-add", lambda t, a, b, u: t.at[a, b].add(u),
         (Arg((10, 7)), Arg((4,), I32, 10), Arg((4,), I32, 7), Arg((4,))),
         "k l, i j, i -> k l {i=4 j=2 k=10 l=7} reduce i blocked j"),
    Case("scatter-add", lambda t, ids, u: t.at[:, ids].add(u),
         (Arg((5, 10)), Arg((4,), I32, 10), Arg((5, 4))),
         "j k, i 1, j i -> j k {i=4 j=5 k=10} reduce i"),
    # A function of the user's in place of the sum.
    Case("scatter", lambda t, ids: t.at[ids].apply(jnp.sin), (TABLE, IDS),
         "k l, i j 1, i j l -> k l {i=4 j=3 k=10 l=6} blocked i j"),
    Case("scatter-add", lambda x, ids, u: jax.ops.segment_sum(x, ids, 5),
         (Arg((8, 6)), Arg((8,), I32, 5), X), "j k, i 1, i k -> j k "
         "{i=8 j=5 k=6} reduce i"),
    Case("scatter", jax.vmap(_updates),
         (Arg((3, 16)), Arg((3, 12)), Arg((3,), I32)),
         "i j, i 1, i j -> i j {i=3 j=16} blocked j"),
    Case("scatter", jax.vmap(_updates),
         (Arg((3, 16)), Arg((3, 4)), Arg((3,), I32)),
         "i j, i 1, i k -> i j {i=3 j=16 k=4} blocked j k"),
]  # fmt: skip

K, KS = Arg((), KEY), Arg((3,), KEY)


def _raw_bits(key: Any) -> Any:
    return extended.threefry_prng_impl.random_bits(key, 32, (4, 6))


RANDOM = [
    Case("random_bits", lambda k: jax.random.bits(k, (4, 6)), (K,),
         ". -> i j {i=4 j=6}"),
    Case("random_bits", jax.vmap(lambda k: jax.random.bits(k, (4, 6))), (KS,),
         "i -> i j k {i=3 j=4 k=6}"),
    Case("random_clone", jax.random.clone, (KS,), "i -> i {i=3}"),
    Case("random_fold_in", jax.vmap(jax.random.fold_in), (KS, Arg((3,), I32)),
         "i, i -> i {i=3}"),
    Case("random_fold_in", jax.random.fold_in, (K, Arg((), I32)), "., . -> . {}"),
    Case("random_gamma", jax.random.gamma, (K, X), "., i j -> i j {i=4 j=6}"),
    Case("random_gamma", jax.vmap(jax.random.gamma), (KS, Arg((3, 4))),
         "i, i j -> i j {i=3 j=4}"),
    Case("random_seed", jax.random.key, (Arg((), I32),), ". -> . {}"),
    Case("random_seed", jax.vmap(jax.random.key), (Arg((3,), I32),), "i -> i {i=3}"),
    Case("random_split", jax.random.split, (K,), ". -> i {i=2} blocked i"),
    Case("random_split", jax.vmap(jax.random.split), (KS,),
         "i -> i j {i=3 j=2} blocked j"),
    Case("random_unwrap", jax.random.key_data, (KS,), "i -> i j {i=3 j=2} blocked j"),
    Case("random_wrap", jax.random.wrap_key_data, (Arg((3, 2), U32),),
         "i j -> i {i=3 j=2} blocked j"),
    Case("rng_bit_generator", lambda k: lax.rng_bit_generator(k, (6,)),
         (Arg((4,), U32),), "i -> j, k {i=4 j=4 k=6} blocked i j k"),
    Case("rng_uniform", lambda a, b: lax.rng_uniform(a, b, (4, 6)),
         (Arg(()), Arg(())), "., . -> i j {i=4 j=6}"),
    Case("iota_2x32_shape", _raw_bits, (Arg((2,), U32),),
         " -> i j, i j {i=4 j=6}"),
]  # fmt: skip
