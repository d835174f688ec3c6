"""Collectives of an HLO module: what runs how often, over which axes, how large."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from autoshard.verify.flow import (
    COPIES,
    KINDS,
    MOVES,
    Flow,
    adds,
    feeder,
    op_name_of,
    part_of,
    used_by,
)
from autoshard.verify.groups import (
    axes_of_groups,
    axes_of_pairs,
    parse_groups,
    parse_pairs,
)
from autoshard.verify.module import (
    Computation,
    Instruction,
    Module,
    bytes_of,
)

_PADS = ("dynamic-update-slice", "pad")
_STARTS = 'custom_call_target="AsyncCollectiveStart"'


@dataclass(frozen=True, slots=True)
class Emitted:
    """A collective that the compiler emitted; an element of one that holds several.

    Attributes:
        kind: As in `plan.schema.Collective`, or `broadcast`.
        axes: Mesh axes, see `groups.axes_of_groups`.
        bytes_: Bytes of the larger of input and output on one device, one run.
        count: Runs per call of the program; 0 in a branch that costs less than another.
        op_name: Name stack and primitive that it was made for, mostly the op before it.
        used_by: The same of the op that takes its result.
        source: The user's `file:line`.
        name: Of the instruction.
        element: Which of the arrays it moves; 0 if there is one.
        elements: How many arrays it moves.
        users: The names of all ops that take its result, or a conversion of it.
        dtype: Element type that is moved, in XLA's words.
        fed_by: `(name, element)` of a collective whose result it takes as it is.
        unconverted: Bytes it would move in the type that it was converted from just
            before; 0 where it was not, -1 where that type is not seen.
        converted: Bytes of its result in the type that all its uses convert it to; 0
            where they do not.
        taken_bytes: Bytes of what it takes, where its result is of another type.
        padded: Whether what it moves is a part, set into an array of zeros.
        looped: Whether what it moves is made by a loop.
        added: Whether what it moves is the sum of two values on each device.
        sliced: Whether a device keeps only a slice of the result.
        groups: The devices, as XLA wrote them.
        bounded: Whether the trip counts of all loops around it are known; else an
            unknown one was taken for 1.
    """

    kind: str
    axes: tuple[str, ...]
    bytes_: int
    count: int
    op_name: str
    source: str
    name: str
    element: int = 0
    elements: int = 1
    used_by: str = ""
    users: frozenset[str] = frozenset()
    dtype: str = ""
    fed_by: tuple[str, int] | None = None
    unconverted: int = 0
    converted: int = 0
    taken_bytes: int = 0
    padded: bool = False
    added: bool = False
    looped: bool = False
    sliced: bool = False
    groups: str = ""
    bounded: bool = True

    @property
    def total_bytes(self) -> int:
        """Bytes of all runs."""
        return self.bytes_ * self.count


def collectives(module: Module, sizes: dict[str, int]) -> tuple[Emitted, ...]:
    """Every collective of a module, one entry per array that it moves.

    Args:
        module: The parsed module.
        sizes: Size of each mesh axis in the order of the device layout.

    Raises:
        InputError: Groups of devices in a form that is not known.

    >>> module = Module('''HloModule m, num_partitions=4
    ...
    ... ENTRY %main (p: f32[8]) -> f32[32] {
    ...   %p = f32[8]{0} parameter(0)
    ...   ROOT %g = f32[32]{0} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={0}
    ... }
    ... ''')
    >>> [(c.kind, c.axes, c.bytes_) for c in collectives(module, {"tensor": 4})]
    [('all_gather', ('tensor',), 128)]
    """
    return tuple(_Reader(module, sizes).run(module.entry))


@dataclass(frozen=True)
class _Reader:
    module: Module
    sizes: dict[str, int]

    @cached_property
    def flow(self) -> Flow:
        """Where its values come from and go to."""
        return Flow(self.module)

    @cached_property
    def started(self) -> dict[str, str]:
        """Channels of collectives that TPUs run beside other ops, by where they start.

        Their text is repeated in every fusion that runs beside them, and at the end.
        """
        return {
            instruction.attribute("channel_id"): computation.name
            for computation in self.module.computations.values()
            if any(_STARTS in i.attributes for i in computation.instructions.values())
            for instruction in computation.instructions.values()
            if instruction.opcode in KINDS
        }

    def repeated(self, instruction: Instruction, computation: Computation) -> bool:
        """Whether it only names a collective that was started elsewhere."""
        channel = instruction.attribute("channel_id")
        start = self.started.get(channel, computation.name) if channel else ""
        return bool(channel) and start != computation.name

    def run(self, name: str) -> Iterator[Emitted]:
        """Collectives of one run of a computation and of all that it calls."""
        computation = self.module.computations[name]
        for instruction in computation.instructions.values():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode in KINDS and not self.repeated(instruction, computation):
                yield from self.emitted(instruction, opcode, computation)
            elif opcode == "while":
                trips = self.module.trips(instruction, computation)
                for inner in self.run(instruction.attribute("body").lstrip("%")):
                    yield replace(
                        inner,
                        count=inner.count * (1 if trips is None else trips),
                        bounded=inner.bounded and trips is not None,
                    )
            elif opcode == "conditional":
                yield from self.branches(instruction)
            elif not opcode.endswith("-done"):
                for called in instruction.called:
                    yield from self.run(called)

    def branches(self, conditional: Instruction) -> Iterator[Emitted]:
        """All branches; only the one that moves most bytes counts."""
        found = [list(self.run(name)) for name in conditional.called]
        totals = [sum(c.total_bytes for c in branch) for branch in found]
        taken = totals.index(max(totals))
        for k, branch in enumerate(found):
            for inner in branch:
                yield inner if k == taken else replace(inner, count=0)

    def emitted(
        self, instruction: Instruction, opcode: str, computation: Computation
    ) -> Iterator[Emitted]:
        """The arrays that one collective moves."""
        if opcode == "collective-permute":
            groups = instruction.attribute("source_target_pairs")
            axes = axes_of_pairs(parse_pairs(groups), self.sizes)
        else:
            groups = instruction.attribute("replica_groups") or "{}"
            devices = parse_groups(groups, prod(self.sizes.values()))
            axes = axes_of_groups(devices, self.sizes)
        if not axes:
            return  # every device talks to itself
        names = [o for o in instruction.operands if o in computation.instructions]
        if opcode == "collective-permute":
            names = names[:1]  # the others are buffers and offsets
        operands = [computation.instructions[o].arrays for o in names]
        results = instruction.arrays
        if instruction.opcode.endswith("-start") and opcode != "all-reduce":
            # `(operands, results, contexts)`; those of an all-reduce are its results.
            given = sum(len(arrays) for arrays in operands)
            results = results[given : 2 * given]
        named = self.flow.named(computation, instruction, names[0])
        common = Emitted(
            kind=KINDS[opcode],
            axes=axes,
            bytes_=0,
            count=1,
            op_name=op_name_of(named),
            source=self.module.source(named.attributes),
            name=instruction.name,
            dtype=results[0][0],
            fed_by=feeder(computation, names[0]),
            groups=groups,
        )
        if opcode.endswith("all-to-all"):
            # As a tuple it holds one piece per device of the group.
            whole = sum(bytes_of(arrays) for arrays in operands)
            yield replace(common, bytes_=max(whole, bytes_of(results)))
            return
        pieces = self.flow.pieces(computation, names[0]) if len(names) == 1 else []
        for k, (inside, name) in enumerate(pieces):
            piece = inside.instructions[name]
            own = self.flow.named(inside, replace(piece, attributes=""), name)
            makers = list(self.flow.makers(inside, name, MOVES | COPIES))
            yield replace(
                common,
                op_name=op_name_of(own),
                source=self.module.source(own.attributes),
                bytes_=bytes_of(piece.arrays),
                element=k,
                elements=len(pieces),
                unconverted=self.flow.unconverted(inside, name, piece.arrays[0]),
                padded=any(m.opcode in _PADS for _, m in makers),
                looped=any(m.opcode == "while" for _, m in makers),
                added=any(adds(at, m) for at, m in makers),
                fed_by=feeder(inside, name),
            )
        if pieces:
            return
        for k, (given, made) in enumerate(zip(operands, results, strict=True)):
            own = (
                part_of(computation, instruction, k)
                if len(operands) > 1
                else instruction
            )
            several = _of_several(common.op_name, k, len(operands))
            if not op_name_of(own) and len(operands) > 1 and several == common.op_name:
                own = self.flow.named(computation, own, names[k])
            makers = list(self.flow.makers(computation, names[k], MOVES | COPIES))
            yield replace(
                common,
                op_name=op_name_of(own) or several,
                source=self.module.source(own.attributes) or common.source,
                used_by=used_by(computation, own),
                users=self.flow.users(computation, instruction, k, len(operands)),
                # On TPUs a sum may convert what it takes: its result is what counts.
                bytes_=max(bytes_of(((made[0], d[1]),)) for d in (*given, made)),
                element=k,
                elements=len(operands),
                dtype=made[0],
                fed_by=feeder(computation, names[k]),
                unconverted=self.flow.unconverted(
                    computation, names[k], max(*given, made, key=lambda a: prod(a[1]))
                )
                or -_of_convert(op_name_of(own) or common.op_name),
                padded=any(m.opcode in _PADS for _, m in makers),
                converted=self.flow.converted(computation, instruction, k, made),
                taken_bytes=bytes_of(given) if given[0][0] != made[0] else 0,
                looped=any(m.opcode == "while" for _, m in makers),
                added=any(adds(inside, m) for inside, m in makers),
                sliced=self.flow.sliced(computation, instruction, k, len(operands)),
            )


def _of_convert(op_name: str) -> bool:
    """Whether a collective has the name of a conversion, which XLA moved before it."""
    return op_name.endswith("/convert_element_type")


def _of_several(op_name: str, element: int, elements: int) -> str:
    """Of the names `(a:b)` of ops that were combined, the one at `element`."""
    found = re.match(r"(.*?/)\((.*:.*)\)$", op_name)
    parts = found[2].split(":") if found else []
    if found and len(parts) == elements:
        return f"{found[1]}{parts[element]}"
    return op_name
