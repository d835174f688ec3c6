"""The plan that is found against each published one: never predicted slower.

Part one, by tracing, is the search that users call. A row's model becomes a train step
with AdamW, layers in a loop and, where the row's software has it, attention as one
kernel; the published layout is the same program with its degrees, state sharding,
remat and microbatches fixed and with what the row does not say left to the search. Both
are priced alike, as XLA would run them, by the search; ratios are of the plans, whose
microbatches are traced, which moves near ties (`slower_when_traced`). A published
layout that is predicted not to fit in memory is counted apart: it is never taken as
slower or faster.

Part two, by numbers, is for rows that plans do not express (its reasons are listed):
every layout of a grid, and the published one, under the row's own software. It shows
what the cost model prefers, not what users get.

Every row is in results/experts.csv, with one line on what is otherwise and why. All
rows take hours; `--only SOURCE` writes a record of its own, results/experts_SOURCE.

Bar: by tracing, no published layout that fits is predicted faster than what is found.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _record

if TYPE_CHECKING:
    from _expert_grid import Best
    from _expert_plans import Compared

    from autoshard.validation.rows import Row

DATA = _record.ROOT / "benchmarks" / "published"
SLACK = 1e-9
"""Two sums of the same terms may differ so much, relatively."""

SHOWN_TERMS = 3
GIB = 2**30


def main() -> int:
    """Compares all rows; 1 when a published layout is faster."""
    given, start = options(), _record.begin()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from autoshard.validation import read

    rows, unread = read(DATA)
    rows = [r for r in rows if given.only in r.source][: given.limit]
    unread = [o for o in unread if given.only in o.source]
    out = Counter((o.source, f"not read: {o.reason}") for o in unread)
    begin = time.monotonic()
    traced, numbered = by_tracing(rows, out)
    middle = time.monotonic()
    grid = by_numbers(numbered)
    ends = (middle - begin, time.monotonic() - middle)
    tracing, numbers = plans_figures(traced), grid_figures(grid)
    shown("by tracing", tracing)
    shown("by numbers (another search, of what plans do not express)", numbers)
    _record.table(
        ("traced over by numbers", "rows", "p10", "median", "p90"),
        [
            (s, f["rows"], f"{f['p10']:.2f}", f"{f['median']:.2f}", f"{f['p90']:.2f}")
            for s, f in tracing["traced_over_by_numbers"].items()
        ],
    )
    passed = not tracing["violations"]
    name = f"experts_{given.only}" if given.only else "experts"
    stored(given.into / f"{name}.csv", traced, grid)
    _record.write(
        given.into,
        name,
        what=(__doc__ or "").strip(),
        command="python benchmarks/experts.py"
        + (f" --only {given.only}" if given.only else ""),
        figures={
            "only": given.only,
            "limit": given.limit,
            "by_tracing": {"took_s": round(ends[0]), **tracing},
            "by_numbers": {"took_s": round(ends[1]), **numbers},
            "left_out": [
                {"source": source, "reason": reason, "rows": count}
                for (source, reason), count in out.most_common()
            ],
        },
        passed=passed,
        start=start,
    )
    return int(not passed)


def options() -> argparse.Namespace:
    """The command line."""
    parser = _record.parser(__doc__, "rows of one table")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows")
    return parser.parse_args()


def by_tracing(
    rows: Sequence[Row], out: Counter[tuple[str, str]]
) -> tuple[list[Compared], list[Row]]:
    """Compares rows by the search that users call.

    Args:
        rows: Published runs.
        out: Counts what is left out, by source and reason.

    Returns:
        What was compared, and rows that plans do not express.
    """
    from _expert_plans import Compared, compare

    from autoshard.cost.run import Runs
    from autoshard.cost.software import SOFTWARE
    from autoshard.cost.step import predict

    ran = [row for row in rows if not row.out_of_memory]
    for row in rows:
        if row.out_of_memory:
            out[row.source, "ran out of memory"] += 1
    # What is traced runs on XLA, whatever ran the published layout.
    runs = [replace(row.run, software=SOFTWARE["xla"]) for row in ran]
    numbers_s = predict(Runs.of(runs)).step_s.tolist() if runs else []
    found: list[Compared] = []
    others: list[Row] = []
    for each in compare(ran, numbers_s):
        if isinstance(each, Compared):
            found.append(each)
            print(line(each.row, *_told(each)), flush=True)
        else:
            row, reason = each
            out[row.source, f"not by tracing: {reason}"] += 1
            others.append(row)
    return found, others


def by_numbers(rows: Sequence[Row]) -> list[Best]:
    """Compares rows with the grid of layouts."""
    from _expert_grid import compare

    found = []
    for best in compare(rows):
        found.append(best)
        print(line(best.row, *_told_numbers(best)), flush=True)
    return found


def line(row: Row, ratio: float | None, why: str) -> str:
    """One line on a row."""
    shown_ratio = "-" if ratio is None else f"{ratio:.3f}"
    return (
        f"{row.source}:{row.line} {row.model} {row.run.layout.chips} {row.chip}: "
        + (f"{shown_ratio} {why}")
    )


# -- by tracing ------------------------------------------------------------------------


def outcome(each: Compared) -> str:
    """What became of a row, in one of six phrases."""
    if each.published is None:
        return "published does not divide"
    if each.found is None:
        return "nothing fits"
    if not each.fits:
        return "published does not fit"
    if each.found.searched_s > each.published.searched_s * (1 + SLACK):
        return "slower than published"
    if each.found.degrees == each.published.degrees:
        return "never slower, same degrees"
    return "never slower, other degrees"


def _told(each: Compared) -> tuple[float | None, str]:
    """Ratio of the steps, and why they differ."""
    said = outcome(each)
    published, found = each.published, each.found
    if published is None or found is None:
        return None, f"{said}: {' '.join(each.why.split())[:160]}"
    before = {**published.degrees, **published.choices}
    after = {**found.degrees, **found.choices}
    apart = changes(before, after)
    if not each.fits:
        needs = f"needs {published.peak_bytes / GIB:.0f} GiB"
        return None, f"{said}, {needs}: {apart or 'the same'}"
    terms = {n: found.terms_s[n] - published.terms_s[n] for n in found.terms_s}
    return found.step_s / published.step_s, reason(
        apart, terms, published.peak_bytes, found.peak_bytes
    )


def changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What is otherwise, as "tensor 8 -> 4, remat full -> none"."""
    return ", ".join(
        f"{name} {value} -> {after[name]}"
        for name, value in before.items()
        if value != after[name]
    )


