"""Predictions held against the published runs of a directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoshard.cost.constants import Constants
from autoshard.cost.memory import too_large
from autoshard.cost.run import Runs
from autoshard.cost.step import predict
from autoshard.ir.errors import InputError
from autoshard.validation.fit import left_out
from autoshard.validation.memory import printed_bytes
from autoshard.validation.metrics import Errors, Fits, Group, groups
from autoshard.validation.rows import LeftOut, Row, read


@dataclass(frozen=True, slots=True)
class Prediction:
    """A row and what the cost model says of it.

    Attributes:
        row: As published.
        step_s: Predicted seconds per step.
        left_out_s: The same by constants fitted without the row's source, or None.
        memory_bytes: Predicted peak bytes on a device, as its software counts them.
        too_large: Whether it is predicted not to fit in memory.
    """

    row: Row
    step_s: float
    left_out_s: float | None
    memory_bytes: float
    too_large: bool


@dataclass(frozen=True, slots=True)
class Part:
    """Errors of the rows of one source, or on one chip.

    Attributes:
        name: Of the source or the chip.
        time: Errors of step times.
        left_out: The same by constants fitted without each row's source, or None.
        memory: Errors of peak memory.
        out: Rows that were left out; of a source only.
    """

    name: str
    time: Errors
    left_out: Errors | None
    memory: Errors
    out: int


@dataclass(frozen=True, slots=True)
class Validation:
    """What `validate` finds.

    Attributes:
        rows: Each row that was predicted.
        out: Each row that was left out, with its reason.
        clean: Errors of rows of the sort that the model is fitted to.
        doubtful: Errors of the other rows, which are marked in `Row.doubt`.
        sources: Clean rows, by source.
        chips: Clean rows, by chip.
        groups: Ranking within groups of plans for one model on one cluster.
        fits: Recognition of rows that ran out of memory.
    """

    rows: tuple[Prediction, ...]
    out: tuple[LeftOut, ...]
    clean: Part
    doubtful: Part
    sources: tuple[Part, ...]
    chips: tuple[Part, ...]
    groups: tuple[Group, ...]
    fits: Fits

    @property
    def kendall(self) -> float:
        """Mean rank correlation of the groups."""
        return float(np.mean([g.kendall for g in self.groups] or [np.nan]))

    @property
    def regret(self) -> float:
        """Mean regret of the groups."""
        return float(np.mean([g.regret for g in self.groups] or [np.nan]))

    @property
    def used(self) -> float:
        """Share of rows with a full configuration and a time that were predicted."""
        timed = sum(p.row.measured_s is not None for p in self.rows)
        missed = sum(o.whole for o in self.out)
        return timed / (timed + missed) if timed + missed else float("nan")

    def reasons(self) -> list[tuple[str, str, int]]:
        """`(source, reason, rows)` of what was left out, most rows first."""
        count = Counter((o.source, o.reason) for o in self.out)
        return [(s, r, n) for (s, r), n in count.most_common()]

    def assumed(self) -> list[tuple[str, str, int]]:
        """`(source, what, rows)` of what rows do not say, taken from elsewhere."""
        count = Counter((p.row.source, p.row.assumed) for p in self.rows)
        return [(s, a, n) for (s, a), n in count.most_common() if a]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values; NaN, where nothing was counted, as None."""
        parts = {
            "clean": self.clean,
            "doubtful": self.doubtful,
            "fits": self.fits,
        }
        return plain(
            {
                **{name: asdict(part) for name, part in parts.items()},
                "sources": [asdict(part) for part in self.sources],
                "chips": [asdict(part) for part in self.chips],
                "groups": [asdict(group) for group in self.groups],
                "kendall": self.kendall,
                "regret": self.regret,
                "used": self.used,
                "left_out": [
                    {"source": s, "reason": r, "rows": n} for s, r, n in self.reasons()
                ],
                "rows": [_row(p) for p in self.rows],
            }
        )


def _row(p: Prediction) -> dict[str, Any]:
    row = p.row
    return {
        "source": row.source,
        "line": row.line,
        "model": row.model,
        "chip": row.chip,
        "chips": row.run.layout.chips,
        "software": row.run.software.name,
        "doubt": row.doubt,
        "assumed": row.assumed,
        "measured_s": row.measured_s,
        "predicted_s": p.step_s,
        "left_out_s": p.left_out_s,
        "measured_bytes": row.memory_bytes,
        "predicted_bytes": p.memory_bytes,
        "out_of_memory": row.out_of_memory,
        "too_large": p.too_large,
    }


