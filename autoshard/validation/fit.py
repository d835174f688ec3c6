"""Fitting the constants of the cost model to published step times and peak memory.

Robust least squares on logarithms of predicted over measured, each constant held to its
prior (Gelman et al. 2013, Bayesian Data Analysis, section 14.8: a normal prior is a row
more). A constant that no row depends on stays where its prior puts it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoshard.cost.constants import Constants, table
from autoshard.cost.run import Runs
from autoshard.cost.step import predict
from autoshard.validation.memory import printed_bytes
from autoshard.validation.rows import Row

SCATTER = 0.1
"""Logarithmic error that counts as one standard deviation: what remains between runs of
one configuration, and what a model of so few constants cannot know."""

MEMORY_SCATTER = 0.05
"""The same of memory, which repeats from run to run: what allocators and logs round."""

PRIOR_WEIGHT = 1.2
"""Weight of the priors' rows. Between 1 and 2.5 it changes little: heavier priors make
sources left out a little better, and the fitted ones a little worse."""


def fit(rows: Sequence[Row], start: Constants | None = None) -> Constants:
    """The constants that published step times and the priors together make likely.

    Args:
        rows: With measured times.
        start: Where to begin, by default at the priors.

    Returns:
        Values for every constant.
    """
    from scipy.optimize import least_squares  # slow to import

    names = [c.name for c in table()]
    prior = np.log([c.prior for c in table()])
    spread = np.array([c.spread for c in table()])
    runs = Runs.of([row.run for row in rows])
    measured = np.log([row.measured_s or np.nan for row in rows])

    def residuals(x: np.ndarray) -> np.ndarray:
        constants = Constants(dict(zip(names, np.exp(x), strict=True)))
        error = (np.log(predict(runs, constants).step_s) - measured) / SCATTER
        # Huber's loss as a smooth function: outliers pull with constant force.
        soft = np.sign(error) * np.sqrt(2 * (np.sqrt(1 + error**2) - 1))
        return np.concatenate([soft, (x - prior) / spread * PRIOR_WEIGHT])

    begin = prior
    if start is not None:
        begin = np.log([start[name] for name in names])
    found = least_squares(residuals, begin, max_nfev=25).x
    return Constants(dict(zip(names, np.exp(found).tolist(), strict=True)))


def left_out(rows: Sequence[Row], start: Constants) -> np.ndarray:
    """Predicted seconds of each row by constants fitted without its source.

    Args:
        rows: With measured times.
        start: Constants near which each fit ends.

    Returns:
        float64[row].
    """
    seconds = np.zeros(len(rows))
    for source in sorted({row.source for row in rows}):
        mine = np.array([row.source == source for row in rows])
        others = [row for row in rows if row.source != source]
        constants = fit(others, start) if others else Constants.priors()
        own = Runs.of([row.run for row in rows if row.source == source])
        seconds[mine] = predict(own, constants).step_s
    return seconds


def fit_memory(rows: Sequence[Row], start: Constants | None = None) -> Constants:
    """The constants that published peak memory and their priors make likely.

    Args:
        rows: With measured memory. Each source counts as much as the square root of
            its rows, so that the largest does not decide alone.
        start: What other constants are, and where to begin; by default the priors.

    Returns:
        Values for every constant; those of other things than memory as in `start`.
    """
    from scipy.optimize import least_squares

    start = start or Constants.priors()
    mine = [c for c in table() if c.name.startswith("memory.")]
    names = [c.name for c in mine]
    prior = np.log([c.prior for c in mine])
    spread = np.array([c.spread for c in mine])
    measured = np.log([row.memory_bytes or np.nan for row in rows])
    sources = [row.source for row in rows]
    weight = np.array([sources.count(source) ** -0.25 for source in sources])

    def residuals(x: np.ndarray) -> np.ndarray:
        values = dict(zip(names, np.exp(x).tolist(), strict=True))
        constants = Constants({**start.values, **values})
        error = (np.log(printed_bytes(rows, constants)) - measured) / MEMORY_SCATTER
        soft = np.sign(error) * np.sqrt(2 * (np.sqrt(1 + error**2) - 1))
        return np.concatenate([weight * soft, (x - prior) / spread * PRIOR_WEIGHT])

    begin = np.log([start[name] for name in names])
    found = least_squares(residuals, begin, max_nfev=25).x
    values = dict(zip(names, np.exp(found).tolist(), strict=True))
    return Constants({**start.values, **values})
