"""Seeds of a program, and the account of its annotations."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from jax.sharding import NamedSharding, Sharding

from autoshard.ir.annotations.calls import CONSTRAINT, RESHARD, Calls
from autoshard.ir.annotations.names import Dims, Words, spec_dims, split_names
from autoshard.ir.annotations.notes import Note, Reading
from autoshard.ir.program import Op, Program
from autoshard.ir.seeds import AnnotationReport, Count, Seed

OUT_SHARDING = "out_sharding"
DEVICE_PUT = "device_put"
JIT = "jit shardings"


@dataclass
class Account:
    """Collects seeds and counts.

    Attributes:
        words: Which names are mesh axes.
        seeds: What fixes mesh axes.
        reached: Per kind, the inputs and source lines that carry one.
        lost: Kind and sentence of each that has no effect.
    """

    words: Words
    seeds: list[Seed] = field(default_factory=list)
    reached: dict[str, set[Any]] = field(default_factory=lambda: defaultdict(set))
    lost: list[tuple[str, str]] = field(default_factory=list)

    def inputs(
        self, program: Program, paths: tuple[str, ...], notes: dict[int, list[Note]]
    ) -> None:
        """Makes seeds of what inputs carry in mesh axes."""
        for leaf, written in sorted(notes.items()):
            for note in written:
                if note.counted:
                    self.reached[note.kind].add(leaf)
                if note.dims is not None:
                    origin = f"{note.kind} of {paths[leaf]}"
                    value = program.inputs[leaf]
                    self._seed(value, note.dims, note.kind, origin)

    def _seed(self, value: int, dims: Dims, kind: str, origin: str) -> None:
        seed = Seed(value, dims, kind, origin)
        if seed not in self.seeds[-4:]:
            self.seeds.append(seed)

    def ops(self, program: Program) -> Program:
        """Makes seeds of the annotating equations.

        Returns:
            The program, with mesh axes taken out of the names of its annotations.
        """
        changed: dict[int, Op] = {}
        for op in program.ops:
            if op.primitive == "autoshard_annotate":
                if op.params["role"]:
                    continue
                names = self._annotated(op)
                if names != op.params["names"]:
                    params = {**op.params, "names": names}
                    changed[op.index] = replace(op, params=params)
            else:
                self._placed(op, program)
        if not changed:
            return program
        ops = tuple(changed.get(op.index, op) for op in program.ops)
        return replace(program, ops=ops)

    def _annotated(self, op: Op) -> Any:
        kind, names, dims = (op.params[k] for k in ("kind", "names", "mesh_axes"))
        line = op.source
        where = f"{kind} at {line or op.address}"
        self.reached[kind].add(line or op.address)
        if names is not None:
            names, dims = split_names(names, where, self.words)
            names = names if any(names) or dims is None else None
        if dims is not None:
            self._seed(op.outputs[0], dims, kind, where)
        return names

    def _placed(self, op: Op, program: Program) -> None:
        for kind, sharding, open_dims in _shardings(op):
            line = op.source or op.address
            where = f"{kind} at {line}"
            if not isinstance(sharding, NamedSharding):
                if sharding.num_devices > 1:
                    sentence = (
                        f"{where} asks for {sharding!r}, which names no mesh axes; "
                        "give it a PartitionSpec or a jax.sharding.NamedSharding."
                    )
                    self.lost.append((kind, sentence))
                continue
            if sharding.mesh.size == 1:
                continue
            self.reached[kind].add(line)
            rank = len(program.values[op.outputs[0]].shape)
            dims = spec_dims(sharding.spec, rank, where)
            dims = tuple(
                None if d in open_dims else axes for d, axes in enumerate(dims)
            )
            self._seed(op.outputs[0], dims, kind, where)

    def report(self, reading: Reading, calls: Calls) -> AnnotationReport:
        """What was found, what reached the jaxpr, and what to tell the user."""
        hints = dict.fromkeys((*reading.hints, *calls.hints))
        lost = dict.fromkeys((*reading.lost, *self.lost))
        unused = [
            f"{kind} at {line}"
            for kind, line in calls.sites
            if line not in self.reached.get(kind, ())
        ]
        reached = {kind: len(places) for kind, places in self.reached.items()}
        found = Counter(reached)
        found.update(kind for kind, _ in lost)
        return AnnotationReport(
            counts=tuple(Count(k, found[k], reached.get(k, 0)) for k in sorted(found)),
            lost=tuple(sentence for _, sentence in lost),
            unused=tuple(sorted(unused)),
            hints=tuple(hints),
        )


def _shardings(op: Op) -> Iterator[tuple[str, Any, frozenset[int]]]:
    """The shardings on the user's mesh that an equation asks for its result."""
    params = op.params
    match op.primitive:
        case "sharding_constraint":
            called = op.equation is not None and (
                op.equation.primitive.name != "sharding_constraint"
            )
            open_dims = params.get("unconstrained_dims") or frozenset()
            yield JIT if called else CONSTRAINT, params["sharding"], open_dims
        case "reshard":
            yield RESHARD, params["dst_sharding"], frozenset()
        case "device_put":
            for target in params["devices"][:1]:
                if isinstance(target, Sharding):
                    yield DEVICE_PUT, target, frozenset()
        case "link" | "mesh_cast":
            pass
        case _:
            for value in params.values():
                # Only a mesh with Explicit axes puts one into other equations.
                if isinstance(value, NamedSharding) and any(value.spec):
                    yield OUT_SHARDING, value, frozenset()
