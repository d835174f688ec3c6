"""Seconds of the kernels that a layer is made of, on arrays.

One model for plans given as numbers and for traced programs: a product by the larger of
its arithmetic and its memory traffic (the roofline of Williams et al. 2009,
doi:10.1145/1498765.1498785), its arithmetic at a share of peak that falls with its
smallest dim; attention with and without a fused kernel; streams at the bandwidth of
memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from autoshard.cost.constants import Constants

Vector = np.ndarray[Any, np.dtype[np.float64]]
Figures = Vector | float

HBM_EFFICIENCY = 0.85
"""Share of memory bandwidth that streaming kernels reach (BabelStream on A100 and H100
prints 85-92 %)."""


def share_of_peak(generation: str, kind: str, constants: Constants) -> float:
    """Share of peak that large products reach in training.

    Args:
        generation: Of the chip; "other" where it is not known.
        kind: "gpu", "tpu" or "cpu".
        constants: Of the cost model.

    >>> share_of_peak("v5e", "tpu", Constants.priors())
    0.9
    """
    share = constants[f"matmul.{generation}"]
    return share * constants["matmul.training"] if kind == "gpu" else share


def busy_share(smallest: Figures, peak: Figures, half_dim: float) -> Vector:
    """Share of the rate of large products that one of a smallest dim reaches.

    Args:
        smallest: Of the dims m, k and n.
        peak: FLOP/s of the chip.
        half_dim: Smallest dim at which a chip of 1 PFLOP/s reaches half of its rate: a
            faster chip needs larger tiles to keep it busy.

    >>> float(busy_share(512.0, 1e15, 512.0))
    0.5
    """
    smallest = np.asarray(smallest, dtype=np.float64)
    return smallest / (smallest + half_dim * np.asarray(peak) / 1e15)


def product_s(
    m: Figures,
    k: Figures,
    n: Figures,
    *,
    peak: Figures,
    share: Figures,
    hbm: Figures,
    half_dim: float,
    bytes_: float = 2.0,
) -> Vector:
    """Seconds of a product of `[m, k]` and `[k, n]` on one chip.

    Args:
        m: Rows of the left operand.
        k: The dim that is summed.
        n: Columns of the right operand.
        peak: FLOP/s of the chip in the operands' dtype.
        share: Of it that large products reach.
        hbm: Bytes/s of memory.
        half_dim: As in `busy_share`.
        bytes_: Of an element.

    >>> large = dict(peak=1e15, share=1.0, hbm=3e12, half_dim=0.0)
    >>> round(float(product_s(4096, 4096, 4096, **large)) * 1e6)
    137
    """
    smallest = np.minimum(np.minimum(m, k), n)
    rate = peak * share * busy_share(smallest, peak, half_dim)
    traffic = bytes_ * (m * k + k * n + m * n) / (hbm * HBM_EFFICIENCY)
    return np.maximum(2.0 * m * k * n / rate, traffic)


def fused_attention_s(
    tokens: Figures,
    seq: Figures,
    width: Figures,
    head_dim: Figures,
    *,
    peak: Figures,
    share: Figures,
    half_head_dim: float,
) -> Vector:
    """Seconds of causal attention as one kernel, forward.

    Half of the scores are masked and skipped. `share` is at a head_dim of 128.

    Args:
        tokens: Queries on the chip.
        seq: Keys that each may see.
        width: Heads on the chip times their dim.
        head_dim: Of one head.
        peak: FLOP/s of the chip.
        share: Of it that the kernel reaches.
        half_head_dim: Head_dim that halves the rate.

    >>> half = dict(peak=1e15, share=0.5, half_head_dim=40.0)
    >>> round(float(fused_attention_s(8192, 8192, 4096, 128, **half)) * 1e6)
    1100
    """
    rate = share * head_dim / (head_dim + half_head_dim) * (128 + half_head_dim) / 128
    return np.asarray(2.0 * tokens * seq * width / (peak * rate))


def unfused_attention_s(
    tokens: Figures,
    seq: Figures,
    width: Figures,
    heads: Figures,
    *,
    peak: Figures,
    share: Figures,
    hbm: Figures,
    traffic: float,
) -> Vector:
    """Seconds of attention whose scores go through memory, forward.

    Args:
        tokens: Queries on the chip.
        seq: Keys that each sees; nothing is skipped.
        width: Heads on the chip times their dim.
        heads: Heads on the chip.
        peak: FLOP/s of the chip.
        share: Of it that batched products of this shape reach.
        hbm: Bytes/s of memory.
        traffic: Over four passes of 16 bits over the scores.

    >>> rates = dict(peak=1e15, share=0.5, hbm=3e12, traffic=1.0)
    >>> round(float(unfused_attention_s(8192, 8192, 4096, 32, **rates)) * 1e3, 1)
    7.9
    """
    scores = tokens * seq * heads
    products = 4.0 * tokens * seq * width / (peak * share)
    return np.asarray(products + traffic * 8 * scores / hbm)
