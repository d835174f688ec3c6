"""Convolutions and windows, one dim at a time unless two must be told apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rules.case import Arg, Case


def _conv(stride=1, padding=((1, 1),), dilation=1, base=1, groups=1, batch_groups=1):
    def run(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (stride,),
            padding,
            lhs_dilation=(base,),
            rhs_dilation=(dilation,),
            feature_group_count=groups,
            batch_group_count=batch_groups,
        )

    return run


def _kernel_gradient(kernel, **how):
    """The transposed convolution that gives a kernel's gradient, alone."""

    def run(x, g):
        like = jax.ShapeDtypeStruct(kernel, x.dtype)
        [out] = jax.linear_transpose(lambda w: _conv(**how)(x, w), like)(g)
        return out

    return run


def _input_gradient(shape, **how):
    def run(g, w):
        like = jax.ShapeDtypeStruct(shape, w.dtype)
        [out] = jax.linear_transpose(lambda x: _conv(**how)(x, w), like)(g)
        return out

    return run


def _case(fn, lhs, rhs, text):
    return Case("conv_general_dilated", fn, (Arg(lhs), Arg(rhs)), text)


# NCW by OIW unless said otherwise. Factors are made in the order batch, groups, output
# features of a group, input features of a group, then each spatial dim and its window.
CONVOLUTION = [
    # Two spatial dims; windows of 3 and 5 reach 1 and 2 beyond either end.
    _case(
        lambda x, w: lax.conv(x, w, (1, 1), "SAME"), (2, 6, 16, 20), (4, 6, 3, 5),
        "i k l n, j k m o -> i j l n {i=2 j=4 k=6 l=16 m=3 n=20 o=5} "
        "reduce k blocked m o shift l(1,1) n(2,2)",
    ),
    # NWC by WIO, the first layer of a ResNet. Result o reads 2o-3 .. 2o+3; a part of
    # the input ends at 2o+1 for its last o, so 3 are missing below and 2 above.
    _case(
        lambda x, w: lax.conv_general_dilated(
            x, w, (2,), ((3, 3),), dimension_numbers=("NWC", "WIO", "NWC")),
        (2, 32, 6), (7, 6, 4),
        "i l k, m k j -> i l j {i=2 j=4 k=6 l=16 m=7} "
        "reduce k blocked m shift l(3,2)",
    ),
    # Patches side by side: a product over the place within the patch.
    _case(_conv(4, "VALID"), (2, 3, 32), (10, 3, 4),
          "i k (lm), j k m -> i j l {i=2 j=10 k=3 l=8 m=4} reduce k blocked m"),
    # Patches with a gap, a border, or an element left over do not tile.
    _case(_conv(4, "VALID"), (2, 3, 32), (10, 3, 2),
          "i k l, j k m -> i j l {i=2 j=10 k=3 l=8 m=2} "
          "reduce k blocked m shift l(0,0)"),
    _case(_conv(4, ((1, 3),)), (2, 3, 32), (10, 3, 4),
          "i k l, j k m -> i j l {i=2 j=10 k=3 l=32 m=4} reduce k blocked l m"),
    _case(_conv(4, "VALID"), (2, 3, 33), (10, 3, 4),
          "i k l, j k m -> i j l {i=2 j=10 k=3 l=33 m=4} reduce k blocked l m"),
    # A window of one reads no neighbour.
    _case(_conv(1, "VALID"), (2, 6, 8), (4, 6, 1),
          "i k l, j k 1 -> i j l {i=2 j=4 k=6 l=8} reduce k"),
    _case(_conv(2, "VALID"), (2, 6, 16), (4, 6, 1),
          "i k l, j k 1 -> i j l {i=2 j=4 k=6 l=8} reduce k shift l(0,0)"),
    # Without padding the parts of input and result slide apart.
    _case(_conv(1, "VALID"), (2, 6, 10), (4, 6, 3),
          "i k l, j k m -> i j l {i=2 j=4 k=6 l=10 m=3} reduce k blocked l m"),
    # Only above: result o reads o .. o+2. With -1 of padding o+1 .. o+3.
    _case(_conv(1, ((0, 2),)), (2, 6, 16), (4, 6, 3),
          "i k l, j k m -> i j l {i=2 j=4 k=6 l=16 m=3} "
          "reduce k blocked m shift l(0,2)"),
    _case(_conv(1, ((-1, 3),)), (2, 6, 16), (4, 6, 3),
          "i k l, j k m -> i j l {i=2 j=4 k=6 l=16 m=3} "
          "reduce k blocked m shift l(0,3)"),
    # A causal window, only below.
    _case(_conv(1, ((3, 0),)), (2, 6, 16), (4, 6, 4),
          "i k l, j k m -> i j l {i=2 j=4 k=6 l=16 m=4} "
          "reduce k blocked m shift l(3,0)"),
    # A window of 3 with holes is 5 wide.
    _case(_conv(1, ((2, 2),), dilation=2), (2, 6, 16), (4, 6, 3),
          "i k l, j k m -> i j l {i=2 j=4 k=6 l=16 m=3} "
          "reduce k blocked m shift l(2,2)"),
    # A halo of 7 on a dim of 8 is all of it.
    _case(_conv(1, ((7, 7),)), (2, 6, 8), (4, 6, 15),
          "i k l, j k m -> i j l {i=2 j=4 k=6 l=8 m=15} reduce k blocked l m"),
    # The window is the whole input: a product, whatever the stride.
    _case(_conv(1, "VALID"), (2, 6, 8), (4, 6, 8),
          "i k l, j k l -> i j 1 {i=2 j=4 k=6 l=8} reduce k l"),
    _case(_conv(8, "VALID"), (2, 6, 8), (4, 6, 8),
          "i k l, j k l -> i j 1 {i=2 j=4 k=6 l=8} reduce k l"),
    # With padding after it, though no window reaches there, XLA sums it wrongly.
    _case(_conv(8, ((0, 1),)), (2, 6, 8), (4, 6, 8),
          "i k l, j k l -> i j 1 {i=2 j=4 k=6 l=8} reduce k blocked l"),
    # One element in, eight out: nothing to share.
    _case(_conv(1, ((7, 7),)), (2, 6, 1), (4, 6, 8),
          "i k 1, j k m -> i j l {i=2 j=4 k=6 l=8 m=8} reduce k blocked l m"),
    # Three groups of features: 2 in and 4 out each.
    _case(_conv(groups=3), (2, 6, 16), (12, 2, 3),
          "i (jl) m, (jk) l n -> i (jk) m {i=2 j=3 k=4 l=2 m=16 n=3} "
          "blocked j k l m n"),
    _case(_conv(groups=2), (3, 4, 16), (10, 2, 3),
          "i (jl) m, (jk) l n -> i (jk) m {i=3 j=2 k=5 l=2 m=16 n=3} "
          "blocked j k l m n"),
    # Depthwise: a group for each feature.
    _case(_conv(groups=4), (2, 4, 16), (4, 1, 3),
          "i j k, j 1 l -> i j k {i=2 j=4 k=16 l=3} blocked j k l"),
    # Three groups of the batch, each with its own features of the result: whole.
    _case(_conv(batch_groups=3), (6, 5, 16), (12, 5, 3),
          "(ji) l m, (jk) l n -> i (jk) m {i=2 j=3 k=4 l=5 m=16 n=3} "
          "blocked i j k l m n"),
    _case(_conv(batch_groups=2), (6, 5, 16), (8, 5, 3),
          "(ji) l m, (jk) l n -> i (jk) m {i=3 j=2 k=4 l=5 m=16 n=3} "
          "blocked i j k l m n"),
    # Elements two places apart that do not fill the result: still the same dim.
    _case(_conv(1, ((2, 2),), base=2), (2, 6, 8), (4, 6, 3),
          "i k l, j k m -> i j l {i=2 j=4 k=6 l=17 m=3} reduce k blocked l m"),
    # Gradient of a kernel: batch 2 and places 16 are summed, each device over its own
    # with a margin of 1; the input's features are the batch.
    _case(_kernel_gradient((4, 6, 3)), (2, 6, 16), (2, 4, 16),
          "k i l, k j l -> j i m {i=6 j=4 k=2 l=16 m=3} reduce k blocked l m"),
    # With a stride of 2 the cotangent's elements lie two places apart.
    _case(_kernel_gradient((4, 6, 3), stride=2), (2, 6, 16), (2, 4, 8),
          "k i l, k j l -> j i m {i=6 j=4 k=2 l=16 m=3} reduce k blocked l m"),
    # The input is still the dim of the cotangent if they are no longer aligned.
    _case(_kernel_gradient((4, 6, 3), padding="VALID"), (2, 6, 10), (2, 4, 8),
          "k i l, k j l -> j i m {i=6 j=4 k=2 l=10 m=3} reduce k blocked l m"),
    _case(_kernel_gradient((4, 6, 3), stride=4, padding="VALID"), (2, 6, 9), (2, 4, 2),
          "k i l, k j l -> j i m {i=6 j=4 k=2 l=9 m=3} reduce k blocked l m"),
    # Gradient of the input of a strided convolution: result o reads every other place
    # of o-1 .. o+1, which is the element of its own place and the next one.
    _case(_input_gradient((2, 6, 16), stride=2), (2, 4, 8), (4, 6, 3),
          "i k l, k j m -> i j l {i=2 j=6 k=4 l=16 m=3} "
          "reduce k blocked m shift l(0,1)"),
]  # fmt: skip


