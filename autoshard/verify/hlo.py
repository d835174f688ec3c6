"""Collectives of an HLO module: what runs how often, over which axes, how large."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

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

KINDS = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "permute",
    "collective-broadcast": "broadcast",
}
"""Opcodes of collectives, and the kinds of `plan.schema.Collective`."""

MOVES = frozenset(
    {"bitcast", "convert", "copy", "get-tuple-element", "reshape", "transpose"}
)
"""Opcodes that hand an operand on without looking at its numbers."""

_OP_NAME = re.compile(r'op_name="([^"]*)"')
_COPIES = {"copy-start", "copy-done"}
_HANDS_ON = MOVES - {"convert"} | _COPIES
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
        dtype: Element type that is moved, in XLA's words.
        fed_by: `(name, element)` of a collective whose result it takes as it is.
        unconverted: Bytes it would move in the type that it was converted from just
            before; 0 where it was not, -1 where that type is not seen.
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
    dtype: str = ""
    fed_by: tuple[str, int] | None = None
    unconverted: int = 0
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
        named = self.named(computation, instruction, names[0])
        common = Emitted(
            kind=KINDS[opcode],
            axes=axes,
            bytes_=0,
            count=1,
            op_name=_op_name(named),
            source=self.module.source(named.attributes),
            name=instruction.name,
            dtype=results[0][0],
            fed_by=_feeder(computation, names[0]),
            groups=groups,
        )
        if opcode.endswith("all-to-all"):
            # As a tuple it holds one piece per device of the group.
            whole = sum(bytes_of(arrays) for arrays in operands)
            yield replace(common, bytes_=max(whole, bytes_of(results)))
            return
        for k, (given, made) in enumerate(zip(operands, results, strict=True)):
            own = (
                _part(computation, instruction, k) if len(operands) > 1 else instruction
            )
            if not _op_name(own) and len(operands) > 1:
                own = self.named(computation, own, names[k])
            makers = list(self.makers(computation, names[k], MOVES | _COPIES))
            yield replace(
                common,
                op_name=_op_name(own) or _of_several(common.op_name, k, len(operands)),
                source=self.module.source(own.attributes) or common.source,
                used_by=_used_by(computation, own),
                # On TPUs a sum may convert what it takes: its result is what counts.
                bytes_=max(bytes_of(((made[0], d[1]),)) for d in (*given, made)),
                element=k,
                elements=len(operands),
                dtype=made[0],
                fed_by=_feeder(computation, names[k]),
                unconverted=self.unconverted(computation, names[k], made)
                or -_of_convert(_op_name(own) or common.op_name),
                padded=any(m.opcode in _PADS for _, m in makers),
                taken_bytes=bytes_of(given) if given[0][0] != made[0] else 0,
                looped=any(m.opcode == "while" for _, m in makers),
                added=any(m.opcode == "add" for _, m in makers),
                sliced=self.sliced(computation, instruction, k, len(operands)),
            )

    @cached_property
    def callers(self) -> dict[str, tuple[Computation, Instruction]]:
        """Who runs each computation that a single instruction runs."""
        found: dict[str, list[tuple[Computation, Instruction]]] = {}
        for computation in self.module.computations.values():
            for instruction in computation.instructions.values():
                for called in instruction.called:
                    found.setdefault(called, []).append((computation, instruction))
        return {name: by[0] for name, by in found.items() if len(by) == 1}

    def makers(
        self, computation: Computation, name: str, through: frozenset[str]
    ) -> Iterator[tuple[Computation, Instruction]]:
        """The op that made a value, found through those that hand it on.

        Fusions are looked into, and what a loop only hands on is looked for before it.
        """
        element = None
        while (made := computation.instructions.get(name)) is not None:
            if made.opcode == "get-tuple-element":
                element = int(made.attribute("index"))
                name = made.operands[0]
            elif made.opcode == "tuple" and element is not None:
                name, element = made.operands[element], None
            elif made.opcode == "fusion":
                computation = self.module.computations[made.called[0]]
                root = computation.root
                many = root.opcode == "tuple" and element is not None
                name = root.operands[element or 0] if many else root.name
                element = None
            elif made.opcode == "parameter":
                caller = self.callers.get(computation.name)
                if caller is None:
                    return
                inside, (computation, call) = computation, caller
                if call.opcode == "fusion":
                    name = call.operands[int(made.operands[0])]
                elif call.opcode == "while" and _handed_on(inside, made, element):
                    name = call.operands[0]
                else:
                    return
            elif made.opcode in through and made.operands:
                name = made.operands[0]
            else:
                yield computation, made
                return

    def named(
        self, computation: Computation, made: Instruction, operand: str
    ) -> Instruction:
        """What says where a collective comes from: itself, or what makes its operand."""
        if _OP_NAME.search(made.attributes):
            return made
        while (before := computation.instructions.get(operand)) is not None:
            if _OP_NAME.search(before.attributes):
                return before
            if before.opcode not in MOVES or not before.operands:
                break
            operand = before.operands[0]
        return made

    def unconverted(
        self, computation: Computation, name: str, moved: tuple[str, tuple[int, ...]]
    ) -> int:
        """Bytes of `moved` in the type it was converted from, 0 if it was not."""
        for inside, maker in self.makers(computation, name, _HANDS_ON):
            before = inside.instructions.get(maker.operands[0])
            if maker.opcode == "convert" and before is not None:
                return bytes_of(((before.arrays[0][0], moved[1]),))
        return 0

    def sliced(
        self, computation: Computation, made: Instruction, element: int, elements: int
    ) -> bool:
        """Whether every use of a result starts by cutting a slice out of it."""
        pending = list(computation.users.get(made.name, ()))
        if elements > 1:
            pending = [u for u in pending if u.attribute("index") == str(element)]
        seen = {made.name}
        cut = False
        while pending:
            user = pending.pop()
            if user.name in seen or user.name not in computation.live:
                continue
            if user.opcode == "dynamic-slice":
                cut = True
            elif user.opcode in MOVES or user.opcode.endswith("-done"):
                if user.root:
                    return False
                seen.add(user.name)
                pending += computation.users.get(user.name, ())
            elif user.opcode == "fusion":
                inside = self.module.computations[user.called[0]]
                slots = [k for k, o in enumerate(user.operands) if o in seen]
                if not all(_slot_sliced(inside, slot) for slot in slots):
                    return False
                cut = True
            else:
                return False
        return cut


def _op_name(instruction: Instruction) -> str:
    return "".join(_OP_NAME.findall(instruction.attributes)[:1])


def _handed_on(
    body: Computation, parameter: Instruction, element: int | None
) -> bool:
    """Whether a loop leaves an element of its tuple as it is."""
    root = body.root
    if element is None or root.opcode != "tuple":
        return False
    after = body.instructions.get(root.operands[element])
    if after is None or after.opcode != "get-tuple-element":
        return False
    same = after.operands[0] == parameter.name
    return same and after.attribute("index") == str(element)


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


def _part(computation: Computation, made: Instruction, element: int) -> Instruction:
    """What takes one array out of several: it carries the name of its own op."""
    for user in computation.users.get(made.name, ()):
        if user.attribute("index") == str(element):
            return user
    return replace(made, attributes="")


def _used_by(computation: Computation, made: Instruction) -> str:
    for _ in range(len(computation.instructions)):
        users = computation.users.get(made.name, [])
        if len(users) != 1 or users[0].opcode not in MOVES | {"dynamic-slice"}:
            return _op_name(users[0]) if users else ""
        made = users[0]
    return ""


def _feeder(computation: Computation, name: str) -> tuple[str, int] | None:
    element = 0
    while (instruction := computation.instructions.get(name)) is not None:
        opcode = instruction.opcode.removesuffix("-start").removesuffix("-done")
        if opcode in KINDS and not instruction.opcode.endswith("-done"):
            return instruction.name, element
        if instruction.opcode == "get-tuple-element":
            element = int(instruction.attribute("index"))
        elif opcode not in MOVES | {"dynamic-slice"} and opcode not in KINDS:
            return None
        name = instruction.operands[0]
    return None


def _slot_sliced(inside: Computation, slot: int) -> bool:
    pending = [inside.parameters()[slot]]
    while pending:
        for user in inside.users.get(pending.pop().name, ()):
            if user.opcode in MOVES:
                pending.append(user)
            elif user.opcode != "dynamic-slice":
                return False
    return True
