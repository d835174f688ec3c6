"""The addresses of a whole step, by those of the step of few copies of a block.

An ordinal of an address counts the ops before it, so it follows from how many there are
of each: those of a copy that was left out come between those of its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from autoshard.ir._jaxcompat import LITERAL, open_jaxpr
from autoshard.ir.few import param_in
from autoshard.ir.stretch import NotAlikeError, Stretch

_NUMBER = re.compile(r"(?:#|:in|:out|:carry)(\d+)")

_OPERAND = re.compile(r"(.*:in)\d+")

Copy = tuple[int, int]
"""Number of a line, and place in its chain."""


class Addresses:
    """The addresses of the whole program, by those of the program of few copies."""

    def __init__(self, stretch: Stretch) -> None:
        traced = stretch.folded.full
        program = traced.program
        self.lines = stretch.lines
        self.places = [{k: p for p, k in enumerate(line.whole)} for line in self.lines]
        copy_of: dict[int, Copy] = {}
        for n, line in enumerate(self.lines):
            found = line.chain
            for p in range(found.count):
                begin = found.start + p * found.period
                copy_of.update((begin + k, (n, p)) for k in range(found.period))
        # An address up to each of its numbers: its first op, and the copies it is in.
        self.first: dict[str, int] = {}
        self.copies: dict[str, set[Copy | None]] = {}
        self.groups: dict[tuple[str, str], dict[int, str]] = {}
        for op in program.ops:
            parent = ""
            for match in _NUMBER.finditer(op.address):
                head = op.address[: match.end()]
                text = op.address[len(parent) : match.start(1)]
                self.first.setdefault(head, op.index)
                self.copies.setdefault(head, set()).add(copy_of.get(op.index))
                self.groups.setdefault((parent, text), {})[int(match[1])] = head
                parent = head
        self.equation = {
            match[1]: op.equation
            for op in program.ops
            if (match := _OPERAND.fullmatch(op.address))
        }
        self.times = _times(stretch, copy_of)
        self.known: dict[str, dict[int, str]] = {}
        self.done: set[tuple[str, str]] = set()

    def of(self, address: str) -> dict[int, str]:
        """The addresses in the whole program, by copy that was left out.

        Of the op itself, or of its copy that was kept, it is under -1.
        """
        parent = ""
        found = {-1: ""}
        for match in _NUMBER.finditer(address):
            head, text = address[: match.end()], address[len(parent) : match.start(1)]
            if (parent, text) not in self.done:
                self._number(parent, text)
            parent, found = head, self.known[head]
        tail = address[len(parent) :]
        return {copy: name + tail for copy, name in found.items()} if tail else found

    def _copy(self, head: str) -> Copy | None:
        copies = self.copies[head]
        return next(iter(copies)) if len(copies) == 1 else None

    def _number(self, parent: str, text: str) -> None:
        """Numbers one kind of address under another one."""
        self.done.add((parent, text))
        above = self.known.get(parent, {-1: ""})
        inside = self._copy(parent) if parent else None
        heads = self.groups[parent, text]
        if inside is not None:
            for number, head in heads.items():
                self.known[head] = {
                    copy: f"{name}{text}{number}" for copy, name in above.items()
                }
            return
        (name,) = above.values()
        entries: list[tuple[tuple[int, int, int], str | None, int]] = []
        before: tuple[int, int, int] = (-1, -1, -1)
        for number in range(max(heads) + 1):
            head = heads.get(number)
            if head is None:
                # What a loop only reads has no address, but a number.
                copy = self._between(heads, number)
                first = before[0]
                if copy is None and text.endswith(":in"):
                    atom = self.equation[parent + text].invars[number]
                    again = self.times.get(atom, 0) if type(atom) is not LITERAL else 0
                    entries += [((first, -1, number), None, -1)] * again
            else:
                copy = self._copy(head)
                first = self.first[head]
            if copy is None:
                entries.append((before := (first, -1, number), head, -1))
                continue
            line = self.lines[copy[0]]
            start, own = line.chain.start, line.own[copy[1]]
            at = self.places[copy[0]]
            entries.append((before := (start, at[own], number), head, -1))
            if own == line.stack.stand:
                entries += [((start, at[k], number), head, k) for k in line.stack.gone]
        if [e[1] for e in sorted(e for e in entries if e[2] < 0 and e[1])] != [
            heads[number] for number in sorted(heads)
        ]:
            raise NotAlikeError(f"addresses {name}{text} are not in order")
        for number, (_, head, copy) in enumerate(sorted(entries, key=_first)):
            if head is not None:
                self.known.setdefault(head, {})[copy] = f"{name}{text}{number}"

    def _between(self, heads: Mapping[int, str], number: int) -> Copy | None:
        """The copy in which a number is missing."""
        low = max((n for n in heads if n < number), default=None)
        high = min(n for n in heads if n > number)
        if low is None:
            return None
        one, two = self._copy(heads[low]), self._copy(heads[high])
        if one is None or two is None or one[0] != two[0]:
            return None
        if one != two:
            raise NotAlikeError("addresses of copies are not numbered alike")
        return one


def _times(stretch: Stretch, copy_of: Mapping[int, Copy]) -> dict[Any, int]:
    """Per variable how many of it were left out, if it stands for them."""
    traced = stretch.folded.full
    stood = {
        row[stack.stand]: len(stack.gone)
        for stack in stretch.few.stacks
        for row in stack.paths
    }
    opened, _ = open_jaxpr(traced.jaxpr)
    found: dict[Any, int] = {}
    for var, info in zip(opened.invars, traced.inputs, strict=True):
        owner = param_in(info.path, stood)
        if owner is not None:
            found[var] = stood[owner]
    for index, (n, place) in copy_of.items():
        line, equation = stretch.lines[n], traced.program.ops[index].equation
        if line.own[place] == line.stack.stand and equation is not None:
            found.update(dict.fromkeys(equation.outvars, len(line.stack.gone)))
    return found


def _first(entry: tuple[tuple[int, int, int], str | None, int]) -> tuple[int, int, int]:
    return entry[0]
