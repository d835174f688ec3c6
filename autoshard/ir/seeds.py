"""Seeds: what a user fixed in mesh axes, and the account of every annotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autoshard.ir.errors import InputError
from autoshard.ir.mesh import canonical_axis


@dataclass(frozen=True, slots=True)
class Seed:
    """Mesh axes a user fixed for one value.

    Attributes:
        value: Index in `Program.values`.
        dims: Per dim the mesh axes as the user named them, major first: `()` is closed
            (replicated), `None` open (propagation may shard it).
        kind: `"with_sharding_constraint"`, `"NamedSharding"`, `"nn.Partitioned"`, ...
        origin: Where it was written, in words: `"with_sharding_constraint at
            pkg/model.py:12 (fn)"`, `"NamedSharding of params/w"`.
    """

    value: int
    dims: tuple[tuple[str, ...] | None, ...]
    kind: str
    origin: str

    def canonical(self, aliases: Mapping[str, str]) -> Seed:
        """The same seed in canonical mesh axes.

        Two of the user's axes that stand for one (`replica` and `dp`, both `data`) are
        one where they shard the same dim.

        Args:
            aliases: The strategy's names of mesh axes.

        Raises:
            NameUnknownError: A name stands for no mesh axis.
            InputError: One axis shards two dims.

        >>> Seed(0, (("replica", "dp"), None, ()), "", "w").canonical({}).dims
        (('data',), None, ())
        """
        dims: list[tuple[str, ...] | None] = []
        taken: dict[str, str] = {}
        for dim in self.dims:
            if dim is None:
                dims.append(None)
                continue
            here: dict[str, str] = {}
            for name in dim:
                axis = canonical_axis(name, aliases, self.origin)
                if axis in taken:
                    both = {taken[axis], name, axis}
                    meant = f" ({' and '.join(sorted(both))})" if len(both) > 1 else ""
                    raise InputError(
                        f"{self.origin} asks for {written(self.dims)}: mesh axis "
                        f"{axis!r}{meant} shards two dims, and an axis can shard only "
                        "one dim of an array. Take it from one of them."
                    )
                here[axis] = name
            taken |= here
            dims.append(tuple(here))
        return replace(self, dims=tuple(dims))


def written(dims: tuple[tuple[str, ...] | None, ...]) -> str:
    """Mesh axes per dim as a user reads them.

    >>> written((("dp", "tp"), None, ()))
    '[dp+tp, *, -]'
    """
    words = ["*" if d is None else "+".join(d) or "-" for d in dims]
    return f"[{', '.join(words)}]"


@dataclass(frozen=True, slots=True)
class Count:
    """How many annotations of one kind there are.

    Attributes:
        kind: The kind, in the user's words: `"nn.with_logical_constraint"`.
        found: In the source objects: boxes, metadata entries, call sites met while
            tracing.
        reached: In the jaxpr: inputs and equations that carry one.
    """

    kind: str
    found: int
    reached: int


@dataclass(frozen=True, slots=True)
class AnnotationReport:
    """The account of a program's annotations.

    Attributes:
        counts: One entry per kind that was found, in alphabetical order.
        lost: One sentence per annotation that was found and did not reach the jaxpr:
            what it was, where it stands, how to keep it.
        unused: Call sites whose result nothing uses, so that no equation is left of
            them. They are counted neither as reached nor as lost.
        hints: Spellings that still work and what to write instead.

    >>> report = AnnotationReport(counts=(Count("annotate", 2, 2),))
    >>> print(report)
    annotate: 2 found, 2 reached
    >>> report.check()
    """

    counts: tuple[Count, ...] = ()
    lost: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

    @property
    def found(self) -> dict[str, int]:
        """Annotations in the source objects, by kind."""
        return {c.kind: c.found for c in self.counts}

    @property
    def reached(self) -> dict[str, int]:
        """Annotations in the jaxpr, by kind."""
        return {c.kind: c.reached for c in self.counts}

    def check(self) -> None:
        """Raises when an annotation was lost on its way to the jaxpr.

        Raises:
            InputError: Names each lost annotation, where it stands and how to keep it.
        """
        if self.lost:
            listed = "".join(f"\n  - {one}" for one in self.lost)
            raise InputError(
                f"{len(self.lost)} annotations of the program did not reach its "
                f"jaxpr, so nothing would honour them:{listed}"
            )

    def __str__(self) -> str:
        lines = [f"{c.kind}: {c.found} found, {c.reached} reached" for c in self.counts]
        for title, listed in (
            ("lost", self.lost),
            ("unused", self.unused),
            ("hint", self.hints),
        ):
            lines += [f"{title}: {one}" for one in listed]
        return "\n".join(lines) if lines else "no annotations"
