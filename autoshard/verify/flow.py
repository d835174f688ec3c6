"""Where the values of an HLO module come from, and where they go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from autoshard.verify.module import Computation, Instruction, Module, bytes_of

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

COPIES = frozenset({"copy-start", "copy-done"})
"""Opcodes of a copy that runs beside other ops."""

OP_NAME = re.compile(r'op_name="([^"]*)"')
_HANDS_ON = MOVES - {"convert"} | COPIES


@dataclass(frozen=True)
class Flow:
    """Follows values through a module: its loops, fusions and copies.

    Args:
        module: The module.
    """

    module: Module

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
        for inside, made in self.makers(computation, name, MOVES | COPIES):
            flat = len(made.arrays[0][1]) == 1
            if made.opcode != "concatenate" or not flat or op_name_of(made):
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
        if OP_NAME.search(made.attributes):
            return made
        while (before := computation.instructions.get(operand)) is not None:
            if OP_NAME.search(before.attributes):
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
                if user.opcode in MOVES | COPIES:
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


def op_name_of(instruction: Instruction) -> str:
    """Name stack and primitive that an instruction was made for, or nothing."""
    return "".join(OP_NAME.findall(instruction.attributes)[:1])


def part_of(computation: Computation, made: Instruction, element: int) -> Instruction:
    """What takes one array out of several: it carries the name of its own op."""
    for user in computation.users.get(made.name, ()):
        if user.attribute("index") == str(element):
            return user
    return replace(made, attributes="")


def used_by(computation: Computation, made: Instruction) -> str:
    """Name of the op that takes a result, found through those that hand it on."""
    for _ in range(len(computation.instructions)):
        users = computation.users.get(made.name, [])
        if len(users) != 1 or users[0].opcode not in MOVES | {"dynamic-slice"}:
            return op_name_of(users[0]) if users else ""
        made = users[0]
    return ""


def feeder(computation: Computation, name: str) -> tuple[str, int] | None:
    """The collective whose result a value is, at most cut or converted."""
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


def adds(computation: Computation, made: Instruction) -> bool:
    """Whether an op adds two values, the second perhaps at some indices only."""
    if made.opcode != "scatter":
        return made.opcode == "add"
    onto = computation.instructions.get(made.operands[0])
    while onto is not None and onto.opcode in MOVES and onto.operands:
        onto = computation.instructions.get(onto.operands[0])
    return onto is not None and onto.opcode not in ("broadcast", "constant")


def _op_names(module: Module, instruction: Instruction) -> list[str]:
    """Its name and, of a fusion, those of the ops in it."""
    names = [op_name_of(instruction)]
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called[0]]
        names += [op_name_of(i) for i in inside.instructions.values()]
    return [name for name in names if name]


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


def _retypes(made: Instruction, before: Instruction) -> bool:
    types = {dtype for dtype, _ in made.arrays[:1] + before.arrays[:1]}
    return len(types) > 1 and made.opcode in ("copy", "bitcast", "reshape", "transpose")


def _handed_on(body: Computation, parameter: Instruction, element: int | None) -> bool:
    """Whether a loop leaves an element of its tuple as it is."""
    root = body.root
    if element is None or root.opcode != "tuple":
        return False
    after = body.instructions.get(root.operands[element])
    while after is not None and after.opcode in COPIES | {"copy", "bitcast"}:
        after = body.instructions.get(after.operands[0])
    if after is None or after.opcode != "get-tuple-element":
        return False
    same = after.operands[0] == parameter.name
    return same and after.attribute("index") == str(element)


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


def _slot_sliced(inside: Computation, slot: int) -> bool:
    pending = [inside.parameters()[slot]]
    while pending:
        for user in inside.users.get(pending.pop().name, ()):
            if user.opcode in MOVES:
                pending.append(user)
            elif user.opcode != "dynamic-slice":
                return False
    return True
