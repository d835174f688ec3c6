"""Reading a program for a strategy: traced, seeded, its annotations accounted for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from autoshard.cost.work import Work, analyse
from autoshard.ir.annotations.names import Words
from autoshard.ir.annotations.paths import with_specs
from autoshard.ir.errors import AutoshardError, InfeasibleError
from autoshard.ir.few import Few, few_of
from autoshard.ir.fold import Folded
from autoshard.ir.remat import parts_of
from autoshard.ir.stretch import NotAlikeError, Stretch, fold_few, of_whole
from autoshard.ir.trace import Traced, trace
from autoshard.ir.train_step import TrainStep
from autoshard.plan.sharded import DimClasses
from autoshard.plan.strategy import Schedule, Strategy
from autoshard.propagate import find_classes
from autoshard.propagate.classes import Hint
from autoshard.search.alike import Names
from autoshard.search.annotations import check_annotations
from autoshard.search.folding import folded_by, left_of, marks


@dataclass(frozen=True, slots=True)
class Shallow:
    """A program without most copies of its blocks, which costs what the whole does.

    Attributes:
        traced: What is left of it.
        classes: Its dim classes, numbered as those of the whole.
        work: What its ops do, the copies that were left out included.
    """

    traced: Traced
    classes: DimClasses
    work: Work

    @staticmethod
    def of(traced: Traced, classes: DimClasses) -> Shallow:
        """Folds a program, if anything repeats in it."""
        return Shallow._of(*folded_by(traced, classes))

    @staticmethod
    def _of(folded: Folded, left: DimClasses) -> Shallow:
        return Shallow(folded.traced, left, analyse(folded.traced, left, folded))


@dataclass(frozen=True)
class Sketch:
    """A traced program with its classes, shared by all its candidates.

    Attributes:
        traced: The program; of a step with many copies of its blocks, that of few.
        classes: Its dim classes.
        remarks: What a user should know of the annotations.
        stretch: How the program of few copies goes on; None where all are traced.
    """

    traced: Traced
    classes: DimClasses
    remarks: tuple[str, ...]
    stretch: Stretch | None = None

    @staticmethod
    def of(
        fn: Any,
        args: tuple[Any, ...],
        strategy: Strategy,
        plain: Sketch | None = None,
        log: Callable[[str], None] = lambda _: None,
    ) -> Sketch:
        """Traces a program and finds its classes.

        Args:
            fn: A `TrainStep` with its schedule, or a plain function.
            args: Its arguments.
            strategy: What names and path maps are read with.
            plain: As in `classes_of`.
            log: Told why all copies of the blocks are traced, if they are many.

        Raises:
            InputError: An annotation did not reach the program, or cannot be
                honoured.
            RuleMissingError: A primitive has no rule, and no leave to be replicated.
        """
        # In a mix of policies copies differ by their number.
        if isinstance(fn, TrainStep) and len(args) == 1 and not parts_of(fn.remat):
            why = few = few_of(fn, args[0])
            if not isinstance(few, str):
                try:
                    return Sketch._of_few(few, fn.remat, strategy, plain)
                except (NotAlikeError, AutoshardError) as error:
                    # What is wrong with the step is said of the whole of it.
                    why = str(error)
            if why:
                log(f"every copy of the blocks is traced, which takes longer: {why}")
        return Sketch.of_whole(fn, args, strategy, plain)

    @staticmethod
    def of_whole(
        fn: Any, args: tuple[Any, ...], strategy: Strategy, plain: Sketch | None = None
    ) -> Sketch:
        """The same with all copies traced, however many they are."""
        traced = read(fn, args, strategy)
        remarks = check_annotations(traced, strategy)
        return Sketch(traced, classes_of(traced, strategy, plain), remarks)

    @staticmethod
    def _of_few(
        few: Few, remat: str, strategy: Strategy, plain: Sketch | None
    ) -> Sketch:
        step = few.step(remat)
        words = Words(frozenset(strategy.names), strategy.aliases)
        traced = read(step, (few.batch,), strategy)
        inputs, annotations = of_whole(few, traced, words, strategy.specs)
        traced = replace(traced, annotations=annotations)
        remarks = check_annotations(traced, strategy)
        classes = classes_of(traced, strategy, plain)
        if classes.fixed.conflicts:
            raise NotAlikeError("annotations of it are at odds with each other")
        stretch = fold_few(few, traced, marks(traced, classes), inputs)
        return Sketch(traced, classes, remarks, stretch)

    def named(self, plain: Sketch, strategy: Strategy) -> Sketch:
        """The same with the names that the plain step gives; see `classes_of`.

        Raises:
            NotAlikeError: With them, copies of few are not alike.
        """
        classes, stretch = classes_of(self.traced, strategy, plain), self.stretch
        if stretch is not None:
            known = marks(self.traced, classes)
            stretch = fold_few(stretch.few, self.traced, known, stretch.inputs)
        return Sketch(self.traced, classes, self.remarks, stretch)

    @cached_property
    def shallow(self) -> Shallow:
        """What is priced in place of the program."""
        if self.stretch is None:
            return Shallow.of(self.traced, self.classes)
        folded = self.stretch.folded
        return Shallow._of(folded, left_of(self.classes, folded))

    @cached_property
    def names(self) -> Names:
        """The names that its classes of dims have, each combination once."""
        return frozenset(self.shallow.classes.names.values())


def cuts_traced(schedule: Schedule) -> int:
    """With how many microbatches a step is traced.

    Stages have microbatches of their own, and what is offloaded is moved in each: such
    a step is traced with one, however many it has.
    """
    assert schedule.microbatches != "auto"
    if schedule.pipeline != "none" or schedule.offload:
        return 1
    return schedule.microbatches


def read(fn: Any, args: tuple[Any, ...], strategy: Strategy) -> Traced:
    """Traces a function and adds what the strategy fixes by path."""
    traced = trace(fn, args, aliases=strategy.aliases, logical=strategy.names)
    return with_specs(traced, strategy.specs)


def classes_of(
    traced: Traced, strategy: Strategy, plain: Sketch | None = None
) -> DimClasses:
    """The dim classes, with what the strategy says of axes and of missing rules.

    Args:
        traced: The program.
        strategy: See above.
        plain: The same step without microbatches and remat, whose names hold here.
    """
    return find_classes(
        traced,
        replicate=strategy.replicate,
        aliases=strategy.aliases,
        hints=_hints(traced, plain) if plain else None,
    )


def _hints(traced: Traced, plain: Sketch) -> dict[str, list[Hint]]:
    classes, program = plain.classes, plain.traced.program
    found: dict[str, list[Hint]] = {}
    for value, info in zip(program.inputs, plain.traced.inputs, strict=True):
        found[info.path] = [
            (names[0], classes.origins.get((cls, names[0]), "the strategy"))
            if (names := classes.names.get(cls))
            else None
            for cls in classes.of_value[value]
        ]
    if plain.stretch is not None:
        stands = plain.stretch.few.stands
        found.update((path, found[stand]) for path, stand in stands.items())
    params = {
        info.path.removeprefix("params/"): info
        for info in traced.inputs
        if info.state == "params"
    }
    for info in traced.inputs:
        # A moment of a parameter has the parameter's names.
        parts = info.path.split("/") if info.state == "optimizer" else []
        for k in range(1, len(parts)):
            param = params.get("/".join(parts[k:]))
            if param is not None and param.shape == info.shape:
                found[info.path] = found[param.path]
                break
    return found


def fixed_sizes(sketch: Sketch) -> dict[str, int]:
    """Sizes of canonical axes that manual regions of the program are written for.

    Raises:
        InfeasibleError: Two regions want the same axis in two sizes.
    """
    found: dict[str, int] = {}
    for axis, size in sketch.traced.mesh_sizes.items():
        (name,) = sketch.classes.canonical((axis,), "shard_map")
        if found.setdefault(name, size) != size:
            raise InfeasibleError(
                f"the program's shard_maps need mesh axis {name!r} in sizes "
                f"{found[name]} and {size} ({axis!r}); one mesh has one size per axis. "
                "Map one of them to another axis: [aliases] in the strategy."
            )
    return found
