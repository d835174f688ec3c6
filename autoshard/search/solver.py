"""One program on one cluster, solved again and again under changing wishes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from autoshard.ir.errors import InfeasibleError
from autoshard.ir.program import no_collection
from autoshard.plan.cluster import Cluster
from autoshard.plan.schema import Certificate, ModelRef, Plan
from autoshard.plan.strategy import Strategy
from autoshard.search.candidates import Space
from autoshard.search.explore import Entry, Explored, explore
from autoshard.search.finish import draft
from autoshard.search.known import Known
from autoshard.search.pinning import fixed_fields, with_pins
from autoshard.search.remedy import explain_indivisible, explain_no_fit
from autoshard.search.space import without_experts

Log = Callable[[str], None]

_SPARE = 4
"""Candidates that are kept beyond those wanted."""


class Solver:
    """The space of a strategy for a program on a cluster.

    The program is traced once; `pinned` gives a solver with more fields fixed that
    shares the trace, the propagated structures and so nearly all of the work.

    Args:
        fn: A `TrainStep`, or a function whose last argument is the batch.
        args: Abstract arguments.
        cluster: Where to run.
        strategy: Which fields are fixed and which are holes.
        model_ref: Recorded in plans.
        log: Called with progress in words.
        time_limit_s: After it, no further structure is priced; the certificate says
            what that leaves open.

    Raises:
        InputError: The strategy asks for what the function cannot do.
        RuleMissingError: A primitive has no rule.
    """

    @no_collection()
    def __init__(
        self,
        fn: Any,
        args: tuple[Any, ...],
        cluster: Cluster,
        strategy: Strategy,
        *,
        model_ref: ModelRef | None = None,
        log: Log | None = None,
        time_limit_s: float | None = None,
        space: Space | None = None,
    ) -> None:
        self.fn = fn
        self.args = args
        self.cluster = cluster
        self.strategy = strategy
        self.model_ref = model_ref
        self.log = log or (lambda _: None)
        self.time_limit_s = time_limit_s
        if space is None:
            space = Space(fn, args, self.log, strategy)
            self.log(f"tracing and analysing the step for {cluster.name}")
            plain = space.sketch("none")
            assert plain is not None
            for remark in plain.remarks:
                self.log(remark)
        self.space = space
        self._asked = strategy
        if not space.has_experts():
            self.strategy = without_experts(strategy)
            if strategy.mesh.get("expert") == "auto" and self.strategy.name != "auto":
                self.log("axis 'expert' left out: no dim of the program is of experts")
        self._explored: dict[int | None, Explored] = {}
        self._refused: list[tuple[float, Strategy]] = []
        self._parent: Solver | None = None

    def pinned(self, pins: Mapping[str, Any]) -> Solver:
        """The same program with more fields fixed.

        Args:
            pins: As in `pinning.with_pins`: `{"tensor": 8, "remat": "full"}`.

        Raises:
            NameUnknownError: No field has a key's name.
            InputError: A value does not suit its field.
        """
        strategy = with_pins(self._asked, pins)
        # Names and path maps decide how the program is read; with others it is read
        # anew.
        asked = self._asked
        alike = (strategy.specs, strategy.names) == (asked.specs, asked.names)
        found = Solver(
            self.fn,
            self.args,
            self.cluster,
            strategy,
            model_ref=self.model_ref,
            log=self.log,
            time_limit_s=self.time_limit_s,
            space=self.space if alike else None,
        )
        found._parent = self if alike else None
        return found

    def on(self, cluster: Cluster) -> Solver:
        """The same program on another cluster."""
        return Solver(
            self.fn,
            self.args,
            cluster,
            self.strategy,
            model_ref=self.model_ref,
            log=self.log,
            time_limit_s=self.time_limit_s,
            space=self.space,
        )

    def explored(self, best: int | None = None) -> Explored:
        """The space, priced.

        Args:
            best: How many of the best candidates are wanted; all where it is None.

        Raises:
            InfeasibleError: No mesh divides the program's dims.
        """
        if best in self._explored:
            return self._explored[best]
        known, guess_s = self._from_parent(best) if best else (None, float("inf"))
        found = explore(
            self.space,
            self.strategy,
            self.cluster,
            best=best,
            time_limit_s=self.time_limit_s,
            known=known,
            guess_s=guess_s,
        )
        watch = found.watch
        if not found.enumerated and not watch.too_large:
            groups = self.space.price(self.strategy, self.cluster)
            raise InfeasibleError(
                explain_indivisible(self.space, groups, self.cluster, self.strategy)
            )
        left = f", {found.left} structures left ({found.why})" if found.left else ""
        self.log(
            f"{found.enumerated} candidates priced, {found.infeasible} do not fit, "
            f"{watch.indivisible} left out because a dim does not divide, "
            f"{watch.pruned} because of a bound on their time, {watch.alike} because "
            f"they are one with another{left}"
        )
        self._explored[best] = found
        return found

    def _from_parent(self, best: int) -> tuple[Known | None, float]:
        """What the solver whose fields were fixed knows; see `explore`."""
        parent = self._parent
        earlier = [e for b, e in parent._explored.items() if b] if parent else []
        if not parent or not earlier:
            return None, float("inf")
        own, other = self.strategy, parent.strategy
        fixed, before = fixed_fields(own), fixed_fields(other)
        new = {key: value for key, value in fixed.items() if before.get(key) != value}
        # What fixed fields do not name, or its candidates cannot be asked for.
        there = {f"rules.{rule.logical}" for rule in other.rules}
        blind = any(key.startswith("rules.") and key not in there for key in new)
        for name in ("blocks", "context_heads"):
            blind |= getattr(own.schedule, name) != getattr(other.schedule, name)
        blind |= own.order != other.order or "mix" in (
            own.schedule.remat,
            other.schedule.remat,
        )
        guess_s = float("inf")
        if not blind and self.time_limit_s is None:
            guess_s = earlier[-1].guess_s(new, best)
        return earlier[-1].known, guess_s

    @no_collection()
    def plans(self, top: int = 1) -> list[Plan]:
        """The best plans, each truly different from those before it.

        Raises:
            InfeasibleError: Nothing divides, or nothing fits in memory.
        """
        mixes = self.strategy.schedule.remat == "mix"
        # Of the best by the price of the search, some may not fit with their
        # microbatches traced; mostly they do.
        counts = (top + _SPARE, None) if mixes else (top, top + _SPARE, None)
        found: list[Plan] = []
        for best in counts:
            explored = self.explored(best)
            found = self._written(explored, self._different(explored), top)
            # All are priced only with one policy for all blocks; and who stops a search
            # wants what was found until then.
            enough = found and (mixes or explored.left)
            if len(found) == top or not explored.watch.pruned or enough:
                break
        if not found:
            raise InfeasibleError(self._no_fit())
        return found

    @no_collection()
    def smaller(self, budget_bytes: float) -> Plan | None:
        """The fastest plan within a budget of a chip's memory, None if there is none.

        Raises:
            InfeasibleError: Nothing divides.
        """
        explored = self.explored()
        within = (entry for entry in explored.ranked if entry[1] <= budget_bytes)
        return next(iter(self._written(explored, within, 1, budget_bytes)), None)

    @no_collection()
    def front(self, most: int) -> list[Plan]:
        """Plans of which none is beaten in both time and memory, the fastest first.

        Args:
            most: How many at most; of more, some are left out between the ends.

        Raises:
            InfeasibleError: Nothing divides, or nothing fits in memory.
        """
        explored = self.explored()
        front = explored.front()
        if len(front) > most:
            at = [round(i * (len(front) - 1) / max(most - 1, 1)) for i in range(most)]
            self.log(f"{len(front)} plans are on the front; {most} of them are written")
            front = [front[i] for i in dict.fromkeys(at)]
        found = self._written(explored, front, most)
        if not found:
            raise InfeasibleError(self._no_fit())
        # With their microbatches traced, some may be beaten by others.
        kept: list[Plan] = []
        for plan in sorted(found, key=_time_and_memory):
            if not kept or _time_and_memory(plan)[1] < _time_and_memory(kept[-1])[1]:
                kept.append(plan)
        return kept

    def _no_fit(self) -> str:
        return explain_no_fit(
            self.space, self.explored(), self.cluster, self.strategy, self._refused
        )

    def _different(self, explored: Explored) -> Iterator[Entry]:
        seen: set[Any] = set()
        for entry in explored.ranked:
            identity = explored.groups[entry[2]].identity(entry[3])
            if identity not in seen:
                seen.add(identity)
                yield entry

    def _written(
        self,
        explored: Explored,
        entries: Iterable[Entry],
        most: int,
        budget_bytes: float = float("inf"),
    ) -> list[Plan]:
        watch = explored.watch
        certificate = Certificate(
            lower_bound_s=explored.lower_bound_s,
            gap=0.0,
            enumerated=explored.enumerated,
            indivisible=watch.indivisible,
            infeasible=explored.infeasible,
            alike=watch.alike,
            pruned=watch.pruned,
            left=explored.left,
            complete=not explored.left,
        )
        found: list[Plan] = []
        for step_s, _, number, k in entries:
            filled = explored.groups[number].filled(k)
            drawn = draft(self.space, self.cluster, filled, certificate, self.model_ref)
            if self._too_large(drawn.plan, budget_bytes):
                continue
            plan = drawn.spelled_out()
            # Where few copies did not stand for all, it was priced anew.
            if self._too_large(plan, budget_bytes):
                continue
            found.append(plan)
            self.log(f"plan {len(found)}: {step_s:.4g} s per step")
            if len(found) == most:
                break
        return found

    def _too_large(self, plan: Plan, budget_bytes: float) -> bool:
        """Whether a plan, its microbatches traced, takes more memory than it may."""
        memory = plan.predicted.memory
        if memory.total > memory.capacity:
            self._refused.append((float(memory.total), plan.strategy))
        return memory.total > min(memory.capacity, budget_bytes)


def _time_and_memory(plan: Plan) -> tuple[float, int]:
    return plan.predicted.step_s, plan.predicted.memory.total
