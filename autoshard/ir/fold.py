"""A deep program as a shallow one: of the copies of a block, one stands for many.

What a thousand layers cost is what five cost, one of them counted 996 times: the first
and the last two are kept as they are, since the ends of a chain may differ, and of
those between them one is kept for all. `ties` says which ops are copies; the copies of
one layer (its forward and backward pass, its part of the update) go together.

What a kept op reads of a dropped copy it reads of the nearest kept one in that
direction: along a chain of copies of the one before, and from another chain of the
layer that lies as far away among those kept. A chain of which something else reads a
copy in the middle, or whose layers are not numbered alike, is left as it is; so are
layers that differ in something that the program does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoshard.ir.families import Family, Survey
from autoshard.ir.signatures import Ints
from autoshard.ir.ties import Blocks, Chain
from autoshard.ir.trace import Traced


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """A program without most copies of its blocks.

    Attributes:
        traced: The program that is left.
        full: The program that it stands for.
        ops: Per op that is left, its index in the full program.
        values: Per value that is left, its index in the full program.
        alike_ops: Per op, for how many ops of the full program it stands.
        alike: Per value, the same.
        amid: Ops of copies between others that are like them: whatever is in memory
            while these run lies between what is while the copies before and those
            after them run.
        inner: Op of a copy beside one that stands for many, to the op there that is
            its copy. Where one of the many is beside another, the op is this.
    """

    traced: Traced
    full: Traced
    ops: Sequence[int]
    values: Sequence[int]
    alike_ops: tuple[int, ...]
    alike: tuple[int, ...]
    amid: frozenset[int]
    inner: dict[int, int]


def unfolded(traced: Traced) -> Folded:
    """A program as it is: every op stands for itself."""
    ops, values = len(traced.program.ops), len(traced.program.values)
    return Folded(
        traced=traced,
        full=traced,
        ops=range(ops),
        values=range(values),
        alike_ops=(1,) * ops,
        alike=(1,) * values,
        amid=frozenset(),
        inner={},
    )


def fold(traced: Traced, marks: Sequence[int]) -> Folded:
    """Leaves out copies of blocks that another copy can stand for.

    Args:
        traced: The program.
        marks: Per value, a number for what is known of it that the program does not
            show (names, mesh axes that the user fixed); copies that differ in one are
            not folded.

    >>> import jax.numpy as jnp
    >>> from autoshard.ir.trace import trace
    >>> def fn(ws, x):
    ...     for w in ws:
    ...         x = jnp.tanh(x @ w)
    ...     return x
    >>> w, x = jnp.ones((4, 4)), jnp.ones((8, 4))
    >>> found = fold(trace(fn, ([w] * 100, x)), [0] * 301)
    >>> len(found.traced.program.ops), sum(found.alike_ops), max(found.alike_ops)
    (10, 200, 96)
    """
    survey = Survey(traced, np.asarray(marks, dtype=np.int64))
    return fold_by(survey, survey.families())


def fold_by(survey: Survey, families: Sequence[Family]) -> Folded:
    """Leaves out the copies that families of chains say are to go."""
    return _Folding(survey, families).run() if families else unfolded(survey.traced)


class _Folding:
    """Building the program that is left."""

    def __init__(self, survey: Survey, plans: Sequence[Family]) -> None:
        self.survey = survey
        self.full = survey.traced
        self.plan_of = {c: plan for plan in plans for c in plan.chains}
        self.plans = plans

    def run(self) -> Folded:
        full = self.full
        program = full.program
        gone_op, many_op = self._marked_ops()
        gone, many = self._marked_values(gone_op)
        self.gone = gone
        self.at_label = self._kept_values(gone)
        ops = np.flatnonzero(~gone_op).tolist()
        values = np.flatnonzero(~gone).tolist()
        new_op = dict(zip(ops, range(len(ops)), strict=True))
        self.new_value = dict(zip(values, range(len(values)), strict=True))
        left = replace(
            program,
            values=tuple(
                replace(
                    program.values[v],
                    index=k,
                    producer=new_op.get(program.values[v].producer, -1),
                )
                for k, v in enumerate(values)
            ),
            ops=tuple(
                replace(
                    program.ops[o],
                    index=k,
                    inputs=self._inputs(o),
                    outputs=tuple(self.new_value[v] for v in program.ops[o].outputs),
                )
                for k, o in enumerate(ops)
            ),
            **self._ends(),
        )
        traced = replace(
            full,
            program=left,
            inputs=tuple(
                info
                for v, info in zip(program.inputs, full.inputs, strict=True)
                if not gone[v]
            ),
            out_source=self._sources(),
            seeds=tuple(
                replace(seed, value=self.new_value[seed.value])
                for seed in full.seeds
                if not gone[seed.value]
            ),
            blocks=replace(
                Blocks.none(len(ops), len(values)),
                crossing=frozenset(
                    self.new_value[v] for v in full.blocks.crossing if not gone[v]
                ),
            ),
        )
        amid, inner = self._beside()
        return Folded(
            traced=traced,
            full=full,
            ops=ops,
            values=values,
            alike_ops=tuple(many_op[ops].tolist()),
            alike=tuple(many[values].tolist()),
            amid=frozenset(new_op[o] for o in amid if o in new_op),
            inner={new_op[o]: new_op[to] for o, to in inner.items()},
        )

    def _copies(self, plan: Family) -> list[tuple[Chain, int, int]]:
        """`(chain, first op, label)` of all copies of a family."""
        return [
            (found, found.start + p * found.period, label)
            for found in (self.survey.chains[c] for c in plan.chains)
            for p, label in enumerate(found.labels.tolist())
        ]

    def _marked_ops(self) -> tuple[np.ndarray, Ints]:
        gone = np.zeros(len(self.full.program.ops), dtype=bool)
        many = np.ones(len(gone), dtype=np.int64)
        for plan in self.plans:
            for found, at, label in self._copies(plan):
                gone[at : at + found.period] = label in plan.gone
                many[at : at + found.period] = plan.count if label == plan.stand else 1
        return gone, many

    def _marked_values(self, gone_op: np.ndarray) -> tuple[np.ndarray, Ints]:
        """Values of copies, made by them or put in; none that something else makes."""
        survey = self.survey
        made, classes = survey.producer, survey.classes
        gone = (made >= 0) & gone_op[made]
        many = np.ones(len(made), dtype=np.int64)
        for plan in self.plans:
            inside = np.isin(survey.roots, plan.chains)[classes] & (classes >= 0)
            inside &= (made < 0) | np.isin(survey.chain_of[made], plan.chains)
            many[inside & (survey.labels == plan.stand)] = plan.count
            gone |= inside & np.isin(survey.labels, list(plan.gone))
        return gone, many

    def _kept_values(self, gone: np.ndarray) -> dict[tuple[int, int], int]:
        """The values of kept copies, by class and label."""
        survey = self.survey
        kept = np.flatnonzero((survey.classes >= 0) & ~gone)
        keys = zip(
            survey.classes[kept].tolist(), survey.labels[kept].tolist(), strict=True
        )
        return dict(zip(keys, kept.tolist(), strict=True))

    def _inputs(self, index: int) -> tuple[int, ...]:
        return tuple(
            -1 if v < 0 else self.new_value[self._instead(index, v)]
            for v in self.full.program.ops[index].inputs
        )

    def _instead(self, index: int, v: int) -> int:
        """What an op reads in the place of a value that may be gone."""
        if not self.gone[v]:
            return v
        survey = self.survey
        number, cls = int(survey.chain_of[index]), int(survey.classes[v])
        plan = self.plan_of[number]
        maker, label = int(survey.producer[v]), int(survey.labels[v])
        found, place = survey.chains[number], int(survey.place_of[index])
        if maker >= 0 and survey.chain_of[maker] == number:
            # The copy before this one, of those that are kept.
            before = place - 1
            while int(found.labels[before]) in plan.gone:
                before -= 1
            return self.at_label[cls, int(found.labels[before])]
        own = int(found.labels[place])
        there = plan.kept.index(own) + (1 if label > own else -1)
        return self.at_label[cls, plan.kept[there]]

    def _ends(self) -> dict[str, tuple[object, ...]]:
        """Inputs and results of the program that is left."""
        program, gone, new = self.full.program, self.gone, self.new_value
        return {
            "inputs": tuple(new[v] for v in program.inputs if not gone[v]),
            "input_paths": tuple(
                path
                for v, path in zip(program.inputs, program.input_paths, strict=True)
                if not gone[v]
            ),
            "outputs": tuple(
                new.get(v, -1) for v in program.outputs if v < 0 or not gone[v]
            ),
        }

    def _sources(self) -> tuple[int, ...]:
        program, gone = self.full.program, self.gone
        left = [k for k, v in enumerate(program.inputs) if not gone[v]]
        place = {k: n for n, k in enumerate(left)}
        return tuple(
            place[source] if source >= 0 else -1
            for v, source in zip(program.outputs, self.full.out_source, strict=True)
            if v < 0 or not gone[v]
        )

    def _beside(self) -> tuple[set[int], dict[int, int]]:
        """See `amid` and `inner` of `Folded`, in ops of the full program."""
        amid: set[int] = set()
        inner: dict[int, int] = {}
        for plan in self.plans:
            for c in plan.chains:
                found = self.survey.chains[c]
                zone, labels = plan.zone(found), found.labels.tolist()
                amid.update(
                    range(
                        found.start + zone.start * found.period,
                        found.start + zone.stop * found.period,
                    )
                )
                kept = [p for p, label in enumerate(labels) if label not in plan.gone]
                at = kept.index(labels.index(plan.stand))
                stand = found.start + kept[at] * found.period
                for p in kept[max(at - 1, 0) : at] + kept[at + 1 : at + 2]:
                    begin = found.start + p * found.period
                    inner.update((begin + i, stand + i) for i in range(found.period))
        return amid, inner
