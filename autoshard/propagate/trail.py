"""Where the axes of a value came from: the way back to an annotation, op by op.

A search from all origins at once gives each dim the nearest one and the next dim on the
way there; ways along the flow of data are preferred to those against it. Origins are
what the user fixed in mesh axes; else the dims that were named; else, in a part of the
program that holds neither, its state and data; else its first value, where a rule or a
storage axis came in.

What a rule or the user put on a dim, and what storage added to it (ZeRO), are two
stories, and are searched apart.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from autoshard.ir.mesh import AXES
from autoshard.ir.program import LINK, Op
from autoshard.plan.records import TrailDim, TrailStep, numberless
from autoshard.plan.sharded import RESIDUAL, ShardedProgram
from autoshard.propagate.classes import DimGraph
from autoshard.propagate.ways import Way, find_edges, find_ways

Axes = tuple[str, ...]

_LINKS = {"branch": "cond", "manual": "shard_map"}


def trail(sharded: ShardedProgram) -> tuple[TrailStep, ...]:
    """One step per value that is sharded, alike ones together.

    Args:
        sharded: A program with a layout applied.

    Returns:
        Steps in the order of the program. A dim's `step` is nearer to the origin than
        the dim itself, so the way back has an end. Axes of one device are left out.
        A dim that has both a `step` and an `origin` takes from the step the axes that
        the step has, and the `origin` speaks of the others.

    >>> import jax
    >>> from autoshard.ir.annotate import annotate
    >>> from autoshard.ir.trace import trace
    >>> from autoshard.plan.sharded import Layout
    >>> from autoshard.propagate import find_classes, propagate
    >>> x = jax.ShapeDtypeStruct((8,), "float32")
    >>> traced = trace(lambda x: annotate(x, "mlp") * 2, [x])
    >>> layout = Layout(rules=(("mlp", ("tensor",)),))
    >>> steps = trail(propagate(traced, find_classes(traced), layout))
    >>> [(step.what, step.dims[0].step) for step in steps]
    [('batch', None), ('annotate', None), ('mul', 1)]
    """
    return _Trail(sharded).steps()


class _Bits(dict[Axes, int]):
    """Tuples of axes as bits; axes of one device have none."""

    def __init__(self, bit: dict[str, int]) -> None:
        super().__init__()
        self._bit = bit

    def __missing__(self, axes: Axes) -> int:
        self[axes] = sum(self._bit.get(axis, 0) for axis in axes)
        return self[axes]


class _Trail:
    def __init__(self, sharded: ShardedProgram) -> None:
        self.sharded = sharded
        self.program = sharded.traced.program
        self.classes = sharded.classes
        self.graph = DimGraph(self.program, sharded.classes.rules)
        self.starts = self.graph.starts
        self.total = int(self.starts[-1])
        self.inputs = dict(zip(self.program.inputs, sharded.traced.inputs, strict=True))
        self.named = {(v, d): text for v, d, _, text in reversed(self.classes.named_at)}
        self.seeded = _seed_values(sharded)
        sizes = sharded.layout.sizes
        self.bits = _Bits(
            {a: 1 << k for k, a in enumerate(AXES) if sizes.get(a, 2) > 1}
        )
        self._by_class: dict[int, list[tuple[str, str, Axes]]] = {}
        self._read_nodes()

    # -- nodes -------------------------------------------------------------------

    def _read_nodes(self) -> None:
        """Per dim, as bits, the axes of rules and seeds, and those of storage."""
        fixed, of_value = self.classes.fixed, self.classes.of_value
        main = [0] * self.total
        storage, seed = list(main), list(main)
        self.parts: dict[int, tuple[tuple[int, int], ...]] = {}
        split: dict[object, tuple[tuple[int, int], ...]] = {}
        begin = self.starts.tolist()
        for v, spec in enumerate(self.sharded.specs):
            if not any(spec):
                continue
            given, row = fixed.dims.get(v), of_value[v]
            key = (row, spec, given)
            parts = split.get(key)
            if parts is None:
                parts = split[key] = tuple(
                    self._split(cls, axes, given[d] if given else None)
                    for d, (cls, axes) in enumerate(zip(row, spec, strict=True))
                )
            if not any(map(any, parts)):
                continue
            self.parts[v] = parts
            for node, (mine, stored) in enumerate(parts, begin[v]):
                main[node], storage[node] = mine, stored
            for d, axes in enumerate(given or ()):
                if axes:
                    seed[begin[v] + d] = fixed.why[v, d] + 1
        self.main = np.array(main, dtype=np.int64)
        self.storage = np.array(storage, dtype=np.int64)
        self.seed = np.array(seed, dtype=np.int64)
        self.value_of = np.repeat(
            np.arange(len(self.program.values)), np.diff(self.starts)
        ).tolist()

    def _split(self, cls: int, axes: Axes, given: Axes | None) -> tuple[int, int]:
        """Axes that the user or a rule put on a dim, and those of storage."""
        all_, ruled = self.bits[axes], self.bits[given or ()]
        if not given:
            for _, _, wanted in self._rules(cls):
                ruled |= self.bits[wanted]
        return all_ & ruled, all_ & ~ruled

    def _axes(self, axes: Axes, bits: int) -> Axes:
        return tuple(a for a in axes if self.bits[(a,)] & bits)

    def _rules(self, cls: int) -> list[tuple[str, str, Axes]]:
        """The strategy's rules for a class: name, how it is written, axes."""
        found = self._by_class.get(cls)
        if found is None:
            names = self.classes.names.get(cls, ())
            found = self._by_class[cls] = [
                (base, f"rule {logical} = [{', '.join(axes)}]", axes)
                for logical, axes in self.sharded.layout.rules
                if axes and (base := logical.removesuffix(RESIDUAL)) in names
            ]
        return found

    # -- the way back ------------------------------------------------------------

    def _ways(self) -> tuple[Way, Way]:
        edges = find_edges(
            self.graph, self.sharded.factor_axes, self.bits, self.main | self.storage
        )
        left, right, shared = edges.left, edges.right, edges.shared
        named = np.zeros(self.total, dtype=bool)
        for v, d in self.named:
            named[int(self.starts[v]) + d] = True
        named &= self.seed == 0
        for number, v in enumerate(self.seeded):
            nodes = slice(int(self.starts[v]), int(self.starts[v + 1]))
            named[nodes] |= self.seed[nodes] == number + 1
        at = np.zeros(self.total, dtype=bool)
        for v in self.inputs:
            at[int(self.starts[v]) : int(self.starts[v + 1])] = True
        alike = self.seed[left] == self.seed[right]
        keep = alike & ((shared & self.main[left] & self.main[right]) != 0)
        main = find_ways(edges.where(keep), self.main, [named, at])
        for v in self._marks():
            at[int(self.starts[v]) : int(self.starts[v + 1])] = True
        keep = (shared & self.storage[left] & self.storage[right]) != 0
        return main, find_ways(edges.where(keep), self.storage, [at])

    def _marks(self) -> dict[int, str]:
        """The gradients a train step marks, and whose they are."""
        return {
            op.outputs[0]: op.params["path"]
            for op in self.program.ops
            if op.primitive == "autoshard_annotate" and op.params["role"]
        }

    # -- steps -------------------------------------------------------------------

    def steps(self) -> tuple[TrailStep, ...]:
        main, storage = self._ways()
        group_of, groups = self._groups(main, storage)
        starts = self.starts
        found = []
        for members in groups:
            v = members[0]
            dims: list[TrailDim | None] = []
            for d, axes in enumerate(self.sharded.specs[v]):
                nodes = [int(starts[m]) + d for m in members]
                mixed = int(self.main[nodes[0]]), int(self.storage[nodes[0]])
                if not any(mixed):
                    dims.append(None)
                    continue
                way = main if mixed[0] else storage
                node = min(nodes, key=lambda n: (way.length[n], n))
                dims.append(self._dim(node, axes, way, main, storage, group_of))
            op = self._op(v)
            found.append(
                TrailStep(
                    what=self._what(v, op),
                    source=op.source if op else "",
                    address=op.address if op else "",
                    shape=self.program.values[v].shape,
                    dims=tuple(dims),
                )
            )
        return tuple(found)

    def _groups(
        self, main: Way, storage: Way
    ) -> tuple[dict[int, int], list[list[int]]]:
        """Values that have one step between them: the group of each, and each group.

        They are copies of a block, or are made at one line by the same primitive, or
        are inputs whose paths differ by a number; in the same shape and spec, and of
        axes that came from the same place.
        """
        tied, of_value = self.classes.blocks.tied_values.tolist(), self.value_of
        copies: dict[object, list[int]] = defaultdict(list)
        for v, parts in self.parts.items():
            alone = v if v in self.inputs else tied[v]
            copies[alone, self.sharded.specs[v], parts].append(v)
        names: dict[int, object] = {}

        def name(v: int) -> object:
            if v not in names:
                info, op = self.inputs.get(v), self._op(v)
                what = numberless(info.path) if info else self._what(v, op)
                names[v] = (what, op.source if op else "", self.program.values[v].shape)
            return names[v]

        groups: dict[object, list[int]] = defaultdict(list)
        for members in copies.values():
            v = members[0]
            begin = int(self.starts[v])
            roots = []
            for d, bits in enumerate(self.parts[v]):
                for way, some in zip((main, storage), bits, strict=True):
                    root = int(way.root[begin + d])
                    other = of_value[root]
                    place = root - int(self.starts[other])
                    roots.append((name(other), place) if some else None)
            spec = self.sharded.specs[v]
            groups[name(v), spec, self.parts[v], tuple(roots)] += members
        ordered = sorted(sorted(members) for members in groups.values())
        return {v: k for k, members in enumerate(ordered) for v in members}, ordered

    def _op(self, v: int) -> Op | None:
        """What makes a value; None for an argument or a constant."""
        producer = self.program.values[v].producer
        return self.program.ops[producer] if producer >= 0 else None

    def _what(self, v: int, op: Op | None) -> str:
        if op is None:
            return self.inputs[v].path if v in self.inputs else "constant"
        if op.primitive == LINK:
            kind = op.params["kind"]
            return f"{kind} of a {_LINKS.get(kind.split('_')[0], 'loop')}"
        if op.primitive != "autoshard_annotate":
            return op.primitive
        if op.params["role"]:
            return f"gradient of {op.params['path']}"
        return op.params["kind"] or "annotate"

    # -- one dim -----------------------------------------------------------------

    def _dim(
        self,
        node: int,
        axes: Axes,
        way: Way,
        main: Way,
        storage: Way,
        group_of: dict[int, int],
    ) -> TrailDim:
        """The step before, and the origin of the axes that the step does not have."""
        before = int(way.before[node])
        all_ = int(self.main[node] | self.storage[node])
        begun = all_
        step, dim = None, 0
        if before != node:
            other = self.value_of[before]
            step, dim = group_of[other], before - int(self.starts[other])
            begun &= ~int(self.main[before] | self.storage[before])
        texts = []
        if begun & int(self.main[node]):
            texts.append(self._decision(int(main.root[node]), begun))
        if begun & int(self.storage[node]):
            texts.append(self._storage(int(storage.root[node]), axes, begun))
        return TrailDim(
            axes=self._axes(axes, all_),
            step=step,
            dim=dim,
            origin="; ".join(texts),
        )

    def _decision(self, node: int, begun: int) -> str:
        """The seed, or the rule and whence the name it speaks of."""
        seed = int(self.seed[node])
        if seed:
            return self.classes.fixed.origins[seed - 1]
        v = self.value_of[node]
        d = node - int(self.starts[v])
        cls = self.classes.of_value[v][d]
        begun &= int(self.main[node]) or begun
        for base, text, given in self._rules(cls):
            if self.bits[given] & begun:
                given_by = self.named.get((v, d), "")
                whole = self.classes.origins.get((cls, base), "")
                return ", ".join(filter(None, (text, given_by or whole)))
        return f"dims tied to it by the program (class {cls})"

    def _storage(self, node: int, axes: Axes, begun: int) -> str:
        """Which storage entry, or which placement by the user, holds at the origin."""
        v = self.value_of[node]
        info = self.inputs.get(v)
        placed = self.classes.fixed.storage.get(v, ())
        if info is not None and any(placed):
            seeds = [s.origin for s in self.sharded.traced.seeds if s.value == v]
            return seeds[0] if seeds else f"placement of {info.path}"
        layout = self.sharded.layout
        state = info.state if info is not None else "gradients"
        given = {
            "params": layout.params,
            "gradients": layout.gradients,
            "optimizer": layout.optimizer,
        }.get(state, ())
        if self.bits[given] & begun:
            return f"storage {state} = [{', '.join(given)}]"
        return f"storage over {', '.join(self._axes(axes, begun))}"


def _seed_values(sharded: ShardedProgram) -> list[int]:
    """The value of each origin of `Fixed.origins`, in its order."""
    if not sharded.classes.fixed.origins:
        return []
    found = [seed.value for seed in sharded.traced.seeds]
    for op in sharded.traced.program.ops:
        kind = op.params.get("kind") if op.primitive == LINK else None
        if kind in ("manual_in", "manual_out"):
            outer = op.inputs[0] if kind == "manual_in" else op.outputs[0]
            if outer >= 0:
                found.append(outer)
    return found
