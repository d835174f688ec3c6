"""A plan for few copies of a block, written out for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from autoshard.ir.addresses import Addresses
from autoshard.ir.stretch import Stretch, path_with
from autoshard.plan.records import BlockRecord, DelayedSum
from autoshard.plan.schema import Collective, Constraint, Plan

_R = TypeVar("_R", Constraint, Collective)

_AT_END = "output"
"""Address of what is moved at the end of the step, one for all results."""


def stretched(plan: Plan, stretch: Stretch) -> Plan:
    """The plan of the whole step.

    Args:
        plan: Of the step of few copies, priced with all of them.
        stretch: How that step goes on.

    Raises:
        NotAlikeError: The addresses of the whole step cannot be told.
    """
    names = _Names(stretch)
    stands, whole = stretch.few.stands, stretch.inputs
    of_path = {tensor.path: tensor for tensor in plan.tensors}
    state = [tensor.path for tensor in plan.tensors if tensor.state != "data"]
    ends = dict(zip(state, plan.outputs, strict=False))
    collectives = sorted(
        names.each(plan.predicted.collectives),
        key=lambda c: (-c.time_s, c.address, c.kind),
    )
    constraints = sorted(
        names.each(plan.constraints), key=lambda c: (c.address, c.slot)
    )
    return plan.model_copy(
        update={
            "program": plan.program.model_copy(
                update={
                    "ops": sum(stretch.folded.alike_ops),
                    "params": sum(
                        int(np.prod(info.shape, dtype=np.int64))
                        for info in whole
                        if info.state == "params"
                    ),
                }
            ),
            "tensors": tuple(
                of_path[stands.get(info.path, info.path)].model_copy(
                    update={"path": info.path}
                )
                for info in whole
            ),
            "outputs": (
                *(
                    ends[stands.get(info.path, info.path)]
                    for info in whole
                    if info.state != "data"
                ),
                *plan.outputs[len(state) :],
            ),
            "constraints": tuple(constraints),
            "blocks": _blocks(plan, stretch),
            "delayed": tuple(one for sum_ in plan.delayed for one in names.sums(sum_)),
            "replicated": tuple(
                one.model_copy(update={"address": address})
                for one in plan.replicated
                for address in names.of(one.address).values()
            ),
            "trail": tuple(
                step.model_copy(update={"address": names.of(step.address)[-1]})
                for step in plan.trail
            ),
            "predicted": plan.predicted.model_copy(
                update={"collectives": tuple(collectives)}
            ),
        }
    )


class _Names:
    """Addresses of the whole step, and paths of its leaves."""

    def __init__(self, stretch: Stretch) -> None:
        self.of = Addresses(stretch).of
        self.paths = stretch.paths

    def each(self, found: Iterable[_R]) -> Iterable[_R]:
        """Each with those of the copies that it stands for."""
        for one in found:
            if one.address == _AT_END:
                addresses = self._ends(one)
            else:
                addresses = self.of(one.address)
            for copy, address in addresses.items():
                new: dict[str, str] = {"address": address}
                if copy >= 0 and isinstance(one, Collective):
                    new["value"] = path_with(one.value, self.paths[copy])
                yield one.model_copy(update=new)

    def _ends(self, one: Constraint | Collective) -> dict[int, str]:
        value = one.value if isinstance(one, Collective) else ""
        copies = [k for k, row in self.paths.items() if path_with(value, row) != value]
        return dict.fromkeys((-1, *copies), _AT_END)

    def sums(self, one: DelayedSum) -> Iterable[DelayedSum]:
        """A delayed sum with those of the copies that it stands for."""
        roots = [self.of(root.address) for root in one.roots]
        carriers = [self.of(address) for address in one.carriers]
        copies = set().union(*roots, *carriers)
        for copy in sorted(copies):
            yield one.model_copy(
                update={
                    "roots": tuple(
                        root.model_copy(update={"address": name.get(copy, name[-1])})
                        for root, name in zip(one.roots, roots, strict=True)
                    ),
                    "carriers": tuple(name.get(copy, name[-1]) for name in carriers),
                }
            )


def _blocks(plan: Plan, stretch: Stretch) -> tuple[BlockRecord, ...]:
    folded = stretch.folded
    alike = np.zeros(len(folded.full.program.ops), dtype=np.int64)
    alike[list(folded.ops)] = folded.alike_ops
    whole = {line.chain.start: len(line.whole) for line in stretch.lines}
    found = []
    for record, repeat in zip(plan.blocks, folded.full.blocks.repeats, strict=True):
        new = {"copies": whole.get(repeat.start, record.copies)}
        if repeat.kind == "scanned":
            stop = repeat.start + repeat.ops
            new = {"ops": int(alike[repeat.start : stop].sum())}
        found.append(record.model_copy(update=new))
    return tuple(found)
