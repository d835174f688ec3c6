"""Which chains of copies belong together, and which copy can stand for others.

A layer has a copy in several chains: in the forward pass, in the backward pass, in each
part of the update. `ties` numbers them alike; here chains that read each other become
one family, of which the same layers are dropped or none.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

import numpy as np

from autoshard.ir.build import is_rematted
from autoshard.ir.signatures import Ints
from autoshard.ir.ties import Chain
from autoshard.ir.trace import Traced
from autoshard.ir.train_step import UPDATE_SCOPE

_ENDS = 2
"""Copies kept at each end. The first may be fed from elsewhere; what goes on between it
and the second is then what goes on between any two."""


@dataclass(frozen=True, slots=True)
class Family:
    """Chains that belong together, and what becomes of their copies.

    Attributes:
        chains: Their numbers.
        kept: Labels that are kept, in order.
        stand: The one of them that stands for `count`, itself included.
        count: See above.
        gone: The others.
    """

    chains: tuple[int, ...]
    kept: tuple[int, ...]
    stand: int
    count: int
    gone: frozenset[int]

    def zone(self, chain_: Chain) -> range:
        """Places of a chain between the first and the last that are alike."""
        labels = chain_.labels.tolist()
        many = self.gone | {self.stand}
        places = [p for p, label in enumerate(labels) if label in many]
        return range(places[0], places[-1] + 1)


class Survey:
    """The wiring of a program's chains, and which of them can be folded."""

    def __init__(self, traced: Traced, marks: Ints) -> None:
        self.traced, self.marks = traced, marks
        self.program, blocks = traced.program, traced.blocks
        self.chains = blocks.chains
        self.classes, self.labels = blocks.classes, blocks.labels
        self.roots = blocks.roots
        ops = len(self.program.ops)
        self.chain_of = np.full(ops, -1)
        self.place_of = np.full(ops, -1)
        for number, found in enumerate(self.chains):
            stop = found.start + found.period * found.count
            self.chain_of[found.start : stop] = number
            self.place_of[found.start : stop] = np.repeat(
                np.arange(found.count), found.period
            )
        self.producer = np.array(
            [v.producer for v in self.program.values], dtype=np.int64
        )
        # What a scope says of an op beside its name.
        self.scopes = np.array(
            [
                2 * (UPDATE_SCOPE in op.scope) + is_rematted(op)
                for op in traced.program.ops
            ]
        )

    def families(self) -> list[Family]:
        """What to fold: families of chains that belong together."""
        if not self.chains:
            return []
        family, bad, read = self._related()
        found = []
        for root in sorted(set(family.values())):
            members = [c for c in range(len(self.chains)) if family[c] == root]
            if bad.isdisjoint(members):
                outside = set().union(*(read[c] for c in members))
                plan = self._family(tuple(members), outside)
                if plan is not None:
                    found.append(plan)
        return found

    def _related(self) -> tuple[dict[int, int], set[int], dict[int, set[int]]]:
        """Chains that read each other, those wired strangely, and what others read."""
        inputs = [op.inputs for op in self.program.ops]
        counts = np.array([len(i) for i in inputs], dtype=np.int64)
        taken = np.fromiter(
            chain.from_iterable(inputs), dtype=np.int64, count=int(counts.sum())
        )
        taker = np.repeat(np.arange(len(inputs)), counts)
        tied = (taken >= 0) & (self.classes[taken] >= 0)
        taken, taker = taken[tied], taker[tied]
        mine, place = self.chain_of[taker], self.place_of[taker]
        root = self.roots[self.classes[taken]]
        label = self.labels[taken]
        maker = self.producer[taken]
        same = (maker >= 0) & (self.chain_of[maker] == mine) & (mine >= 0)
        back = place - self.place_of[maker]
        own = np.full(len(taken), 0)
        for number, found in enumerate(self.chains):
            at = mine == number
            own[at] = found.labels[place[at]]
        # Along a chain from the copy before, else from this layer or one beside it.
        strange = np.where(same, (back < 0) | (back > 1), np.abs(label - own) > 1)
        parent = list(range(len(self.chains)))

        def head(c: int) -> int:
            while parent[c] != c:
                c = parent[c]
            return c

        for number, found in enumerate(self.chains):
            parent[head(number)] = head(found.root)
        inside = mine >= 0
        for c, r in set(zip(mine[inside].tolist(), root[inside].tolist(), strict=True)):
            parent[head(c)] = head(r)
        bad = {head(c) for c in set(mine[inside & strange].tolist())}
        read: dict[int, set[int]] = defaultdict(set)
        for r, label_ in zip(
            root[~inside].tolist(), label[~inside].tolist(), strict=True
        ):
            read[r].add(label_)
        family = {c: head(c) for c in range(len(self.chains))}
        return family, {c for c in family if family[c] in bad}, read

    def _family(self, members: tuple[int, ...], outside: set[int]) -> Family | None:
        numbers = [self.chains[c].labels.tolist() for c in members]
        everyone = set().union(*numbers)
        odd = self._odd(members, sorted(everyone)[len(everyone) // 2])
        kept = set(odd)
        for labels in numbers:
            missing = everyone.difference(labels)
            if len(missing) > 2 * _ENDS:
                return None
            # What is missing is at an end, written as something else.
            ends = max(_ENDS - len(missing), 1)
            # One at each end is as those that are dropped.
            first, last = (
                next((p for p, label in enumerate(row) if label not in odd), 0)
                for row in (labels, labels[::-1])
            )
            kept |= {*labels[: max(ends, first + 1)], *missing}
            kept |= {*labels[-max(ends, last + 1) :]}
        many = sorted(everyone - kept)
        if len(many) < 2 or not outside <= kept:
            return None
        stand = many[len(many) // 2]
        plan = Family(
            chains=members,
            kept=tuple(sorted((*kept, stand))),
            stand=stand,
            count=len(many),
            gone=frozenset(many) - {stand},
        )
        return plan if self._regular(plan, odd) else None

    def _odd(self, members: tuple[int, ...], usual: int) -> frozenset[int]:
        """Labels of which some value has other marks than that of the usual label."""
        mine = np.isin(self.roots, members)
        values = np.flatnonzero((self.classes >= 0) & mine[self.classes])
        classes, labels = self.classes[values], self.labels[values]
        marks = np.full(len(self.roots), -1)
        marks[classes[labels == usual]] = self.marks[values[labels == usual]]
        known = marks[classes] >= 0
        differ = known & (marks[classes] != self.marks[values])
        return frozenset(labels[differ].tolist())

    def _regular(self, plan: Family, odd: frozenset[int]) -> bool:
        """Whether all copies among those that are dropped are like these."""
        for c in plan.chains:
            found = self.chains[c]
            zone = plan.zone(found)
            if not odd.isdisjoint(found.labels[zone.start : zone.stop].tolist()):
                return False
            begin = found.start + zone.start * found.period
            scopes = self.scopes[begin : begin + len(zone) * found.period]
            rows = scopes.reshape(len(zone), found.period)
            if (rows != rows[0]).any():
                return False
        return True
