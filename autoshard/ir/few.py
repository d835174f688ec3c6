"""A train step with few copies of its blocks, traced in place of one with many.

Tracing a step of a thousand unrolled layers takes minutes, nearly all of it in
differentiating and updating copies of one block. So the loss alone is traced as it is,
and copies are left out of it before it is differentiated: those at both ends stay, and
some between them. What the step of the others does with a copy amid them, the whole
does with each that was left out: `ir.stretch` counts them, `ir.addresses` names them.

That holds where the copies of the loss are wired alike and have names alike, where an
optimizer keeps the same state for all, and where it updates alike those that are left.
Everything else is traced as a whole.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from autoshard.ir import _jaxcompat
from autoshard.ir.annotations.calls import Calls, watched
from autoshard.ir.equations import by_equation, runner
from autoshard.ir.errors import AutoshardError
from autoshard.ir.families import Family, Survey
from autoshard.ir.fold import Folded, fold_by
from autoshard.ir.program import no_collection
from autoshard.ir.trace import Traced, abstract, trace
from autoshard.ir.train_step import TrainState, TrainStep, path_string

_jaxcompat.hide_from_source_lines(__file__)

_ENDS = 5
"""Copies kept at each end: some of them are unlike the others (the first needs no
gradient of what it is fed with), and `ir.fold` keeps two more."""

_AMID = 3
"""Copies kept between them, spread over all: an optimizer that treats some layers in
another way than others is found out by them."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Copies of a block, of which few are kept.

    Attributes:
        copies: How many there are.
        kept: Which of them are kept, counted in the order in which they run.
        paths: Per parameter of a block, its path in each copy.
    """

    copies: int
    kept: tuple[int, ...]
    paths: tuple[tuple[str, ...], ...]

    @property
    def stand(self) -> int:
        """The kept copy that stands for those that are left out."""
        return self.kept[len(self.kept) // 2]

    @property
    def gone(self) -> tuple[int, ...]:
        """The copies that are left out."""
        return tuple(sorted(set(range(self.copies)) - set(self.kept)))


@dataclass(frozen=True)
class FewStep(TrainStep):
    """A train step of which a loss of few copies is differentiated and updated.

    Attributes:
        part: What it is part of.
    """

    part: Few | None = None

    @property
    def _own(self) -> Few:
        assert self.part is not None
        return self.part

    def _loss(self, params: Any, rest: Any, batch: Any) -> tuple[Any, Any]:
        return self._own.run(params, rest, batch)

    @cached_property
    def _abstract_state(self) -> TrainState:
        return self._own.state

    @cached_property
    def variables(self) -> Any:
        """Those of the whole step; paths that are left out are never asked for."""
        return self._own.whole.variables

    @cached_property
    def remarks(self) -> Any:
        """Those of the whole step."""
        return self._own.whole.remarks

    @property
    def calls(self) -> Calls:
        """The annotations that were met while the whole loss was traced."""
        return self._own.calls


@dataclass(frozen=True, eq=False)
class Few:
    """A step of few copies, and what of the whole step it leaves out.

    Attributes:
        whole: The whole step.
        stacks: The copies.
        run: `(params, rest, batch) -> (loss, rest)` of those that are kept.
        state: The abstract state; parameters that are left out are None.
        stands: Path of each leaf of the state that is left out, to that of the leaf
            that stands for it.
        calls: Annotations met while the loss was traced.
        batch: The abstract batch, all microbatches together.
        read: What `ir.stretch` reads of the whole step, by what it is read with.
    """

    whole: TrainStep
    stacks: tuple[Stack, ...]
    run: Callable[..., Any]
    state: TrainState
    stands: dict[str, str]
    calls: Calls
    batch: Any
    read: dict[Any, Any] = field(default_factory=dict)

    def step(self, remat: str) -> FewStep:
        """The step, with as many microbatches as the whole, and with remat."""
        whole = self.whole
        given = whole.loss_fn, whole.optimizer, whole.model, whole.microbatches
        return FewStep(*given, remat, self)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the whole step without remat: of what is left and what is not.

        Blind to names and source lines, like that of `ir.program.Program`.
        """
        plain = trace(self.step("none"), (self.batch,))
        said = repr([(stack.copies, stack.kept) for stack in self.stacks])
        text = f"{plain.program.fingerprint} {said}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def few_of(step: TrainStep, batch: Any) -> Few | str:
    """Leaves copies of blocks out of a train step, if they are many and alike.

    Args:
        step: The step; its loss is that of one of its microbatches.
        batch: Its abstract batch.

    Returns:
        The step of few copies; or why there is none, empty where nothing repeats often.
    """
    cache = step.few
    leaves, tree = jax.tree.flatten(abstract(batch))
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
    key = tree, shapes, step.microbatches
    if key not in cache:
        whole = step.with_schedule(microbatches=step.microbatches, remat="none")
        try:
            cache[key] = _few(whole, jax.tree.unflatten(tree, leaves))
        except AutoshardError as error:
            # What is wrong with the step is said where it is traced as a whole.
            cache[key] = str(error)
    return cache[key]


