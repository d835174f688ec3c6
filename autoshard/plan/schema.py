"""One schema for strategies and plans.

A strategy is a plan with holes: the sections `mesh`, `rules`, `storage` and `schedule`
are the same in both, only a strategy may leave a field `"auto"`. A plan adds what the
search filled in and what follows from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from autoshard.ir.mesh import AXES
from autoshard.plan import views
from autoshard.plan.base import PlanSpec, Record
from autoshard.plan.predicted import Certificate as Certificate
from autoshard.plan.predicted import Collective as Collective
from autoshard.plan.predicted import Estimate as Estimate
from autoshard.plan.predicted import HostTable as HostTable
from autoshard.plan.predicted import MemoryTable as MemoryTable
from autoshard.plan.records import (
    Annotations,
    BlockRecord,
    ConflictRecord,
    DelayedSum,
    Replicated,
    TrailStep,
)
from autoshard.plan.strategy import STATES, Schedule, Strategy

SCHEMA_VERSION = 1
"""Raised whenever an older plan could be misread."""


class ModelRef(Record):
    """How the command line builds the program again.

    Attributes:
        model: Name in the zoo, path of a Hugging Face config, or `module:function`.
        batch: Global batch in sequences.
        seq: Tokens per sequence.
        optimizer: Name of an optax optimizer.
        learning_rate: Its learning rate.
        dtype: Compute dtype.
        scan_layers: Whether equal layers are one loop.
    """

    model: str
    batch: int
    seq: int
    optimizer: str
    learning_rate: float
    dtype: str
    scan_layers: bool = True


class ProgramRef(Record):
    """The program a plan was made for.

    Attributes:
        fingerprint: Hash of its structure and shapes.
        jax: The JAX version that traced it.
        model: How to build it again, when the command line built it.
        ops: Number of ops.
        params: Number of parameters.
    """

    fingerprint: str
    jax: str
    model: ModelRef | None = None
    ops: int
    params: int


class ClusterRef(Record):
    """The cluster a plan was made for."""

    name: str
    fingerprint: str
    num_chips: int


class TensorPlan(Record):
    """One state tensor.

    Attributes:
        path: Path in the state, such as `params/blocks/q`.
        shape: Global shape.
        dtype: Element type.
        state: `params`, `optimizer`, `data` or `other`.
        logical: Logical axis per dim, as far as known.
        storage: Spec in memory.
        compute: Spec where an op uses it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    state: str
    logical: tuple[str | None, ...]
    storage: PlanSpec
    compute: PlanSpec


class Constraint(Record):
    """A value the lowering pins, because the plan has a collective there.

    Attributes:
        address: Address of the op, see `ir.walk`.
        slot: `in0`, `in1`, ... for an operand, `out0`, ... for a result; `had0`, ...
            for an operand and `sum0`, ... for a result before the plan reshards it,
            its partial sums complete;
            `each0`, ... for a result as each device makes it, where the op runs under
            `shard_map`.
        spec: Spec the value gets there.
    """

    address: str
    slot: str
    spec: PlanSpec


class MeshAxis(Record):
    """One axis of the mesh and its size."""

    axis: str
    size: int


class Plan(Record):
    """Everything about how a program is spread over a cluster.

    `strategy` is the filled policy: the same document as a strategy file with every
    `"auto"` replaced. The rest follows from it and from the program. Plans are written
    as sorted, deterministic JSON; see `autoshard.plan.files`.

    Attributes:
        schema_version: See `SCHEMA_VERSION`.
        autoshard: Version that wrote it.
        program: What it was made for.
        cluster: Where it runs.
        axes: Mesh axes with more than one device or named by the strategy, in the order
            in which devices are laid out, row-major: the outermost first.
        strategy: The filled policy.
        tensors: State and data tensors.
        outputs: Spec per flat result of the step.
        constraints: Values the lowering pins.
        notes: What a reader should know: leaves not sharded, dims padded.
        annotations: How many annotations were found, and how many reached the jaxpr.
        blocks: Repeated units, whose copies share every decision.
        conflicts: Wishes that could not all be met, and which were.
        delayed: Partial sums that are added before they are reduced.
        replicated: Every use of the `replicate` opt-in.
        trail: Where the axes of each value came from.
        predicted: See `Estimate`.
        certificate: See `Certificate`.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    autoshard: str
    program: ProgramRef
    cluster: ClusterRef
    axes: tuple[MeshAxis, ...]
    strategy: Strategy
    tensors: tuple[TensorPlan, ...]
    outputs: tuple[PlanSpec, ...]
    constraints: tuple[Constraint, ...]
    notes: tuple[str, ...]
    annotations: Annotations = Annotations()
    blocks: tuple[BlockRecord, ...] = ()
    conflicts: tuple[ConflictRecord, ...] = ()
    delayed: tuple[DelayedSum, ...] = ()
    replicated: tuple[Replicated, ...] = ()
    trail: tuple[TrailStep, ...] = ()
    predicted: Estimate
    certificate: Certificate

    @model_validator(mode="after")
    def _has_no_holes(self) -> Plan:
        holes = [
            *(f"mesh.{a}" for a, n in self.strategy.mesh.items() if n == "auto"),
            *(["order"] if self.strategy.order == "auto" else []),
            *(f"rules.{r.logical}" for r in self.strategy.rules if r.axes == "auto"),
            *(
                f"storage.{s}"
                for s in STATES
                if getattr(self.strategy.storage, s) == "auto"
            ),
            *(
                f"schedule.{f}"
                for f in Schedule.model_fields
                if getattr(self.strategy.schedule, f) == "auto"
            ),
        ]
        if holes:
            raise ValueError(f"a plan has no holes, but {', '.join(holes)} is 'auto'")
        if self.strategy.schedule.remat_is_open:
            raise ValueError(f"a plan has no holes, but its remat is {self.remat!r}")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every canonical mesh axis, 1 where the plan does not name it."""
        sizes: dict[str, int] = dict.fromkeys(AXES, 1)
        sizes.update({a.axis: a.size for a in self.axes})
        return sizes

    @property
    def microbatches(self) -> int:
        """Pieces the batch is cut into."""
        assert self.strategy.schedule.microbatches != "auto"
        return self.strategy.schedule.microbatches

    @property
    def remat(self) -> str:
        """What of each block the backward pass recomputes, as in `Schedule`."""
        return self.strategy.schedule.remat

    @property
    def not_executable(self) -> tuple[str, ...]:
        """What of the plan is priced but cannot be run yet, in words."""
        schedule, found = self.strategy.schedule, []
        if schedule.pipeline != "none":
            found.append(f"{self.sizes['stage']} pipeline stages")
        if schedule.context_kind != "all_gather" and self.sizes["context"] > 1:
            found.append(f"context_kind {schedule.context_kind}")
        if schedule.offload:
            found.append(f"{' and '.join(schedule.offload)} in the host's memory")
        return tuple(found)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, whole or not at all; see `plan.files.save_plan`.

        Raises:
            OutputError: The place cannot be written.
        """
        from autoshard.plan.files import save_plan  # that module reads this one

        save_plan(self, path)

    def __repr__(self) -> str:
        return f"<{views.headline(self)}>"

    def __str__(self) -> str:
        return views.render(self, "text")

    def __rich__(self) -> Any:
        return views.render(self, "rich")

    def _repr_html_(self) -> str:
        return views.render(self, "html")
