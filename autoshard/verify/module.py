"""The text of an HLO module, taken apart into computations and instructions.

The text is what XLA dumps and what `compiled.as_text()` returns. A module is a list of
computations; a loop, a call, a branch or a fusion names the computations it runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from autoshard.ir.errors import InputError

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[^\]]*)\]")
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
_RESULT = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_OPCODE = re.compile(r"(?P<opcode>[\w\-]+)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_FILE_LINE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Without the percent sign.
        arrays: `(dtype, dims)` of each array of the result.
        opcode: Such as `all-reduce-start`.
        operands: Names, or the text of a constant.
        attributes: The rest of the line.
        root: Whether it is the result of its computation.
    """

    name: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Computations it names."""
        return tuple(
            name.strip().lstrip("%")
            for found in _CALLED.findall(self.attributes)
            for name in found.strip("{}").split(",")
            if name.strip()
        )

    def attribute(self, name: str) -> str:
        """Text of an attribute up to the comma that ends it, empty if there is none."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        if found is None:
            return ""
        rest, depth = self.attributes[found.end() :], 0
        for k, char in enumerate(rest):
            depth += (char in "([{") - (char in ")]}")
            if char == "," and depth == 0 and not rest.startswith(", device_ids", k):
                return rest[:k]
        return rest