def fingerprint(step: TrainStep, batch: Any, traced: str) -> str:
    """The fingerprint of a train step, which a plan carries.

    Args:
        step: The step, of any schedule.
        batch: Its abstract batch.
        traced: That of its program without microbatches and remat, traced as a whole:
            it is the step's where few copies of its blocks do not stand for all.
    """
    few = few_of(step.with_schedule(microbatches=1, remat="none"), batch)
    return traced if isinstance(few, str) else few.fingerprint


@no_collection()
def _few(whole: TrainStep, batch: Any) -> Few | str:
    state, piece = whole.abstract_state(), batch
    if whole.microbatches > 1:
        piece = jax.eval_shape(whole.pieces, batch)
        piece = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), piece
        )
    args = state.params, state.rest, piece
    try:
        with watched() as calls:
            closed = jax.make_jaxpr(lambda *given: whole._loss(*given))(*args)
    except AutoshardError:
        raise
    except Exception:
        return ""  # the user's own loss fails, and so where it is traced as a whole
    traced, consts = by_equation(closed, args)
    folded, stacks = _folded(traced)
    if not stacks:
        return ""
    for op in traced.program.ops:
        if any(isinstance(param, Sharding) for param in op.params.values()):
            return f"{op.primitive} at {op.source} is on a mesh of the user's"
    why = _differing_names(folded, stacks)
    if why:
        return why
    gone = {s.paths[c][k] for s in stacks for c in range(len(s.paths)) for k in s.gone}
    if len(folded.traced.program.outputs) != len(traced.program.outputs):
        return "copies of the block return something beside what the next one takes"
    everything = traced.program.input_paths
    if {*folded.traced.program.input_paths, *gone} != {*everything} or len(
        folded.traced.program.inputs
    ) + len(gone) != len(everything):
        return "copies of the block have inputs that are no parameters"
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: None if f"params/{path_string(path)}" in gone else x,
        state.params,
    )
    run = runner(folded, consts, closed, jax.tree.structure(state.rest))
    try:
        opt_state = jax.eval_shape(whole.optimizer.init, params)
    except Exception as error:
        return f"the optimizer takes no state of some copies of a block alone: {error}"
    few = replace(state, params=params, opt_state=opt_state)
    few = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), few)
    stands = _stands(state, few, stacks)
    if isinstance(stands, str):
        return stands
    return Few(whole, stacks, run, few, stands, calls, batch)