def reason(
    apart: str, terms_s: dict[str, float], before_bytes: float, after_bytes: float
) -> str:
    """Why something else was found: which terms are less, which more, and memory."""
    if not apart:
        return "the same"
    largest = sorted(terms_s.items(), key=lambda term: -abs(term[1]))[:SHOWN_TERMS]
    parts = [f"{name} {s * 1e3:+.4g} ms" for name, s in largest if abs(s) > 1e-5]
    parts.append(f"memory {before_bytes / GIB:.1f} -> {after_bytes / GIB:.1f} GiB")
    return f"{apart}: {', '.join(parts)}"


def plans_figures(compared: Sequence[Compared]) -> dict[str, Any]:
    """Figures of the rows compared by tracing."""
    outcomes = [outcome(each) for each in compared]
    both = [e for e, o in zip(compared, outcomes, strict=True) if "slower" in o]
    ratios = [r for each in both if (r := _told(each)[0]) is not None]
    same = sum(o == "never slower, same degrees" for o in outcomes)
    diagnosed: dict[str, list[float]] = defaultdict(list)
    for each in compared:
        if each.published is not None:
            ratio = each.published.step_s / each.numbers_s
            diagnosed[each.row.source].append(ratio)
    return {
        **counted(outcomes, ratios, same),
        "violations": [
            line(e.row, *_told(e))
            for e, said in zip(compared, outcomes, strict=True)
            if said == "slower than published"
        ],
        "slower_when_traced": [
            line(e.row, *_told(e))
            for e in both
            if e.found and e.published and e.found.step_s > e.published.step_s
        ],
        "traced_over_by_numbers": {
            source: spread(values) for source, values in sorted(diagnosed.items())
        },
    }