def _pool(op, start, size, stride=1, padding="VALID", **dilations):
    def run(x):
        return lax.reduce_window(
            x, start, op, (1, size), (1, stride), padding, **dilations
        )

    return run


def _largest(size, stride=1, padding=((0, 0), (0, 0))):
    return _pool(lax.max, -jnp.inf, size, stride, padding)


def _tangent(size, **how):
    return lambda x, t: jax.jvp(_largest(size, **how), (x,), (t,))[1]


def _cotangent(size, **how):
    return lambda g, x: jax.vjp(_largest(size, **how), x)[1](g)[0]


def _pair(size, stride=1, padding=((0, 0), (0, 0))):
    """The largest of one operand, and what the other has there."""

    def best(a, b):
        first = a[0] >= b[0]
        return tuple(jnp.where(first, x, y) for x, y in zip(a, b, strict=True))

    def run(x, y):
        starts = jnp.float32(-jnp.inf), jnp.float32(0)
        return lax.reduce_window((x, y), starts, best, (1, size), (1, stride), padding)

    return run


def _mine(a, b):  # not one of the functions that JAX has a primitive for
    return jnp.logaddexp(a, b)


def _pad(low, high):
    return ((0, 0), (low, high))


X, HALF = Arg((4, 32)), Arg((4, 16))
POOLING = [
    Case("reduce_window_max", _largest(3, padding=_pad(1, 1)), (X,),
         "i j -> i j {i=4 j=32} shift j(1,1)"),
    Case("reduce_window_min", _pool(lax.min, jnp.inf, 3, 2, _pad(1, 1)), (X,),
         "i j -> i j {i=4 j=16} shift j(1,0)"),
    Case("reduce_window_sum", _pool(lax.add, 0.0, 2, 2), (X,),
         "i (jk) -> i j {i=4 j=16 k=2} blocked k"),
    Case("reduce_window_sum", _pool(lax.add, 0.0, 3), (X,),
         "i j -> i j {i=4 j=32} blocked j"),
    Case("reduce_window_sum", _pool(lax.add, 0.0, 32), (X,),
         "i j -> i 1 {i=4 j=32} reduce j"),
    Case("reduce_window_sum", _pool(lax.add, 0.0, 32, 32), (X,),
         "i j -> i 1 {i=4 j=32} reduce j"),
    # Running sums as a window: half of the dim is not enough of a neighbour.
    Case("reduce_window_sum", _pool(lax.add, 0.0, 32, 1, _pad(31, 0)), (X,),
         "i j -> i j {i=4 j=32} blocked j"),
    Case("reduce_window_sum",
         _pool(lax.add, 0.0, 3, 1, _pad(2, 2), window_dilation=(1, 2)), (X,),
         "i j -> i j {i=4 j=32} shift j(2,2)"),
    # Every other place is empty: result o reads o-1 .. o+1, elements o/2 and the next.
    Case("reduce_window_sum",
         _pool(lax.add, 0.0, 3, 1, _pad(1, 2), base_dilation=(1, 2)), (HALF,),
         "i j -> i j {i=4 j=32} shift j(0,1)"),
    # With windows of 5 two elements above, the first of them at o+1.
    Case("reduce_window_sum",
         _pool(lax.add, 0.0, 5, 1, _pad(1, 4), base_dilation=(1, 2)), (HALF,),
         "i j -> i j {i=4 j=32} shift j(0,2)"),
    # Two elements: each device has one and reads the other's; of three, or from three
    # to two, neither has a part of its own.
    Case("reduce_window_sum", _pool(lax.add, 0.0, 2, 1, _pad(0, 1)), (Arg((4, 2)),),
         "i j -> i j {i=4 j=2} shift j(0,1)"),
    Case("reduce_window_sum", _pool(lax.add, 0.0, 2, 1, _pad(1, 1)), (Arg((4, 2)),),
         "i j -> i j {i=4 j=3} blocked j"),
    Case("reduce_window_sum", _pool(lax.add, 0.0, 2), (Arg((4, 3)),),
         "i j -> i j {i=4 j=3} blocked j"),
    Case("reduce_window", _pool(_mine, -np.inf, 3, 1, _pad(1, 1)), (X,),
         "i j, . -> i j {i=4 j=32} shift j(1,1)"),
    Case("reduce_window", _pool(_mine, -np.inf, 32), (X,),
         "i j, . -> i 1 {i=4 j=32} blocked j"),
    Case("reduce_window", _pool(_mine, -np.inf, 32, 32), (X,),
         "i j, . -> i 1 {i=4 j=32} blocked j"),
    # No margin is fetched for a pair of arrays.
    Case("select_and_gather_add", _tangent(3, padding=_pad(1, 1)), (X, X),
         "i j, i j -> i j {i=4 j=32} blocked j"),
    Case("reduce_window", _pair(3, padding=_pad(1, 1)), (X, X),
         "i j, i j, ., . -> i j, i j {i=4 j=32} blocked j"),
    Case("select_and_gather_add", _tangent(32), (X, X),
         "i j, i j -> i 1 {i=4 j=32} blocked j"),
    # Windows side by side: each part has its own.
    Case("select_and_scatter_add", _cotangent(2, stride=2), (HALF, X),
         "i j, i (jk) -> i (jk) {i=4 j=16 k=2} blocked k"),
    Case("select_and_scatter_add", _cotangent(2, stride=4), (Arg((4, 8)), X),
         "i j, i j -> i j {i=4 j=8} shift j(0,0)"),
    # Windows that overlap are needed whole.
    Case("select_and_scatter_add", _cotangent(3, stride=2, padding=_pad(1, 1)),
         (Arg((4, 12)), Arg((4, 24))), "i j, i j -> i j {i=4 j=24} blocked j"),
    # Window o covers 2o-2 .. 2o+2: from a-4, as window a/2-1 ends at a, up to b+2.
    Case("select_and_scatter_add", _cotangent(5, stride=2, padding=_pad(2, 2)),
         (Arg((4, 8)), HALF), "i j, i j -> i j {i=4 j=16} blocked j"),
    # Window o covers o-2 .. o: from a-2 up to b+1.
    Case("select_and_scatter_add", _cotangent(3, padding=_pad(2, 0)), (HALF, HALF),
         "i j, i j -> i j {i=4 j=16} blocked j"),
    # Just half of the dim on either side, and just more.
    Case("select_and_scatter_add", _cotangent(9, padding=_pad(4, 4)), (HALF, HALF),
         "i j, i j -> i j {i=4 j=16} blocked j"),
    Case("select_and_scatter_add", _cotangent(7, stride=2, padding=_pad(3, 3)),
         (Arg((4, 4)), Arg((4, 8))), "i j, i j -> i j {i=4 j=8} blocked j"),
    Case("select_and_scatter_add", _cotangent(32), (Arg((4, 1)), X),
         "i 1, i j -> i j {i=4 j=32} blocked j"),
    Case("select_and_scatter_add", _cotangent(3), (Arg((4, 30)), X),
         "i j, i j -> i j {i=4 j=32} blocked j"),
    # The pooling reads 5 beyond its part, its gradient 10, which is over half of 16.
    Case("select_and_scatter_add", _cotangent(11, padding=_pad(5, 5)), (HALF, HALF),
         "i j, i j -> i j {i=4 j=16} blocked j"),
]  # fmt: skip