def plain(value: Any) -> Any:
    """A value as JSON has it: NaN, where nothing was counted, as None."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def validate(
    directory: Path | str,
    *,
    leave_one_out: bool = False,
    constants: Constants | None = None,
    log: Callable[[str], None] | None = None,
) -> Validation:
    """Predicts every usable row of a directory of published runs.

    Args:
        directory: Of CSV files with the columns of `benchmarks/published`.
        leave_one_out: Also predict each source by constants fitted without it; takes
            some minutes.
        constants: Of the cost model, by default those shipped.
        log: Told what is done.

    Returns:
        Errors by source and chip, ranking, and what was left out.

    Raises:
        InputError: There is no such directory, no table, or no usable row in it.

    >>> validate("no such directory")
    Traceback (most recent call last):
    autoshard.ir.errors.InputError: no such directory is not a directory; ...
    """
    tell = log or (lambda _: None)
    rows, out = read(directory)
    if not rows:
        first = f"; the first is left out since {out[0].reason}" if out else ""
        raise InputError(f"{directory} holds no row that can be predicted{first}")
    constants = constants or Constants.shipped()
    tell(f"{len(rows)} rows to predict, {len(out)} left out")
    runs = Runs.of([row.run for row in rows])
    step = predict(runs, constants).step_s
    peak = printed_bytes(rows, constants)
    large = too_large(runs, constants)
    without: list[float | None] = [None] * len(rows)
    if leave_one_out:
        fitted = [i for i, r in enumerate(rows) if r.clean and r.measured_s]
        sources = {rows[i].source for i in fitted}
        tell(f"fitting {len(sources)} times, each without one source")
        for i, s in zip(
            fitted, left_out([rows[i] for i in fitted], constants), strict=True
        ):
            without[i] = float(s)
    found = tuple(
        Prediction(r, float(s), w, float(b), bool(too))
        for r, s, w, b, too in zip(rows, step, without, peak, large, strict=True)
    )
    clean = [p for p in found if p.row.clean]
    timed = [p for p in clean if p.row.measured_s]
    marking = {p.row.source for p in found if p.row.out_of_memory}
    marked = [
        p
        for p in found
        if p.row.source in marking and (p.row.out_of_memory or p.row.measured_s)
    ]
    return Validation(
        rows=found,
        out=tuple(out),
        clean=_part("all clean rows", clean, 0),
        doubtful=_part("doubtful rows", [p for p in found if not p.row.clean], 0),
        sources=_parts(found, out, lambda p: p.row.source),
        chips=_parts(found, [], lambda p: p.row.chip),
        groups=tuple(
            groups(
                [p.row.group for p in timed],
                [p.step_s for p in timed],
                [p.row.measured_s or 0.0 for p in timed],
            )
        ),
        fits=Fits.of(
            [p.too_large for p in marked], [p.row.out_of_memory for p in marked]
        ),
    )


def _parts(
    found: Sequence[Prediction],
    out: Sequence[LeftOut],
    name_of: Callable[[Prediction], str],
) -> tuple[Part, ...]:
    names = {name_of(p) for p in found} | {o.source for o in out}
    lost = Counter(o.source for o in out)
    parts = []
    for name in sorted(names):
        own = [p for p in found if name_of(p) == name and p.row.clean]
        parts.append(_part(name, own, lost[name]))
    return tuple(parts)


def _part(name: str, own: Sequence[Prediction], out: int) -> Part:
    timed = [p for p in own if p.row.measured_s]
    measured = [p.row.measured_s or 0.0 for p in timed]
    fitted = [p for p in timed if p.left_out_s is not None]
    sized = [p for p in own if p.row.memory_bytes]
    return Part(
        name=name,
        time=Errors.of([p.step_s for p in timed], measured),
        left_out=Errors.of(
            [p.left_out_s or 0.0 for p in fitted],
            [p.row.measured_s or 0.0 for p in fitted],
        )
        if fitted
        else None,
        memory=Errors.of(
            [p.memory_bytes for p in sized], [p.row.memory_bytes or 0.0 for p in sized]
        ),
        out=out,
    )