def counted(
    outcomes: Sequence[str], ratios: Sequence[float], same: int
) -> dict[str, Any]:
    """Counts that both parts have."""
    return {
        "outcomes": dict(Counter(outcomes).most_common()),
        "compared": len(ratios),
        "never_slower": sum(said.startswith("never slower") for said in outcomes),
        "same_degrees": same,
        "same_degrees_share": same / len(ratios) if ratios else None,
        "median_ratio": statistics.median(ratios) if ratios else None,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Count, median and 10th and 90th percentile."""
    import numpy as np

    p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
    return {"rows": len(values), "p10": p10, "median": median, "p90": p90}


# -- by numbers ------------------------------------------------------------------------


def numbers_outcome(best: Best) -> str:
    """What became of a row, in one of the phrases of `outcome`, or not in the grid."""
    if best.found is None:
        return "nothing fits"
    if not best.fits:
        return "published does not fit"
    if best.found_s > best.published_s * (1 + SLACK):
        return "slower than published"
    if not best.inside:
        return "never slower, published is not in the grid"
    if _degrees(best.found) == _degrees(best.row.run.layout):
        return "never slower, same degrees"
    return "never slower, other degrees"


def _degrees(layout: Any) -> dict[str, Any]:
    names = ("data", "tensor", "context", "stage", "expert")
    return {name: getattr(layout, name) for name in names}


def _numbers(layout: Any) -> dict[str, Any]:
    """A layout in words; what is recomputed by its largest share."""
    from dataclasses import astuple

    again = astuple(layout.recompute)
    kept = "none" if not any(again) else "all" if again[0] == 1 else "some"
    names = ("zero", "shard", "sequence", "virtual", "schedule", "microbatches")
    return {
        **_degrees(layout),
        **{name: getattr(layout, name) for name in names},
        "recomputed": kept,
    }


def _told_numbers(best: Best) -> tuple[float | None, str]:
    said = numbers_outcome(best)
    if best.found is None:
        return None, said
    apart = changes(_numbers(best.row.run.layout), _numbers(best.found))
    if not best.fits:
        needs = f"needs {best.bytes_[0] / GIB:.0f} GiB"
        return None, f"{said}, {needs}: {apart or 'the same'}"
    return best.found_s / best.published_s, reason(apart, best.terms_s, *best.bytes_)


def grid_figures(found: Sequence[Best]) -> dict[str, Any]:
    """Figures of the rows compared by numbers."""
    outcomes = [numbers_outcome(best) for best in found]
    told = [_told_numbers(best) for best in found]
    ratios = [ratio for ratio, _ in told if ratio is not None]
    same = sum(o == "never slower, same degrees" for o in outcomes)
    return {
        **counted(outcomes, ratios, same),
        "largest_grid": max((best.layouts for best in found), default=0),
    }


def stored(path: Path, traced: Sequence[Compared], grid: Sequence[Best]) -> None:
    """Writes a table with a line for each row compared."""
    table: list[tuple[Any, ...]] = [
        ("part", "source", "line", "published_s", "found_s", "ratio", "outcome", "why")
    ]

    def short(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds:.5g}"

    for each in traced:
        ratio, why = _told(each)
        steps = [p and p.step_s for p in (each.published, each.found)]
        name = ("tracing", each.row.source, each.row.line)
        table.append((*name, *map(short, (*steps, ratio)), outcome(each), why))
    for best in grid:
        ratio, why = _told_numbers(best)
        steps = [best.published_s, best.found_s if best.found else None]
        name = ("numbers", best.row.source, best.row.line)
        said = numbers_outcome(best)
        table.append((*name, *map(short, (*steps, ratio)), said, why))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table)


def shown(title: str, figures: dict[str, Any]) -> None:
    """Prints the counts of a part."""
    print()
    rows = [(name, count) for name, count in figures["outcomes"].items()]
    if figures["median_ratio"] is not None:
        rows.append(
            ("median of found over published", f"{figures['median_ratio']:.3f}")
        )
        rows.append(("share of same degrees", f"{figures['same_degrees_share']:.3f}"))
    _record.table((title, "rows"), rows)


if __name__ == "__main__":
    sys.exit(main())
