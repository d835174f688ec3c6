"""What comes of holding planned collectives against emitted ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autoshard.plan.schema import Collective
from autoshard.verify.hlo import Emitted

AS_PLANNED = "as planned"
SLICED_SUM = "reduce-scatter written as all-reduce and slice"
SCATTERED = "all-reduce of which a slice is kept, written as reduce-scatter"
PADDED_SUM = "all-gather written as all-reduce of padded parts"
OTHER_LOOPS = "as planned, in other loops or outside of them"
MOVED_LOOP = "moved into or out of a loop"
CONVERTS = "as planned, and converted by the sum itself"
IN_STEPS = "all-reduce over several axes written as one after another"
FORMS = (
    AS_PLANNED,
    SLICED_SUM,
    SCATTERED,
    PADDED_SUM,
    OTHER_LOOPS,
    MOVED_LOOP,
    CONVERTS,
    IN_STEPS,
)
"""Ways in which the same data movement is written.

The partitioner sums each sharded dim of a reduction on its own; GPU and TPU pipelines
fold the steps into one, and turn an all-reduce with a slice into a reduce-scatter.
"""

AT_ONCE = "partial sums are summed over all axes at once"
SCATTERED_FIRST = "summed over some axes and scattered, then summed over the others"
KEPT_WHOLE = "summed everywhere where each device needs a slice"
CUT = "rows change devices where a sharded dim is cut or extended"
MERGED = "moved once and kept where the plan moves it again"
HOISTED = "run once before a loop where the plan runs it in every turn"
SUNK = "summed once after a loop that adds up what the plan sums in every turn"
ADDED = "what is added up is summed once, where the plan sums each and adds"
CANCELLED = "gathered from a slice of a sum, which is kept whole instead"
RECOMPUTED = "moved again where the backward pass recomputes"
REPEATED = "the same collective is emitted more than once"
INDICES = "indices of a lookup are made in parts and gathered for it"
DEVICE_ORDER = "blocks change their device, no dim its axes"
PADDED = "a dim that does not divide is padded"
OTHER_DTYPE = "moved in another element type"
OTHER_AXES = "the same op moves as much over other axes"
OTHER_BYTES = "the same op moves another operand, or another part"
OTHER_KIND = "the same op is carried out by another collective"
UNNAMED_GROUPS = "devices form groups that no product of mesh axes is"
UNEXPLAINED = "unexplained"
CAUSES = (
    AT_ONCE,
    SCATTERED_FIRST,
    KEPT_WHOLE,
    CUT,
    MERGED,
    HOISTED,
    SUNK,
    ADDED,
    CANCELLED,
    RECOMPUTED,
    REPEATED,
    INDICES,
    DEVICE_ORDER,
    PADDED,
    OTHER_DTYPE,
    OTHER_AXES,
    OTHER_BYTES,
    OTHER_KIND,
    UNNAMED_GROUPS,
    UNEXPLAINED,
)
"""Why a planned and an emitted collective differ."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """A planned collective and the emitted one that carries it out.

    Attributes:
        form: One of `FORMS`.
        planned: What was planned.
        emitted: What carries it out; several in the form of steps.
        bytes_: Bytes of all runs that agree.
    """

    form: str
    planned: Collective
    emitted: tuple[Emitted, ...]
    bytes_: int


@dataclass(frozen=True, slots=True)
class Difference:
    """What is on one side only, or on both in different shape.

    Attributes:
        cause: One of `CAUSES`.
        planned: Planned and not emitted so.
        emitted: Emitted and not planned so.
        planned_bytes: Bytes of all planned runs.
        emitted_bytes: Bytes of all emitted runs.
    """

    cause: str
    planned: tuple[Collective, ...]
    emitted: tuple[Emitted, ...]
    planned_bytes: int
    emitted_bytes: int

    def __str__(self) -> str:
        sides = [
            *(f"planned {_show(c)} at {c.address}" for c in self.planned),
            *(
                f"emitted {_show(e)} as {e.name} for {e.op_name}"
                f"{f', used by {e.used_by}' if e.used_by else ''}"
                for e in self.emitted
            ),
        ]
        return f"{self.cause}: {'; '.join(sides)}"


def _show(c: Collective | Emitted) -> str:
    axes = "+".join(c.axes)
    return f"{c.kind} over {axes} of {c.bytes_} B x {c.count} ({c.source or 'no line'})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """All agreements and differences of one program.

    Attributes:
        planned_bytes: Bytes of all planned runs.
        emitted_bytes: Bytes of all emitted runs; of sums in steps, those of one step.
        matched_bytes: Bytes that agree.
        steps_bytes: Bytes of the other steps of sums in steps.
        agreements: What agrees.
        differences: What does not.
    """

    planned_bytes: int
    emitted_bytes: int
    matched_bytes: int
    steps_bytes: int
    agreements: tuple[Agreement, ...]
    differences: tuple[Difference, ...]

    @property
    def fraction(self) -> float:
        """Bytes that agree, of the larger side; 1 where nothing moves."""
        most = max(self.planned_bytes, self.emitted_bytes)
        return self.matched_bytes / most if most else 1.0

    @property
    def unexplained(self) -> tuple[Difference, ...]:
        """Differences whose cause is not known."""
        return tuple(d for d in self.differences if d.cause == UNEXPLAINED)

    def by_form(self) -> dict[str, int]:
        """Bytes that agree in each form that occurs."""
        return _sums((a.form, a.bytes_) for a in self.agreements)

    def by_cause(self) -> dict[str, int]:
        """Bytes that differ, of the larger side, for each cause that occurs."""
        return _sums(
            (d.cause, max(d.planned_bytes, d.emitted_bytes)) for d in self.differences
        )


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, value in pairs:
        found[key] = found.get(key, 0) + value
    return dict(sorted(found.items()))
