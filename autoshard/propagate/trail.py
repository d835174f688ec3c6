"""Where the axes of a value came from: the way back to an annotation, op by op.

Dims are nodes, ops tie them (`DimGraph`), and a search in breadth from all annotated
dims at once gives each dim the nearest annotation and the next dim on the way there.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order

from autoshard.ir.program import LINK, Op
from autoshard.plan.records import TrailDim, TrailStep
from autoshard.plan.sharded import ShardedProgram
from autoshard.propagate.classes import DimGraph, Ints


def trail(sharded: ShardedProgram) -> tuple[TrailStep, ...]:
    """One step per value that is sharded, alike ones together.

    Args:
        sharded: A program with a layout applied.

    Returns:
        Steps, the nearest to an annotation first; a dim's `step` points to an earlier
        one.
    """
    return _Trail(sharded).steps()


class _Trail:
    def __init__(self, sharded: ShardedProgram) -> None:
        self.sharded = sharded
        self.program = sharded.traced.program
        self.graph = DimGraph(self.program, sharded.classes.rules)
        self.starts = self.graph.starts
        self.edges = self.graph.edges()
        self.paths = {
            v: info.path
            for v, info in zip(self.program.inputs, sharded.traced.inputs, strict=True)
        }

    def steps(self) -> tuple[TrailStep, ...]:
        classes = self.sharded.classes
        fixed = classes.fixed
        seeds = {
            int(self.starts[s.value]) + d
            for s in self.sharded.traced.seeds
            for d, axes in enumerate(s.dims)
            if axes
        }
        named = {int(self.starts[v]) + d: text for v, d, _, text in classes.named_at}
        for (cls, _), origin in classes.origins.items():
            if origin.startswith("role:"):
                named.setdefault(cls, origin)  # a class is its first node
        by_seed, seed_rank = self._search(seeds)
        by_name, name_rank = self._search(named)
        order = np.minimum(seed_rank, name_rank)
        values = sorted(
            (v for v in range(len(self.program.values)) if any(self.sharded.specs[v])),
            key=lambda v: (
                min(order[self.starts[v] : self.starts[v + 1]].tolist()),
                v,
            ),
        )
        index: dict[object, int] = {}
        of_value: dict[int, int] = {}
        draft: list[tuple[int, list[TrailDim | None]]] = []
        producers = {v: op for op in reversed(self.program.ops) for v in op.outputs}
        for v in values:
            key = self._key(v, producers.get(v))
            if key in index:
                of_value[v] = index[key]
                continue
            index[key] = of_value[v] = len(draft)
            dims: list[TrailDim | None] = []
            for d, axes in enumerate(self.sharded.specs[v]):
                if not axes:
                    dims.append(None)
                    continue
                node = int(self.starts[v]) + d
                pred = (by_seed if (v, d) in fixed.why else by_name)[node]
                dims.append(self._dim(v, d, node, int(pred), axes, named, of_value))
            draft.append((v, dims))
        return tuple(
            TrailStep(
                what=self.paths.get(v) or self._what(producers.get(v)),
                source=op.source if (op := producers.get(v)) else "",
                address=op.address if op else "",
                shape=self.program.values[v].shape,
                dims=tuple(dims),
            )
            for v, dims in draft
        )

    def _what(self, op: Op | None) -> str:
        if op is None:
            return "constant"
        return (
            f"{op.params['kind']} of a loop" if op.primitive == LINK else op.primitive
        )

    def _key(self, v: int, op: Op | None) -> object:
        if v in self.paths or op is None:
            return self.paths.get(v, v)
        shape = self.program.values[v].shape
        return (op.source, self._what(op), shape, self.sharded.specs[v])

    def _dim(
        self,
        v: int,
        d: int,
        node: int,
        pred: int,
        axes: tuple[str, ...],
        named: dict[int, str],
        of_value: dict[int, int],
    ) -> TrailDim:
        """The step before, or the origin where there is none."""
        classes, layout = self.sharded.classes, self.sharded.layout
        fixed = classes.fixed.why.get((v, d))
        decision = ""
        if fixed is None:
            cls = classes.of_value[v][d]
            names = classes.names.get(cls, ())
            rule = next(
                (
                    f"rule {logical} = [{', '.join(given)}]"
                    for logical, given in layout.rules
                    if logical.removesuffix(".residual") in names
                    and set(given) & set(axes)
                ),
                "",
            )
            stored = [a for a in axes if v in self.sharded.stored and a not in rule]
            decision = rule or f"storage over {', '.join(stored or axes)}"
        total = int(self.starts[-1])
        if 0 <= pred < total:
            other = int(np.searchsorted(self.starts, pred, side="right")) - 1
            e = pred - int(self.starts[other])
            if other in of_value and any(self.sharded.specs[other][e : e + 1]):
                return TrailDim(axes=axes, step=of_value[other], dim=e)
        if fixed is not None:
            return TrailDim(axes=axes, origin=classes.fixed.origins[fixed])
        origin = named.get(node, "")
        return TrailDim(axes=axes, origin="; ".join(filter(None, (decision, origin))))

    def _search(self, sources: Iterable[int]) -> tuple[Ints, Ints]:
        """Predecessor and rank per dim, from the nearest source."""
        total = int(self.starts[-1])
        left, right, _ = self.edges
        begin = np.array(sorted(sources), dtype=np.int64)
        rows = np.concatenate([left, right, np.full(len(begin), total)])
        columns = np.concatenate([right, left, begin])
        matrix = csr_array(
            (np.ones(len(rows), np.int8), (rows, columns)),
            shape=(total + 1, total + 1),
        )
        order, before = breadth_first_order(matrix, total)
        rank = np.full(total + 1, total + 1, dtype=np.int64)
        rank[order] = np.arange(len(order))
        return before.astype(np.int64), rank[:-1]
