"""What a user fixed in mesh axes, propagated both ways to a fixpoint.

The scheme is that of Shardy (openxla/shardy, docs/propagation.md): specs travel along
the factors of ops, forwards and backwards, first through ops that only pass values on,
then through all; a dim without a spec is open and takes what arrives first, a dim that
is closed keeps what it has. It works in rounds: all ops next to a change are looked at
in the state that the round began with, and of what they propose for one dim the best
is taken by rank, never by order of visiting. So the result is that of the program, not
of a way through it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autoshard.ir.program import LINK, Op
from autoshard.ir.seeds import Seed
from autoshard.ir.trace import Traced
from autoshard.plan.sharded import Conflict, Dims, Fixed
from autoshard.rules import FactorRule

STORAGE_AXES = frozenset({"data", "fsdp"})
"""Axes that on a state tensor say how it is stored, not how it is used: the ops that
use it gather it (ZeRO). Propagated into activations they would move the batch."""

_PASSING = frozenset({"elementwise", "move", "link", "data"})

Entry = tuple[str, ...] | None


def fix(
    traced: Traced, rules: Sequence[FactorRule], aliases: Mapping[str, str]
) -> Fixed:
    """Propagates the seeds of a program.

    Args:
        traced: The program with its seeds.
        rules: Factor rule per op.
        aliases: Canonical axis per name that the user gave an axis.

    Returns:
        Specs and factor axes that follow; empty when nothing is seeded.

    Raises:
        NameUnknownError: A seed names an axis that nothing maps to a canonical one.
    """
    pass_ = _Fixpoint(traced, rules, aliases)
    return pass_.run() if pass_.seeded else Fixed()


@dataclass(frozen=True, slots=True)
class _Wish:
    """Axes for one dim, or for one factor, and the dim they come from."""

    axes: tuple[str, ...]
    value: int
    dim: int
    seed: int
    rank: tuple[bool, int, tuple[str, ...]]


@dataclass
class _Fixpoint:
    traced: Traced
    rules: Sequence[FactorRule]
    aliases: Mapping[str, str]
    seeded: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.program = self.traced.program
        self.state: dict[int, list[Entry]] = {}
        self.why: dict[tuple[int, int], int] = {}
        self.storage: dict[int, Dims] = {}
        self.conflicts: dict[Conflict, None] = {}
        self.origins: list[str] = []
        self.inputs = {
            v: info.state
            for v, info in zip(self.program.inputs, self.traced.inputs, strict=True)
        }
        for given in self.traced.seeds:
            seed = given.canonical(self.aliases)
            self._seed(seed.value, seed.dims, seed.origin)
        for op in self.program.ops:
            kind = op.params.get("kind") if op.primitive == LINK else None
            if kind in ("manual_in", "manual_out"):
                outer = op.inputs[0] if kind == "manual_in" else op.outputs[0]
                if outer >= 0:
                    names = tuple(tuple(n) or None for n in op.params["names"])
                    origin = f"shard_map at {op.source}"
                    self._seed(
                        outer,
                        Seed(outer, names, "shard_map", origin)
                        .canonical(self.aliases)
                        .dims,
                        origin,
                    )

    # -- seeds -------------------------------------------------------------------

    def _seed(self, value: int, dims: Sequence[Entry], origin: str) -> None:
        number = len(self.origins)
        self.origins.append(origin)
        entries: list[Entry] = list(dims)
        state = self.inputs.get(value)
        if state in ("params", "optimizer"):
            self.storage.setdefault(value, tuple(dim or () for dim in entries))
            entries = [
                dim and tuple(a for a in dim if a not in STORAGE_AXES)
                for dim in entries
            ]
        held = self.state.setdefault(value, [None] * len(entries))
        for d, axes in enumerate(entries):
            if axes is None:
                continue
            if held[d] is None:
                held[d] = axes
                self.why[value, d] = number
                self.seeded[value] = number
            elif held[d] != axes:
                self._conflict(value, d, self.why[value, d], axes, number, 0)

    def _conflict(
        self,
        value: int,
        d: int,
        kept: int,
        axes: tuple[str, ...],
        lost: int,
        moved: int,
        where: str = "",
    ) -> None:
        shape = self.program.values[value].shape
        have = self.state[value][d] or ()
        place = where or f"dim {d} of a value of shape {shape}"
        self.conflicts[
            Conflict(
                where=place,
                kept="+".join(have) or "replicated",
                kept_origin=self.origins[kept],
                lost="+".join(axes) or "replicated",
                lost_origin=self.origins[lost],
                moved_bytes=moved,
            )
        ] = None

    # -- rounds ------------------------------------------------------------------

    def run(self) -> Fixed:
        users: dict[int, list[int]] = defaultdict(list)
        for op in self.program.ops:
            for v in {*op.inputs, *op.outputs}:
                if v >= 0:
                    users[v].append(op.index)
        everything = False
        changed = set(self.state)
        reached: set[int] = set()
        while changed:
            near = {i for v in changed for i in users[v]}
            reached |= near
            if everything:
                changed = self._round(near)
                continue
            changed = self._round(i for i in near if self._passes(i))
            if not changed:
                # Nothing moves along ops that only pass values on: now all may.
                everything = True
                changed = self._round(reached)
        factors = {}
        for index in sorted(reached):
            axes = tuple(
                wish.axes if wish else ()
                for wish in self._factors(self.program.ops[index], report=True)
            )
            if any(axes):
                factors[index] = axes
        return Fixed(
            dims={v: tuple(dims) for v, dims in self.state.items()},
            storage=self.storage,
            factors=factors,
            why=self.why,
            origins=tuple(self.origins),
            conflicts=tuple(self.conflicts),
        )

    def _passes(self, index: int) -> bool:
        return self.rules[index].op_kind in _PASSING

    def _round(self, ops: Iterable[int]) -> set[int]:
        """Looks at some ops; returns the values of which a dim was fixed."""
        proposals: dict[int, list[tuple[_Wish, int]]] = defaultdict(list)
        for index in ops:
            op, rule = self.program.ops[index], self.rules[index]
            wishes = self._factors(op)
            for value, dims in _slots(op, rule):
                for d, dim in enumerate(dims):
                    wish = wishes[dim[0]] if dim else None
                    if wish is None or value == wish.value:
                        continue
                    held = self.state.get(value)
                    if held is None or held[d] is None:
                        proposals[value].append((wish, d))
        changed = set()
        for value, offered in proposals.items():
            if self._take(value, offered):
                changed.add(value)
        return changed

    def _take(self, value: int, offered: list[tuple[_Wish, int]]) -> bool:
        shape = self.program.values[value].shape
        held = self.state.get(value)
        dims: list[Entry] = list(held) if held else [None] * len(shape)
        used = {a for dim in dims if dim for a in dim}
        took = False
        for wish, d in sorted(offered, key=lambda o: (o[0].rank, o[1])):
            if dims[d] is not None or shape[d] == 1 or used & set(wish.axes):
                continue
            dims[d] = wish.axes
            used |= set(wish.axes)
            self.why[value, d] = wish.seed
            took = True
        if took:
            self.state[value] = dims
        return took

    def _factors(self, op: Op, *, report: bool = False) -> list[_Wish | None]:
        """The axes of each factor of an op, as its operands and results have them."""
        rule = self.rules[op.index]
        wishes: dict[int, list[_Wish]] = defaultdict(list)
        for value, dims in _slots(op, rule):
            held = self.state.get(value)
            if held is None:
                continue
            for d, dim in enumerate(dims):
                axes = held[d]
                if dim and axes and rule.divisible[dim[0]]:
                    wishes[dim[0]].append(self._wish(value, d, axes))
        chosen: list[_Wish | None] = [None] * len(rule.sizes)
        used: dict[str, _Wish] = {}
        offers = [(wish, f) for f, found in wishes.items() for wish in found]
        if len(wishes) > 1:
            offers.sort(key=lambda o: (self._moved(op, *o), o[0].rank, o[1]))
        else:
            offers.sort(key=lambda o: o[0].rank)
        for wish, f in offers:
            have = chosen[f]
            blocker = next((used[a] for a in wish.axes if a in used), None)
            if have is None and blocker is None:
                chosen[f] = wish
                used.update(dict.fromkeys(wish.axes, wish))
            elif report and (have is None or have.axes != wish.axes):
                self._clash(op, have or blocker, wish)
        return chosen

    def _moved(self, op: Op, wish: _Wish, factor: int) -> int:
        """Bytes of the arrays that move or are reduced if a factor has its wish."""
        rule, axes = self.rules[op.index], set(wish.axes)
        moved = {
            value
            for value, dims in _slots(op, rule)
            for have, dim in zip(self.state.get(value) or (), dims, strict=False)
            if have and dim and dim[0] != factor and axes & set(have)
        }
        if rule.kinds[factor] == "reduce":
            moved.update(op.outputs)
        return sum(self.program.values[value].bytes_ for value in moved)

    def _clash(self, op: Op, kept: _Wish | None, lost: _Wish) -> None:
        if kept is None or (kept.seed == lost.seed):
            return
        where = f"{op.primitive} at {op.source or op.address}"
        self._conflict(
            kept.value,
            kept.dim,
            kept.seed,
            lost.axes,
            lost.seed,
            self.program.values[lost.value].bytes_,
            where,
        )

    def _wish(self, value: int, d: int, axes: tuple[str, ...]) -> _Wish:
        # State is moved rather than activations, and the smaller array rather than
        # the larger: that side of a conflict is the cheaper one to move.
        state = self.inputs.get(value) in ("params", "optimizer")
        rank = (state, -self.program.values[value].bytes_, axes)
        return _Wish(axes, value, d, self.why.get((value, d), 0), rank)


def _slots(op: Op, rule: FactorRule) -> list[tuple[int, tuple[tuple[int, ...], ...]]]:
    pairs = (
        *zip(op.inputs, rule.operands, strict=True),
        *zip(op.outputs, rule.results, strict=True),
    )
    return [(value, dims) for value, dims in pairs if value >= 0 and dims]