def _folded(traced: Traced) -> tuple[Folded, tuple[Stack, ...]]:
    """The loss with few copies of each block that has many."""
    program = traced.program
    survey = Survey(traced, np.zeros(len(program.values), dtype=np.int64))
    paths = dict(zip(program.inputs, program.input_paths, strict=True))
    plans, stacks = [], []
    for family in survey.families():
        labels = sorted({*family.kept, *family.gone})
        count = len(labels)
        amid = range(_ENDS, count - _ENDS)
        spread = (
            {amid[(2 * k + 1) * len(amid) // (2 * _AMID)] for k in range(_AMID)}
            if len(amid) > _AMID
            else set(amid)
        )
        places = sorted({*range(_ENDS), *spread, *range(count - _ENDS, count)})
        kept = tuple(sorted({*(labels[k] for k in places), *family.kept}))
        gone = family.gone - set(kept)
        columns = _columns(survey, family, labels, paths)
        if len(gone) < 2 or not columns:
            continue
        plans.append(replace(family, kept=kept, gone=gone, count=len(gone) + 1))
        numbers = tuple(labels.index(label) for label in kept)
        stacks.append(Stack(count, numbers, columns))
    return fold_by(survey, plans), tuple(stacks)


def _columns(
    survey: Survey, family: Family, labels: Sequence[int], paths: dict[int, str]
) -> tuple[tuple[str, ...], ...]:
    """Per parameter of a block its path in each copy."""
    found: dict[int, dict[int, str]] = {}
    for v, path in paths.items():
        cls = int(survey.classes[v])
        if cls >= 0 and survey.roots[cls] in family.chains:
            found.setdefault(cls, {})[int(survey.labels[v])] = path
    return tuple(
        tuple(row[label] for label in labels)
        for _, row in sorted(found.items())
        if set(labels) <= row.keys()
    )


def _differing_names(folded: Folded, stacks: tuple[Stack, ...]) -> str:
    """Whether copies run in scopes of other names, in words; else nothing."""
    full, blocks = folded.full.program, folded.full.blocks
    for found in blocks.chains:
        stop = found.start + found.period * found.count
        scopes = [op.scope for op in full.ops[found.start : stop]]
        for k in range(found.period):
            names = set(scopes[k :: found.period])
            if len(names) > 1:
                some = " and ".join(sorted(names)[:2])
                return f"copies of the block are in scopes of other names: {some}"
    return ""


def _stands(
    whole: TrainState, few: TrainState, stacks: tuple[Stack, ...]
) -> dict[str, str] | str:
    """Per leaf of the whole state that is left out, the kept one that stands for it."""
    of_param = {
        row[k]: row[stack.stand]
        for stack in stacks
        for row in stack.paths
        for k in stack.gone
    }
    there = _leaves(few)
    found: dict[str, str] = {}
    for path, leaf in _leaves(whole).items():
        stand = path
        if path not in there:
            owner = param_in(path, of_param)
            if owner is None:
                return f"{path} of the optimizer's state belongs to no parameter"
            cut = len(path) - len(owner.removeprefix("params/"))
            stand = path[:cut] + of_param[owner].removeprefix("params/")
            found[path] = stand
        if there.get(stand) != leaf:
            return f"the optimizer does not keep of {path} what it keeps of {stand}"
    times = Counter(found.values())
    for stack in stacks:
        stood = {row[stack.stand] for row in stack.paths}
        for path in there:
            owner = param_in(path, stood)
            if owner is not None and times[path] != len(stack.gone):
                return f"the optimizer does not keep {path} of all copies of the block"
    return found


def param_in(path: str, params: Any) -> str | None:
    """The parameter, of some, that a leaf of the state is or belongs to.

    >>> param_in("opt_state/0/mu/blocks/3/up", {"params/blocks/3/up"})
    'params/blocks/3/up'
    """
    at = path.find("/")
    while at >= 0:
        if (found := "params" + path[at:]) in params:
            return found
        at = path.find("/", at + 1)
    return None


def _leaves(state: TrainState) -> dict[str, tuple[Any, str]]:
    return {
        path_string(path): (tuple(x.shape), str(x.dtype))
        for path, x in jax.tree_util.tree_flatten_with_path(state)[0]
    }
