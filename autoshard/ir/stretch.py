"""What a step of few copies of a block says of the step with all of them.

`ir.few` leaves copies out of a train step before it is traced. Here the rest of them is
folded as any program is, each kept copy amid the others counted with those that were
left out; `ir.addresses` spells out the addresses of their ops.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from autoshard.ir.annotations.names import Words
from autoshard.ir.annotations.paths import KIND, SpecMap, seeds_of_paths
from autoshard.ir.families import Family, Survey
from autoshard.ir.few import Few, Stack, param_in
from autoshard.ir.fold import Folded, fold_by
from autoshard.ir.seeds import AnnotationReport
from autoshard.ir.ties import Chain
from autoshard.ir.trace import InputInfo, Traced, described, with_state

_ENDS = 2
"""Copies at each end of a chain that may be unlike those amid them."""


class NotAlikeError(Exception):
    """Copies of a step cannot stand for those that were left out; says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A chain of copies, and those that it has in the whole program.

    Attributes:
        chain: Of the program of few copies.
        stack: Which copies there are.
        own: Number of the copy at each place of the chain.
        whole: Numbers of all copies, in the order in which the whole chain has them.
    """

    chain: Chain
    stack: Stack
    own: tuple[int, ...]
    whole: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Stretch:
    """A program of few copies, and how it goes on.

    Attributes:
        folded: What is left of it, with the copies that were left out counted.
        lines: Its chains of copies.
        few: What it was traced from.
        inputs: The flat arguments of the whole step.
    """

    folded: Folded
    lines: tuple[Line, ...]
    few: Few
    inputs: tuple[InputInfo, ...]

    @cached_property
    def paths(self) -> dict[int, dict[str, str]]:
        """Per copy that was left out, its parameters by those that stand for them."""
        found: dict[int, dict[str, str]] = defaultdict(dict)
        for stack in self.few.stacks:
            for row in stack.paths:
                for k in stack.gone:
                    found[k][row[stack.stand]] = row[k]
        return dict(found)


def fold_few(
    few: Few, traced: Traced, marks: Sequence[int], inputs: tuple[InputInfo, ...]
) -> Stretch:
    """Folds a program of few copies, and counts those that it was traced without.

    Args:
        few: What it was traced from.
        traced: The program.
        marks: As in `ir.fold.fold`.
        inputs: The flat arguments of the whole step.

    Raises:
        NotAlikeError: What is left does not say what the others do.
    """
    survey = Survey(traced, np.asarray(marks, dtype=np.int64))
    order = {info.path: k for k, info in enumerate(inputs)}
    counted: list[Family] = []
    lines: list[Line] = []
    at = {
        path: (stack, k)
        for stack in few.stacks
        for row in stack.paths
        for k, path in enumerate(row)
    }
    owners: dict[int, tuple[Stack, int]] = {}
    for v, info in zip(traced.program.inputs, traced.inputs, strict=True):
        owner = param_in(info.path, at)
        if owner is not None:
            owners[v] = at[owner]
    params = {
        v
        for v, info in zip(traced.program.inputs, traced.inputs, strict=True)
        if info.state == "params"
    }
    roots = survey.roots
    for plan in survey.families():
        mine = np.isin(roots, plan.chains)
        labels: dict[int, set[tuple[Stack, int]]] = defaultdict(set)
        for v, owner in owners.items():
            cls = int(survey.classes[v])
            # Other chains may count from one layer on: only parameters say which.
            if v in params and cls >= 0 and mine[cls]:
                labels[int(survey.labels[v])].add(owner)
        stacks = {stack for found in labels.values() for stack, _ in found}
        many = plan.gone | {plan.stand}
        if not stacks:
            raise NotAlikeError("something repeats beside the blocks of the loss")
        if len(stacks) > 1 or any(len(found) > 1 for found in labels.values()):
            raise NotAlikeError("copies of a block take turns with something else")
        (stack,) = stacks
        number = {label: next(iter(found))[1] for label, found in labels.items()}
        if not many <= number.keys():
            raise NotAlikeError("a copy of the block has no parameter")
        rows = [survey.chains[c].labels.tolist() for c in plan.chains]
        ends = {k for row in rows for k in (*row[:_ENDS], *row[-_ENDS:])}
        _check_amid(
            stack,
            {number[label] for label in many},
            {number[label] for label in ends if label in number},
        )
        _check_made(survey, plan)
        counted.append(replace(plan, count=plan.count + len(stack.gone)))
        for c in plan.chains:
            line = _line(survey.chains[c], stack, number, order)
            _check_numbers(traced, line, at)
            lines.append(line)
    folded = {c for plan in counted for c in plan.chains}
    for v, (stack, k) in owners.items():
        cls = int(survey.classes[v])
        amid = stack.gone[0] - 1 <= k <= stack.gone[-1] + 1
        if amid and (cls < 0 or int(roots[cls]) not in folded):
            raise NotAlikeError(
                "not all that is done with the parameters of the blocks is alike"
            )
    return Stretch(fold_by(survey, counted), tuple(lines), few, inputs)


def of_whole(
    few: Few, traced: Traced, words: Words, specs: SpecMap
) -> tuple[tuple[InputInfo, ...], AnnotationReport]:
    """The flat arguments of the whole step, and the account of all annotations.

    Args:
        few: What was left out.
        traced: The program of few copies.
        words: Which names are mesh axes.
        specs: The path map that it was read with.

    Raises:
        NotAlikeError: Leaves that were left out have other annotations than those that
            stand for them.
        InputError: An annotation does not fit what it annotates.
    """
    inputs, more = _whole(few, words, specs)
    report = traced.annotations
    counts = tuple(
        replace(c, found=c.found + more[c.kind], reached=c.reached + more[c.kind])
        for c in report.counts
    )
    return inputs, replace(report, counts=counts)


def _whole(
    few: Few, words: Words, specs: SpecMap
) -> tuple[tuple[InputInfo, ...], Counter[str]]:
    """The flat arguments, and how many annotations were left out, by kind."""
    key = words.logical, tuple(words.aliases.items()), repr(specs)
    if key in few.read:
        return few.read[key]
    inputs, reading = described(few.whole, with_state(few.whole, (few.batch,)), words)
    order = {info.path: k for k, info in enumerate(inputs)}
    seeds = {seed.value: seed.dims for seed in seeds_of_paths(inputs, specs)}
    more: Counter[str] = Counter()
    for path, stand in few.stands.items():
        one, two = order[path], order[stand]
        alike = reading.notes.get(one) == reading.notes.get(two)
        if not alike or inputs[one].logical != inputs[two].logical:
            raise NotAlikeError(f"{path} and {stand} have other annotations")
        if seeds.get(one) != seeds.get(two):
            raise NotAlikeError(f"the path map fixes {path} otherwise than {stand}")
        more.update({n.kind for n in reading.notes.get(one, ()) if n.counted})
        more.update([KIND] if one in seeds else [])
    few.read[key] = inputs, more
    return inputs, more


def _check_amid(stack: Stack, many: set[int], ends: set[int]) -> None:
    """Copies amid those that were left out must be alike, but for ends of chains.

    Args:
        stack: The copies.
        many: Those that are alike.
        ends: Those at an end of some chain, which may be unlike others for that; where
            layers are updated in another order than they run in, they may be any.
    """
    for k in stack.kept:
        if stack.gone[0] - 1 <= k <= stack.gone[-1] + 1 and k not in many | ends:
            raise NotAlikeError(f"copy {k} of the block is unlike others")


def _check_made(survey: Survey, plan: Family) -> None:
    """What copies that stand for others take must not be made for each by itself."""
    made, classes = survey.producer, survey.classes
    inside = (classes >= 0) & np.isin(survey.roots, plan.chains)[classes]
    inside &= np.isin(survey.labels, list(plan.gone | {plan.stand})) & (made >= 0)
    if not np.isin(survey.chain_of[made[inside]], plan.chains).all():
        raise NotAlikeError("something is made for each copy of the block apart")


def _check_numbers(
    traced: Traced, line: Line, at: Mapping[str, tuple[Stack, int]]
) -> None:
    """Gradients in a copy must be of the layer that the copy is counted as."""
    found = line.chain
    for place, copy in enumerate(line.own):
        begin = found.start + place * found.period
        for op in traced.program.ops[begin : begin + found.period]:
            if op.primitive == "autoshard_annotate" and op.params["role"]:
                owner = at.get(op.params["path"])
                if owner is not None and owner[1] != copy:
                    raise NotAlikeError("the backward pass is cut between other layers")


def _line(
    found: Chain, stack: Stack, number: Mapping[int, int], order: dict[str, int]
) -> Line:
    labels = found.labels.tolist()
    own = tuple(number.get(label, -1) for label in labels)
    missing = set(stack.kept) - set(own)
    run = list(range(stack.copies))
    named = sorted(run, key=lambda k: order[stack.paths[0][k]])
    fits = {
        tuple(k for k in way if k not in missing)
        for way in (run, run[::-1], named, named[::-1])
        if tuple(k for k in way if k in own) == own
    }
    if len(fits) != 1:
        raise NotAlikeError("the order in which the copies come cannot be told")
    return Line(found, stack, own, fits.pop())


def path_with(text: str, paths: Mapping[str, str]) -> str:
    """A text whose last word is the path of a leaf, with another parameter in it.

    >>> path_with("gradient of params/b/3/up", {"params/b/3/up": "params/b/8/up"})
    'gradient of params/b/8/up'
    """
    head, space, path = text.rpartition(" ")
    owner = param_in(path, paths)
    if owner is None:
        return text
    cut = len(path) - len(owner.removeprefix("params/"))
    return f"{head}{space}{path[:cut]}{paths[owner].removeprefix('params/')}"
