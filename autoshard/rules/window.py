"""Windows that slide over a dim: convolutions and pooling.

A result at place o reads the places o * stride - pad + k * dilation of the input, whose
elements lie `base` places apart. If the input, counted in places, is as long as the
result times its stride, then a device that holds a part of one needs the same part of
the other, and a margin of its neighbours: the halo. The same holds, with result and
kernel changing parts, when the kernel is as long as the input, as in the gradient of a
kernel; each device then makes a partial sum. In every other case the parts do not lie
one above the other, and the dim is blocked.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from jax.lax import ConvDimensionNumbers

from autoshard.rules.core import Dim, FactorRule, Factors, Halo, RuleContext
from autoshard.rules.registry import Example, register


@dataclass(frozen=True, slots=True)
class Slide:
    """One dim under a window: sizes in elements, distances in places."""

    n_in: int
    n_out: int
    n_kernel: int
    stride: int = 1
    dilation: int = 1
    base: int = 1
    pad: int = 0
    end: int = 0

    def halo(self, *, along_kernel: bool = False) -> Halo | None:
        """Elements of its neighbours that a part needs; None if parts do not align.

        A part whose halo is longer than half of the dim is no part: even two devices
        would need all of it.

        >>> Slide(n_in=32, n_out=32, n_kernel=3, pad=1).halo()
        (1, 1)
        >>> Slide(n_in=32, n_out=16, n_kernel=3, stride=2).halo()
        (0, 1)
        >>> Slide(n_in=32, n_out=30, n_kernel=3).halo() is None
        True
        """
        cut, other = (self.n_out, self.stride), (self.n_kernel, self.dilation)
        if along_kernel:
            cut, other = other, cut
        size, step = cut
        others, other_step = other
        if self.n_in * self.base != size * step or min(self.n_in, size) < 2:
            return None
        low = max(0, self.pad) // self.base
        last = (others - 1) * other_step - self.pad - step
        high = max(0, last // self.base + 1)
        return (low, high) if 2 * max(low, high) <= self.n_in else None

    @property
    def tiles(self) -> bool:
        """Whether the windows lie side by side and cover the input exactly."""
        return (
            self.n_kernel == self.stride > 1
            and self.dilation == self.base == 1
            and self.pad == 0
            and self.n_in == self.n_out * self.stride
        )


def _slid(
    factors: Factors, s: Slide, *, pooled: bool = False, sums: bool = True
) -> tuple[Dim, Dim, Dim]:
    """Factors of the input, the kernel and the result along one dim.

    Args:
        factors: Where new factors are added.
        s: The dim.
        pooled: The window is no array: its own dim has a factor only where the windows
            tile the input.
        sums: Results of parts of one window can be combined.
    """
    # With padding XLA's partitioner sums the places of a convolution over all devices,
    # those too that hold the same ones (seen with JAX 0.10.2).
    sums = sums and (pooled or s.pad == s.end == 0)
    if s.tiles:
        out = factors.new(s.n_out)
        kernel = factors.new(s.n_kernel, "blocked" if out or not sums else "reduce")
        return (*out, *kernel), kernel, out
    if (halo := s.halo()) is not None:
        free = s.n_in == s.n_out and halo == (0, 0)
        dim = factors.new(s.n_out, "pass" if free else "shift", halo)
        return dim, (() if pooled else factors.new(s.n_kernel, "blocked")), dim
    halo = s.halo(along_kernel=True)
    # With a halo it does, too.
    if halo == (0, 0) and sums and (not pooled or s.n_out == 1):
        dim = factors.new(s.n_kernel, "reduce")
        return dim, dim, factors.new(s.n_out, "blocked")
    # Nothing can be cut. The input is still the same dim as what is more like it: the
    # result, or in the gradient of a kernel the cotangent that lies where the kernel
    # did.
    places = s.n_in * s.base
    like_out = abs(places - s.n_out * s.stride)
    like_kernel = abs(places - s.n_kernel * s.dilation)
    with_out = pooled or like_out <= like_kernel
    tied, alone = (s.n_out, s.n_kernel) if with_out else (s.n_kernel, s.n_out)
    dim = factors.new(max(s.n_in, tied), "blocked")
    other = () if pooled else factors.new(alone, "blocked")
    # A dim of size one has no part of the other to hold.
    mine, its = (dim if s.n_in > 1 else ()), (dim if tied > 1 else ())
    return (mine, other, its) if with_out else (mine, its, other)


@register(
    "conv_general_dilated",
    reads=[
        "batch_group_count",
        "dimension_numbers",
        "feature_group_count",
        "lhs_dilation",
        "padding",
        "rhs_dilation",
        "window_strides",
    ],
    example=Example(
        ((8, 4, 32), (16, 4, 3)),
        ((8, 16, 32),),
        {
            "batch_group_count": 1,
            "dimension_numbers": ConvDimensionNumbers((0, 1, 2), (0, 1, 2), (0, 1, 2)),
            "feature_group_count": 1,
            "lhs_dilation": (1,),
            "padding": ((1, 1),),
            "rhs_dilation": (1,),
            "window_strides": (1,),
        },
    ),
)
def _conv(ctx: RuleContext) -> FactorRule:
    """Batch and features as in a matrix product, space as in the module's docstring.

    Groups of features are the major part of the features on both sides. Groups of the
    batch, which the gradient of a grouped convolution has, are the major part of the
    input's batch and of the result's features.
    """
    p = ctx.params
    lhs, rhs = ctx.operands
    out = ctx.results[0]
    at_lhs, at_rhs, at_out = p["dimension_numbers"]
    groups, batch_groups = p["feature_group_count"], p["batch_group_count"]
    factors = Factors()
    a: list[Dim] = [() for _ in lhs]
    b: list[Dim] = [() for _ in rhs]
    c: list[Dim] = [() for _ in out]
    batch = factors.new(out[at_out[0]])
    group = factors.new(groups * batch_groups)
    wide = factors.new(out[at_out[1]] // (groups * batch_groups))
    # Within a group of features only the major part of a dim can be cut.
    summed = factors.new(rhs[at_rhs[1]], "reduce" if groups == 1 else "blocked")
    a[at_lhs[0]] = (*group, *batch) if batch_groups > 1 else batch
    a[at_lhs[1]] = (*group, *summed) if groups > 1 else summed
    b[at_rhs[0]] = c[at_out[1]] = (*group, *wide)
    b[at_rhs[1]] = summed
    c[at_out[0]] = batch
    for k, (la, lb, lc) in enumerate(
        zip(at_lhs[2:], at_rhs[2:], at_out[2:], strict=True)
    ):
        slide = Slide(
            n_in=lhs[la],
            n_out=out[lc],
            n_kernel=rhs[lb],
            stride=p["window_strides"][k],
            dilation=p["rhs_dilation"][k],
            base=p["lhs_dilation"][k],
            pad=p["padding"][k][0],
            end=p["padding"][k][1],
        )
        a[la], b[lb], c[lc] = _slid(factors, slide)
    if groups > 1 or batch_groups > 1:
        # XLA's partitioner computes many layouts of these wrongly, or aborts (seen with
        # JAX 0.10.2). Groups of features may at least be cut along the batch.
        safe = batch if batch_groups == 1 else ()
        factors.kinds = [
            kind if (f,) == safe else "blocked" for f, kind in enumerate(factors.kinds)
        ]
        factors.halos = [(0, 0)] * len(factors.halos)
    # Each point of the result sums over one group of features and over the window.
    products = prod(out) * prod(rhs) // max(rhs[at_rhs[0]], 1)
    return factors.rule(
        [tuple(a), tuple(b)], [tuple(c)], "matmul", flops=2.0 * products
    )


_WINDOW = (
    "base_dilation",
    "padding",
    "window_dilation",
    "window_dimensions",
    "window_strides",
)
_POOL = {
    "base_dilation": (1, 1),
    "padding": ((0, 0), (1, 1)),
    "window_dilation": (1, 1),
    "window_dimensions": (1, 3),
    "window_strides": (1, 1),
}


def _slides(
    ctx: RuleContext, whole: tuple[int, ...], pooled: tuple[int, ...]
) -> list[Slide]:
    p = ctx.params
    ones = (1,) * len(whole)  # a gradient has no dilations
    return [
        Slide(*sizes, pad=padding[0])
        for *sizes, padding in zip(
            whole,
            pooled,
            p["window_dimensions"],
            p["window_strides"],
            p.get("window_dilation") or ones,
            p.get("base_dilation") or ones,
            p["padding"],
            strict=True,
        )
    ]


def _pooled(ctx: RuleContext, *, sums: bool, together: bool = False) -> FactorRule:
    """A window over one operand, or over several that are compared together."""
    whole, out = ctx.operands[0], ctx.results[0]
    factors = Factors()
    dims = [
        _slid(factors, slide, pooled=True, sums=sums)
        for slide in _slides(ctx, whole, out)
    ]
    if together:
        # XLA's partitioner aborts where the arrays lie differently (seen with JAX
        # 0.10.2), so each device does its part by itself, without its neighbours.
        factors.kinds = ["blocked" if k == "shift" else k for k in factors.kinds]
        factors.halos = [(0, 0)] * len(factors.halos)
    window = prod(ctx.params["window_dimensions"])
    return factors.rule(
        # The start values of a window with a function of the user's are scalars.
        [tuple(a for a, _, _ in dims) if shape else () for shape in ctx.operands],
        [tuple(c for _, _, c in dims) for _ in ctx.results],
        "reduce",
        flops=float(prod(out) * window),
    )


@register(
    "reduce_window_max",
    "reduce_window_min",
    "reduce_window_sum",
    reads=_WINDOW,
    example=Example(((8, 32),), ((8, 32),), _POOL),
)
def _reduce_window(ctx: RuleContext) -> FactorRule:
    return _pooled(ctx, sums=True)


@register(
    "reduce_window",
    reads=_WINDOW,
    example=Example(((8, 32), ()), ((8, 32),), _POOL),
)
def _reduce_window_by_function(ctx: RuleContext) -> FactorRule:
    return _pooled(ctx, sums=False, together=len(ctx.results) > 1)


@register(
    "select_and_gather_add",
    reads=_WINDOW,
    example=Example(((8, 32), (8, 32)), ((8, 32),), _POOL),
)
def _select_and_gather_add(ctx: RuleContext) -> FactorRule:
    """The element of the first operand where the second has the window's best."""
    return _pooled(ctx, sums=False, together=True)


@register(
    "select_and_scatter_add",
    reads=["padding", "window_dimensions", "window_strides"],
    example=Example(((8, 32), (8, 32)), ((8, 32),), _POOL),
)
def _select_and_scatter_add(ctx: RuleContext) -> FactorRule:
    """The gradient of a maximum over windows: each goes to where the maximum was.

    Windows that overlap are needed whole: XLA's partitioner computes them wrongly where
    they are cut (seen with JAX 0.10.2 for each window, stride and padding tried).
    """
    source, whole = ctx.operands
    factors = Factors()
    dims = []
    for slide in _slides(ctx, whole, source):
        if slide.halo() is None or slide.tiles or slide.halo() == (0, 0):
            dims.append(_slid(factors, slide, pooled=True, sums=False))
            continue
        dim = factors.new(max(slide.n_in, slide.n_out), "blocked")
        dims.append((dim, (), dim))
    large, small = tuple(a for a, _, _ in dims), tuple(c for _, _, c in dims)
    window = prod(ctx.params["window_dimensions"])
    return factors.rule(
        [small, large], [large], "reduce", flops=float(prod(source) * window)
    )