def bytes_of(arrays: tuple[tuple[str, tuple[int, ...]], ...]) -> int:
    """Bytes of some arrays, four-bit numbers packed.

    >>> bytes_of((("bf16", (4, 3)), ("s4", (3,))))
    26
    """
    return sum((_bits(dtype) * prod(dims) + 7) // 8 for dtype, dims in arrays)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    if digits is None:
        raise InputError(f"HLO element type {dtype!r} is not known.")
    return int(digits[1])


@dataclass
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def add(self, instruction: Instruction) -> None:
        """Appends an instruction; `t#1` among its operands is element 1 of `t`."""
        for operand in instruction.operands:
            base, _, index = operand.rpartition("#")
            whole = self.instructions.get(base)
            if whole is not None and operand not in self.instructions:
                self.instructions[operand] = Instruction(
                    name=operand,
                    arrays=whole.arrays[int(index) : int(index) + 1],
                    opcode="get-tuple-element",
                    operands=(base,),
                    attributes=f"index={index}",
                    root=False,
                )
        self.instructions[instruction.name] = instruction

    @cached_property
    def root(self) -> Instruction:
        """Its result."""
        return next(i for i in self.instructions.values() if i.root)

    @cached_property
    def live(self) -> set[str]:
        """What its result depends on; right after a pass there is more."""
        found: set[str] = set()
        pending = [self.root.name]
        while pending:
            name = pending.pop()
            if name not in found and name in self.instructions:
                found.add(name)
                pending += self.instructions[name].operands
        return found

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who takes each instruction as an operand."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                found.setdefault(operand, []).append(instruction)
        return found

    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {
            int(i.operands[0]): i
            for i in self.instructions.values()
            if i.opcode == "parameter"
        }


class Module:
    """A parsed HLO module.

    Args:
        text: The module.

    Raises:
        InputError: The text has no entry computation.

    >>> module = Module('''HloModule m
    ...
    ... ENTRY %main (p: f32[8]) -> f32[8] {
    ...   %p = f32[8]{0} parameter(0)
    ...   ROOT %n = f32[8]{0} negate(%p)
    ... }
    ... ''')
    >>> module.computations[module.entry].root.opcode
    'negate'
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self._tables: dict[str, dict[int, str]] = {}
        self._read(text)
        if not self.entry:
            raise InputError(
                "the text is no HLO module: it has no ENTRY computation. Pass what "
                "compiled.as_text() returns or what XLA dumps as text."
            )

    def _read(self, text: str) -> None:
        current: Computation | None = None
        table = ""
        for line in text.splitlines():
            if current is not None:
                if line.startswith("}"):
                    current = None
                elif (instruction := _instruction(line)) is not None:
                    current.add(instruction)
            elif (match := _COMPUTATION.match(line)) is not None:
                current = Computation(match["name"])
                self.computations[match["name"]] = current
                if match["entry"]:
                    self.entry = match["name"]
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = line
            elif table and line[:1].isdigit():
                number, _, rest = line.partition(" ")
                self._tables.setdefault(table, {})[int(number)] = rest

    def trips(self, loop: Instruction, computation: Computation) -> int | None:
        """Trip count of a `while`, or None when it is not fixed.

        After optimization XLA writes it down; before, it follows from the condition
        `counter < bound`, the counter's first value and its step.
        """
        known = _TRIPS.search(loop.attributes)
        if known is not None:
            return int(known[1])
        condition = self.computations[loop.attribute("condition").lstrip("%")]
        body = self.computations[loop.attribute("body").lstrip("%")]
        test = condition.root
        directions = {"LT": 0, "LE": 1, "GT": 0, "GE": -1}
        direction = test.attribute("direction")
        if test.opcode != "compare" or direction not in directions:
            return None
        start = computation.instructions.get(loop.operands[0])
        if start is None or start.opcode != "tuple":
            return None
        counter = _element(condition, test.operands[0])
        bound = _constant(condition, test.operands[1])
        if bound is None:
            at = _element(condition, test.operands[1])
            if at is not None and _element(body, body.root.operands[at]) == at:
                bound = _constant(computation, start.operands[at])
        if counter is None or bound is None:
            return None
        first = _constant(computation, start.operands[counter])
        step = _step(body, counter)
        if first is None or not step or (step > 0) != (direction[0] == "L"):
            return None
        return max(0, -((first - bound - directions[direction]) // step))

    def source(self, attributes: str) -> str:
        """`file:line` of an instruction, from its attributes; empty if not known."""
        plain = _FILE_LINE.search(attributes)
        if plain is not None:
            return f"{plain[1]}:{plain[2]}"
        frame = _FRAME.search(attributes)
        return self.frames(int(frame[1]))[0] if frame else ""

    def frames(self, number: int) -> list[str]:
        """`file:line` of a stack frame and of its callers, innermost first."""
        found = []
        while number > 0:
            frame = self._fields("StackFrames", number)
            place = self._fields("FileLocations", frame.get("file_location_id", 0))
            names = self._tables.get("FileNames", {})
            file = names.get(place.get("file_name_id", 0), "").strip().strip('"')
            if file:
                found.append(f"{file}:{place['line']}")
            # Written one higher than the frame it means.
            number = frame.get("parent_frame_id", 1) - 1
        return found or [""]

    def _fields(self, table: str, number: int) -> dict[str, int]:
        text = self._tables.get(table, {}).get(number, "")
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", text)}


def _instruction(line: str) -> Instruction | None:
    head = _RESULT.match(line)
    if head is None:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    arrays = tuple(
        (dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(rest[:end])
    )
    match = _OPCODE.search(rest, end)
    if match is None:
        return None
    close = match.end() - 1 + _closing(rest[match.end() - 1 :])
    inner = rest[match.end() : close]
    operands = re.findall(r"%([\w.\-]+(?:#\d+)?)", inner)
    if not operands:  # a constant, a parameter's number, or names without a sign
        operands = [part.split(" ")[-1] for part in inner.split(", ") if part]
    return Instruction(
        name=head["name"],
        arrays=arrays,
        opcode=match["opcode"],
        operands=tuple(operands),
        attributes=rest[close + 1 :].lstrip(", "),
        root=bool(head["root"]),
    )


def _closing(text: str) -> int:
    """Position of the parenthesis that closes the one `text` starts with."""
    depth = 0
    for k, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return k
    return len(text) - 1


def _follow(computation: Computation, name: str) -> Instruction | None:
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.opcode in ("copy", "convert"):
        instruction = computation.instructions.get(instruction.operands[0])
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    instruction = _follow(computation, name)
    if instruction is None or instruction.opcode != "constant":
        return None
    text = instruction.operands[0] if instruction.operands else ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _element(computation: Computation, name: str) -> int | None:
    """Which element of the loop's tuple a value is."""
    instruction = _follow(computation, name)
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(instruction.attribute("index"))


def _step(body: Computation, counter: int) -> int | None:
    """What a loop adds to its counter."""
    if body.root.opcode != "tuple":
        return None
    after = _follow(body, body.root.operands[counter])
    if after is None or after.opcode not in ("add", "subtract"):
        return None
    if _element(body, after.operands[0]) != counter:
        return None
    step = _constant(body, after.operands[1])
    return -step if step is not None and after.opcode == "subtract" else step
