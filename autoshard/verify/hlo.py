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
        pieces = self.pieces(computation, names[0]) if len(names) == 1 else []
        for k, (inside, name) in enumerate(pieces):
            piece = inside.instructions[name]
            own = self.named(inside, replace(piece, attributes=""), name)
            makers = list(self.makers(inside, name, MOVES | _COPIES))
            yield replace(
                common,
                op_name=_op_name(own),
                source=self.module.source(own.attributes),
                bytes_=bytes_of(piece.arrays),
                element=k,
                elements=len(pieces),
                unconverted=self.unconverted(inside, name, piece.arrays[0]),
                padded=any(m.opcode in _PADS for _, m in makers),
                looped=any(m.opcode == "while" for _, m in makers),
                added=any(_adds(at, m) for at, m in makers),
                fed_by=_feeder(inside, name),
            )
        if pieces:
            return
        for k, (given, made) in enumerate(zip(operands, results, strict=True)):
            own = (
                _part(computation, instruction, k) if len(operands) > 1 else instruction
            )
            several = _of_several(common.op_name, k, len(operands))
            if not _op_name(own) and len(operands) > 1 and several == common.op_name:
                own = self.named(computation, own, names[k])
            makers = list(self.makers(computation, names[k], MOVES | _COPIES))
            yield replace(
                common,
                op_name=_op_name(own) or several,
                source=self.module.source(own.attributes) or common.source,
                used_by=_used_by(computation, own),
                users=self.users(computation, instruction, k, len(operands)),
                # On TPUs a sum may convert what it takes: its result is what counts.
                bytes_=max(bytes_of(((made[0], d[1]),)) for d in (*given, made)),
                element=k,
                elements=len(operands),
                dtype=made[0],
                fed_by=_feeder(computation, names[k]),
                unconverted=self.unconverted(
                    computation, names[k], max(*given, made, key=lambda a: prod(a[1]))
                )
                or -_of_convert(_op_name(own) or common.op_name),
                padded=any(m.opcode in _PADS for _, m in makers),
                converted=self.converted(computation, instruction, k, made),
                taken_bytes=bytes_of(given) if given[0][0] != made[0] else 0,
                looped=any(m.opcode == "while" for _, m in makers),
                added=any(_adds(inside, m) for inside, m in makers),
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
        self,
        computation: Computation,
        name: str,
        through: frozenset[str],
        *,
        same_type: bool = False,
    ) -> Iterator[tuple[Computation, Instruction]]:
        """The op that made a value, found through those that hand it on.

        Fusions are looked into, and what a loop only hands on is looked for before it.
        On TPUs a copy may convert; with `same_type` it is an op then.
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
                before = computation.instructions.get(made.operands[0])
                if same_type and before is not None and _retypes(made, before):
                    yield computation, made
                    return
                name = made.operands[0]
            else:
                yield computation, made
                return

    def pieces(
        self, computation: Computation, name: str
    ) -> list[tuple[Computation, str]]:
        """What XLA has laid end to end to move it as one; nothing if it has not.

        Its own concatenation is of flat arrays, and has no name of an op.
        """
        for inside, made in self.makers(computation, name, MOVES | _COPIES):
            flat = len(made.arrays[0][1]) == 1
            if made.opcode != "concatenate" or not flat or _op_name(made):
                return []
            return [self.outside(inside, operand) for operand in made.operands]
        return []

    def outside(self, computation: Computation, name: str) -> tuple[Computation, str]:
        """Where a value that a fusion takes as it is comes from."""
        made = computation.instructions[name]
        while made.opcode in MOVES and made.operands:
            made = computation.instructions[made.operands[0]]
        caller = self.callers.get(computation.name)
        if made.opcode != "parameter" or caller is None or caller[1].opcode != "fusion":
            return computation, name
        return caller[0], caller[1].operands[int(made.operands[0])]

    def named(
        self, computation: Computation, made: Instruction, operand: str
    ) -> Instruction:
        """What says where a collective comes from: it, or what makes its operand."""
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
        for inside, maker in self.makers(computation, name, _HANDS_ON, same_type=True):
            before = inside.instructions.get(maker.operands[0])
            converts = maker.opcode in _HANDS_ON | {"convert"}
            if converts and before is not None:
                return bytes_of(((before.arrays[0][0], moved[1]),))
        return 0

    def users(
        self, computation: Computation, made: Instruction, element: int, elements: int
    ) -> frozenset[str]:
        """Names of the ops that take a result, through those that hand it on."""
        found: set[str] = set()
        whole = None if elements == 1 else element
        pending, seen = [(made, whole)], set()
        while pending:
            at, part = pending.pop()
            for user in computation.users.get(at.name, ()):
                if user.opcode == "get-tuple-element":
                    if part in (None, int(user.attribute("index"))):
                        pending.append((user, None))
                    continue
                if user.opcode.endswith("-done"):
                    pending.append((user, part))
                    continue
                if user.name in seen:
                    continue
                seen.add(user.name)
                found.update(_op_names(self.module, user))
                if user.opcode in MOVES | _COPIES:
                    pending.append((user, None))
                elif user.opcode == "fusion":
                    inside = self.module.computations[user.called[0]]
                    slots = [k for k, o in enumerate(user.operands) if o == at.name]
                    outs = {out for slot in slots for out in _outputs(inside, slot)}
                    many = inside.root.opcode == "tuple"
                    pending += [(user, out if many else None) for out in outs]
        return frozenset(found)

    def converted(
        self,
        computation: Computation,
        made: Instruction,
        element: int,
        result: tuple[str, tuple[int, ...]],
    ) -> int:
        """Bytes of a result in the type that every use converts it to, else 0."""
        types: set[str] = set()
        started = made.opcode.endswith("-start")
        for user in computation.users.get(made.name, ()):
            if started:  # its result is that of what ends it
                types |= _types_used(self.module, computation, user, element)
            elif user.opcode == "get-tuple-element":
                if user.attribute("index") == str(element):
                    types |= _types_used(self.module, computation, user, None)
            else:
                types |= _used_as(self.module, computation, user, made.name)
        if len(types) != 1 or types <= {"", result[0]}:
            return 0
        return bytes_of(((types.pop(), result[1]),))

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


def _types_used(
    module: Module, computation: Computation, made: Instruction, element: int | None
) -> set[str]:
    """Element types that a value is converted to by its uses; "" by one that is not."""
    found: set[str] = set()
    for user in computation.users.get(made.name, ()):
        if user.opcode == "get-tuple-element":
            if element in (None, int(user.attribute("index"))):
                found |= _types_used(module, computation, user, None)
        else:
            found |= _used_as(module, computation, user, made.name)
    return found


def _used_as(
    module: Module, computation: Computation, user: Instruction, name: str
) -> set[str]:
    if user.opcode == "convert":
        return {user.arrays[0][0]}
    if user.opcode in MOVES:
        return _types_used(module, computation, user, None)
    if user.opcode == "fusion":
        inside = module.computations[user.called[0]]
        slots = [k for k, o in enumerate(user.operands) if o == name]
        parameters = inside.parameters()
        return {
            t for k in slots for t in _types_used(module, inside, parameters[k], None)
        }
    return {""}


def _adds(computation: Computation, made: Instruction) -> bool:
    """Whether an op adds two values, the second perhaps at some indices only."""
    if made.opcode != "scatter":
        return made.opcode == "add"
    onto = computation.instructions.get(made.operands[0])
    while onto is not None and onto.opcode in MOVES and onto.operands:
        onto = computation.instructions.get(onto.operands[0])
    return onto is not None and onto.opcode not in ("broadcast", "constant")


def _retypes(made: Instruction, before: Instruction) -> bool:
    types = {dtype for dtype, _ in made.arrays[:1] + before.arrays[:1]}
    return len(types) > 1 and made.opcode in ("copy", "bitcast", "reshape", "transpose")


def _handed_on(body: Computation, parameter: Instruction, element: int | None) -> bool:
    """Whether a loop leaves an element of its tuple as it is."""
    root = body.root
    if element is None or root.opcode != "tuple":
        return False
    after = body.instructions.get(root.operands[element])
    while after is not None and after.opcode in _COPIES | {"copy", "bitcast"}:
        after = body.instructions.get(after.operands[0])
    if after is None or after.opcode != "get-tuple-element":
        return False
    same = after.operands[0] == parameter.name
    return same and after.attribute("index") == str(element)


def _of_convert(op_name: str) -> bool:
    """Whether a collective has the name of a conversion, which XLA moved before it."""
    return op_name.endswith("/convert_element_type")


def _op_names(module: Module, instruction: Instruction) -> list[str]:
    """Its name and, of a fusion, those of the ops in it."""
    names = [_op_name(instruction)]
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called[0]]
        names += [_op_name(i) for i in inside.instructions.values()]
    return [name for name in names if name]


def _outputs(inside: Computation, slot: int) -> set[int]:
    """Which results of a fusion are one of its operands, at most converted."""
    found: set[int] = set()
    pending = [inside.parameters()[slot]]
    while pending:
        made = pending.pop()
        if made.root:
            found.add(0)
        for user in inside.users.get(made.name, ()):
            if user.opcode == "tuple" and user.root:
                found |= {k for k, o in enumerate(user.operands) if o == made.name}
            elif user.opcode in MOVES:
                pending.append(user)
    return found


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
