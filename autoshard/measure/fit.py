"""Figures of a link from measured times of collectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from autoshard.cost.network import Fabric, Group, Vector, time_s

TOLERANCE = 0.3
"""Beyond an error of about this much a time counts less: it was disturbed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured collective.

    Attributes:
        kind: As in `cost.network.KINDS`.
        group: Who took part.
        bytes_: Bytes of the larger side on one device.
        seconds: Of one run.
    """

    kind: str
    group: Group
    bytes_: float
    seconds: float


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """What the samples say of the innermost link.

    Attributes:
        bytes_per_s: That large messages reach.
        latency_s: Of a step.
        launch_s: Of a collective that moves nothing.
        half_bytes: A rank's piece at which the rate is half-way to that of large ones.
        switch_efficiency: Share of `bytes_per_s` at which the switch adds; 0 where it
            does not, or not faster than a ring.
        error: Median of the relative errors of the times.
    """

    bytes_per_s: float
    latency_s: float
    launch_s: float
    half_bytes: float
    switch_efficiency: float
    error: float


def fit_link(samples: Sequence[Sample], fabric: Fabric) -> LinkFigures:
    """Finds the figures that give the samples' times in the network model.

    Robust least squares of the logarithms of the ratios, so that small and large
    messages count alike.

    Args:
        samples: Of groups in one node or slice, of several sizes and members.
        fabric: The kind of the network; its figures are where the search starts.

    >>> true = Fabric("cpu", 8.0, 4e9, 2e-6, 4e9, 2e-6, 1.0, launch_s=1e-5)
    >>> samples = [
    ...     Sample(kind, group, 4.0**n, float(time_s(kind, 4.0**n, group, true)))
    ...     for kind in ("all_reduce", "permute")
    ...     for group in (Group(2.0), Group(8.0))
    ...     for n in range(7, 14)
    ... ]
    >>> found = fit_link(samples, true)
    >>> round(found.bytes_per_s / 1e9, 3), round(found.launch_s * 1e6, 2)
    (4.0, 10.0)
    """
    from scipy.optimize import least_squares  # slow to import

    samples = sorted(samples, key=lambda sample: sample.kind)
    kinds = [list(of_kind) for _, of_kind in groupby(samples, lambda s: s.kind)]
    columns = [(of[0].kind, _sizes(of), _together(of)) for of in kinds]
    times = np.log([s.seconds for s in samples])
    best = max(s.bytes_ / s.seconds for s in samples)
    shortest = min(s.seconds for s in samples)
    # Rate, step, launch, half-way piece, share of the switch: the bounds of each.
    low = np.array([best / 1e3, 1e-10, 1e-10, 1.0, 0.01])
    high = np.array([best * 1e2, 1.0, 1.0, 1e9, 1.0])
    count = 5 if fabric.kind == "gpu" else 4

    def made(x: np.ndarray) -> Fabric:
        rate, step, launch, half, *switch = np.exp(x)
        return dataclasses.replace(
            fabric,
            inner_bytes_per_s=rate,
            inner_efficiency=1.0,
            inner_latency_s=step,
            launch_s=launch,
            inner_half_bytes=half,
            switch_efficiency=switch[0] if switch else 0.0,
        )

    def errors(x: np.ndarray) -> np.ndarray:
        one = made(x)
        found = [time_s(kind, sizes, group, one) for kind, sizes, group in columns]
        return np.log(np.concatenate(found)) - times

    # The choice between ring and switch makes valleys; more than one start is needed.
    starts = [
        np.array([best, shortest / 4, shortest / 2, half, switch])
        for half in (1e3, 1e6)
        for switch in ((0.3, 0.8) if count == 5 else (0.5,))
    ]
    solved = min(
        (
            least_squares(
                errors,
                np.log(np.clip(start, low * 1.01, high * 0.99))[:count],
                bounds=(np.log(low)[:count], np.log(high)[:count]),
                loss="soft_l1",
                f_scale=TOLERANCE,
                xtol=1e-12,
                ftol=1e-12,
            )
            for start in starts
        ),
        key=lambda found: found.cost,
    )
    found = made(solved.x)
    return LinkFigures(
        bytes_per_s=float(found.inner_bytes_per_s),
        latency_s=float(found.inner_latency_s),
        launch_s=float(found.launch_s),
        half_bytes=float(found.inner_half_bytes),
        switch_efficiency=float(found.switch_efficiency),
        error=float(np.median(np.abs(np.expm1(errors(solved.x))))),
    )


def _sizes(samples: Sequence[Sample]) -> Vector:
    return np.array([sample.bytes_ for sample in samples])


def _together(samples: Sequence[Sample]) -> Group:
    names = [field.name for field in dataclasses.fields(Group)]
    return Group(**{n: np.array([getattr(s.group, n) for s in samples]) for n in names})
