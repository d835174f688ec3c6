"""Structures propagated: once for all meshes that make the same of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from autoshard.cost import Pricer
from autoshard.cost.context import ALL_GATHER
from autoshard.ir.errors import InputError
from autoshard.ir.mesh import AXES
from autoshard.plan.sharded import Layout
from autoshard.plan.strategy import Strategy
from autoshard.propagate import UnderRules, propagate
from autoshard.search.alike import felt, state_dims
from autoshard.search.divisible import divide_alike
from autoshard.search.reading import Sketch


class Propagated:
    """What prices the structures of a program, each propagated when it is asked for."""

    def __init__(self) -> None:
        self._pricers: dict[Any, Pricer] = {}
        self._under_rules: dict[Any, UnderRules] = {}
        self._attending: dict[Any, bool] = {}
        self._state_dims: dict[Any, frozenset[tuple[str, ...]]] = {}
        self._idle: tuple[np.ndarray, np.ndarray] | None = None

    def attends(self, structure: Strategy, sketch: Sketch, asked: Strategy) -> bool:
        """Whether attention can be done as a structure has it.

        Raises:
            InputError: It cannot, and that is fixed.
        """
        kind = structure.schedule.context_kind
        if kind == ALL_GATHER:
            return True
        if self.passes(structure, sketch):
            return True
        if asked.schedule.context_kind == "auto":
            return False
        raise InputError(
            f"context_kind = {kind!r}{asked.where('context_kind')} is for attention "
            "over a sequence that a rule shards over `context`, and none was found: "
            "there must be products of queries and keys, both of the sequence, that "
            'run on a part of the queries each. Add `seq = ["context"]` to [rules] '
            "if it is missing there, or drop context_kind."
        )

    def passes(self, structure: Strategy, sketch: Sketch) -> bool:
        """Whether there are passes of attention over a sequence in parts.

        Args:
            structure: With another kind of attention than `all_gather`.
            sketch: Its program.
        """
        key = (structure.schedule.remat, structure.rules)
        if key not in self._attending:
            attends = bool(self.pricer(structure, sketch).context.passes)
            self._attending[key] = attends
        return self._attending[key]

    def parts(
        self, structure: Strategy, sketch: Sketch, grid: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[frozenset[str], np.ndarray]]:
        """Some rows of a grid of mesh sizes, by the axes to propagate along.

        Where an axis has one device the structure is what it is without the axis. As a
        rule it need not be propagated again for that: along the others it is the same.
        """
        schedule = structure.schedule
        if (schedule.remat, structure.rules) not in self._state_dims:
            dims = state_dims(self.pricer(structure, sketch).sharded)
            self._state_dims[schedule.remat, structure.rules] = dims
        dims = self._state_dims[schedule.remat, structure.rules]
        together = sorted(felt(structure, sketch.traced, sketch.classes.fixed, dims))
        masks = [sum(1 << AXES.index(axis) for axis in axes) for axes in together]
        idle = self._idle_in(grid)[rows]
        # Of what is idle few combinations exist, whatever the number of candidates.
        number = np.zeros(1 << len(AXES), dtype=np.int64)
        numbers: dict[tuple[bool, ...], int] = {}
        for bits in np.flatnonzero(np.bincount(idle)).tolist():
            lacks = tuple(bits & mask == mask for mask in masks)
            number[bits] = numbers.setdefault(lacks, len(numbers))
        found = number[idle]
        for lacks, k in sorted(numbers.items(), key=lambda pair: pair[0][::-1]):
            lacking = {
                a
                for own, all_ in zip(together, lacks, strict=True)
                if all_
                for a in own
            }
            yield frozenset(AXES) - lacking, rows[found == k]

    def _idle_in(self, grid: np.ndarray) -> np.ndarray:
        """The axes of one device of each mesh, as bits; kept for the newest grid."""
        if self._idle is None or self._idle[0] is not grid:
            self._idle = grid, (grid == 1) @ (1 << np.arange(len(AXES)))
        return self._idle[1]

    def as_divided(
        self,
        structure: Strategy,
        sketch: Sketch,
        active: frozenset[str],
        grid: np.ndarray,
        rows: np.ndarray,
    ) -> Iterator[tuple[Pricer, np.ndarray]]:
        """Some rows of a grid of mesh sizes, by what prices them as they divide.

        Propagation without sizes takes it that everything divides. Where something it
        asks for does not, it is propagated with the sizes of such a mesh, which then
        stands for all that answer alike.
        """
        sizes: dict[str, int] = {}
        while len(rows):
            pricer = self.pricer(structure, sketch, active, sizes)
            alike = divide_alike(pricer, grid[rows], sizes)
            if alike.any():
                yield pricer, rows[alike]
            rows = rows[~alike]
            if len(rows):
                # Of an axis without a size nothing is taken for granted but that it may
                # have several devices, as it has in others that answer alike.
                own = zip(AXES, grid[rows[0]].tolist(), strict=True)
                sizes = {axis: size for axis, size in own if size > 1}

    def pricer(
        self,
        structure: Strategy,
        sketch: Sketch,
        active: frozenset[str] = frozenset(AXES),
        sizes: Mapping[str, int] = MappingProxyType({}),
    ) -> Pricer:
        """What prices a structure.

        Args:
            structure: Rules and storage.
            sketch: The program.
            active: Axes to propagate along; the others have one device.
            sizes: Of a mesh that answers what propagation asks for, see `as_divided`.
        """
        layout = replace(Layout.of(structure).along(active), sizes=dict(sizes))
        states = (layout.params, layout.gradients, layout.optimizer)
        remat = structure.schedule.remat
        # Another solver of the same program may have other axes.
        rules = remat, layout.rules, layout.axes, tuple(sizes.items())
        key = rules, states
        gathering = key, ALL_GATHER
        if gathering not in self._pricers:
            traced, classes = sketch.shallow.traced, sketch.shallow.classes
            # Of what differs in storage alone all else is propagated once.
            if rules not in self._under_rules:
                self._under_rules[rules] = UnderRules(traced, classes, layout)
            under = self._under_rules[rules]
            sharded = propagate(traced, classes, layout, under)
            self._pricers[gathering] = Pricer(sharded, sketch.shallow.work)
        if "context" not in active:
            return self._pricers[gathering]
        how = structure.schedule.context_kind, structure.schedule.context_heads
        if (key, *how) not in self._pricers:
            found = self._pricers[gathering].with_context(*how)
            self._pricers[key, *how] = found
        return self._pricers[key, *how]
