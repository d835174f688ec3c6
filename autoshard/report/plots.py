"""Figures of a plan and of a run, drawn with matplotlib.

matplotlib is loaded when the first figure is drawn, never by importing this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoshard.ir.errors import InputError, OutputError
from autoshard.plan.schema import Plan
from autoshard.report.explain import explain
from autoshard.report.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_memory(plan: Plan, ax: Axes | None = None) -> Axes:
    """Draws what the peak memory of one device holds, in GiB, beside its capacity.

    Args:
        plan: Any plan.
        ax: Where to draw; a new figure when None.

    Returns:
        The axes drawn on: one bar a part, and a line at the capacity.
    """
    memory = explain(plan)["predicted"]["memory"]
    rows = memory["parts"]
    on = _axes(ax)
    parts = [row["part"] for row in rows] + ["peak"]
    amounts = [row["bytes_"] for row in rows] + [memory["total"]]
    _bars(on, parts, [a / 2**30 for a in amounts], [bytes_text(a) for a in amounts])
    capacity = memory["capacity"]
    label = f"capacity, {bytes_text(capacity)}"
    on.axvline(capacity / 2**30, color="black", linestyle="--", label=label)
    on.set_xlabel("GiB per device")
    on.set_title("Predicted memory at the peak of a step")
    on.legend()
    return on


def plot_time(plan: Plan, ax: Axes | None = None) -> Axes:
    """Draws where the predicted time of a step goes, in milliseconds.

    Args:
        plan: Any plan.
        ax: Where to draw; a new figure when None.

    Returns:
        The axes drawn on: one bar a part, and one for the step.
    """
    predicted = explain(plan)["predicted"]
    on = _axes(ax)
    parts = [row["part"] for row in predicted["time"]] + ["step"]
    times_s = [row["time_s"] for row in predicted["time"]] + [predicted["step_s"]]
    _bars(on, parts, [1e3 * t for t in times_s], [seconds_text(t) for t in times_s])
    on.set_xlabel("ms")
    on.set_title("Predicted time of a step")
    return on


def plot_losses(
    losses: Sequence[float] | Mapping[str, Sequence[float]], ax: Axes | None = None
) -> Axes:
    """Draws the loss (nats per token) over steps.

    Args:
        losses: The loss of each step from 1 on, of one run or of several by name.
        ax: Where to draw; a new figure when None.

    Returns:
        The axes drawn on: one line a run.

    Raises:
        InputError: A run has no losses.
    """
    runs = losses if isinstance(losses, Mapping) else {"": losses}
    for name, values in runs.items():
        if not len(values):
            where = f" of run {name!r}" if name else ""
            raise InputError(
                f"plot_losses got an empty list of losses{where}; give the losses of "
                "at least one step, as in `plot_losses(result.losses)`."
            )
    on = _axes(ax)
    for name, values in runs.items():
        on.plot(range(1, len(values) + 1), list(values), label=name or None)
    on.set_xlabel("step")
    on.set_ylabel("loss (nats per token)")
    if any(runs):
        on.legend()
    return on


def save_scatter(
    path: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Draws predicted against measured seconds on logarithmic axes, and saves it.

    Args:
        path: Of the image; its ending names the format.
        series: Pairs of measured and predicted seconds, by name; empty ones are left
            out.

    Raises:
        InputError: The format that the ending names is not known.
        OutputError: The image cannot be written.
    """
    import matplotlib.pyplot as plt

    on = _axes(None)
    points = [pair for pairs in series.values() for pair in pairs]
    for name, pairs in series.items():
        if pairs:
            measured, predicted = zip(*pairs, strict=True)
            on.scatter(measured, predicted, s=8, label=name)
    if points:
        ends = [min(min(p) for p in points), max(max(p) for p in points)]
        on.plot(ends, ends, color="black", linewidth=0.8)
        on.legend(fontsize="x-small")
    on.set_xscale("log")
    on.set_yscale("log")
    on.set_xlabel("measured seconds per step")
    on.set_ylabel("predicted")
    on.set_title("Published runs")
    figure = on.figure
    try:
        figure.savefig(path, dpi=150)  # pyright: ignore[reportAttributeAccessIssue]
    except OSError as e:
        raise OutputError(f"the image {path} cannot be written: {e}") from e
    except ValueError as e:
        raise InputError(f"the image {path} cannot be written: {e}") from e
    finally:
        plt.close(figure)  # pyright: ignore[reportArgumentType]


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _bars(ax: Any, parts: list[str], widths: list[float], labels: list[str]) -> None:
    bars = ax.barh(parts, widths)
    bars[-1].set_color("gray")
    ax.bar_label(bars, labels, padding=3)
    ax.margins(x=0.15)
    ax.invert_yaxis()
