"""One schema for strategies and plans.

A strategy is a plan with holes: the sections `mesh`, `rules`, `storage` and `schedule`
are the same in both, only a strategy may leave a field `"auto"`. A plan adds what the
search filled in and what follows from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)

from autoshard.ir.errors import NameUnknownError
from autoshard.ir.mesh import AXES, Spec, check_axis
from autoshard.plan import views

SCHEMA_VERSION = 1
"""Raised whenever an older plan could be misread."""

Auto = Literal["auto"]
Axes = tuple[str, ...]
Remat = Literal["none", "full"]
STATES = ("params", "gradients", "optimizer")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _spec_in(value: object) -> object:
    if isinstance(value, list):
        return Spec(tuple(tuple(dim) for dim in value))
    return value


PlanSpec = Annotated[
    Spec,
    BeforeValidator(_spec_in),
    PlainSerializer(lambda s: [list(dim) for dim in s.dims]),
]
"""A spec in a plan: for each dim the list of mesh axes that shard it."""


class Rule(_Model):
    """One logical axis and the mesh axes that shard it in compute.

    Attributes:
        logical: A logical axis; with the suffix `.residual` the rule holds only for
            activations between blocks, where nothing else wants the axes.
        axes: Mesh axes, major first; `"auto"` is a hole.
    """

    logical: str
    axes: Axes | Auto


class Storage(_Model):
    """Mesh axes that shard each kind of state in memory beyond its compute spec.

    ZeRO-1 is `optimizer`, ZeRO-2 adds `gradients`, ZeRO-3 (FSDP) adds `params`
    (Rajbhandari et al. 2020, arXiv:1910.02054).
    """

    params: Axes | Auto = ()
    gradients: Axes | Auto = ()
    optimizer: Axes | Auto = ()


class Schedule(_Model):
    """How a step is cut in time.

    Attributes:
        microbatches: Pieces the batch is cut into; gradients are accumulated.
        pipeline: Pipeline schedule; only `"none"` exists yet.
        remat: `"full"` recomputes each block in the backward pass.
    """

    microbatches: Annotated[int, Field(ge=1)] | Auto = 1
    pipeline: Literal["none"] = "none"
    remat: Remat | Auto = "none"


class Strategy(_Model):
    """A policy: which axes exist, what they shard, and which fields search fills.

    Attributes:
        name: Its name in reports.
        about: One sentence.
        cite: Where it was published.
        mesh: Size per mesh axis; an axis not named has size 1.
        rules: Logical axis to mesh axes, in order of priority.
        storage: See `Storage`.
        schedule: See `Schedule`.

    >>> Strategy(name="dp", about="", mesh={"data": "auto"},
    ...          rules={"batch": ["data"]}).rules
    (Rule(logical='batch', axes=('data',)),)
    """

    name: str
    about: str
    cite: tuple[str, ...] = ()
    mesh: dict[str, Annotated[int, Field(ge=1)] | Auto]
    rules: tuple[Rule, ...] = ()
    storage: Storage = Storage()
    schedule: Schedule = Schedule()

    @field_validator("rules", mode="before")
    @classmethod
    def _rules_as_table(cls, value: object) -> object:
        if isinstance(value, dict):
            return [{"logical": k, "axes": v} for k, v in _dotted(value).items()]
        return value

    @model_validator(mode="after")
    def _axes_are_known(self) -> Strategy:
        for axis in self.mesh:
            check_axis(axis, "[mesh]")
        for rule in self.rules:
            self._check(rule.axes, f"[rules] {rule.logical}")
        names = [rule.logical for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise NameUnknownError(f"[rules] {name!r} is given twice; keep one.")
        for state in STATES:
            self._check(getattr(self.storage, state), f"[storage] {state}")
        return self

    def _check(self, axes: Axes | Auto, where: str) -> None:
        if axes == "auto":
            return
        for axis in axes:
            check_axis(axis, where)
            if axis not in self.mesh:
                raise NameUnknownError(
                    f"{where} uses mesh axis {axis!r}, which [mesh] does not name; "
                    f'add `{axis} = "auto"` there, or drop it here.'
                )
        if len(axes) != len(set(axes)):
            raise NameUnknownError(f"{where} = {list(axes)} names an axis twice.")


def _dotted(table: dict[str, object], prefix: str = "") -> dict[str, object]:
    """TOML reads `seq.residual = x` as a nested table; both spellings are one name."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(_dotted(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


class ModelRef(_Model):
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


class ProgramRef(_Model):
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


class ClusterRef(_Model):
    """The cluster a plan was made for."""

    name: str
    fingerprint: str
    num_chips: int


class TensorPlan(_Model):
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


class Constraint(_Model):
    """A value the lowering pins, because the plan has a collective there.

    Attributes:
        address: Address of the op, see `ir.walk`.
        slot: `in0`, `in1`, ... for an operand, `out0`, ... for a result; `sum0`, ...
            for a result before the plan reshards it, its partial sums complete.
        spec: Spec the value gets there.
    """

    address: str
    slot: str
    spec: PlanSpec


class Collective(_Model):
    """A planned collective.

    Attributes:
        kind: `all_gather`, `all_reduce`, `reduce_scatter`, `all_to_all` or `slice`.
        axes: Mesh axes it runs over.
        bytes_: Bytes of the larger of input and output on one device, one run.
        count: Runs per step.
        time_s: Predicted seconds per step, all runs.
        source: The user's source line.
        address: Address of the op that needs it.
        value: What is communicated: a parameter's path, or the op's name.
    """

    kind: str
    axes: Axes
    bytes_: int
    count: int
    time_s: float
    source: str
    address: str
    value: str


class MemoryTable(_Model):
    """Predicted bytes per device at the peak of the step, by what they hold."""

    params: int
    gradients: int
    optimizer: int
    activations: int
    other: int
    total: int
    capacity: int


class Estimate(_Model):
    """What the cost model predicts for one step.

    Attributes:
        step_s: Seconds per step.
        matmul_s: Of these, in matrix products.
        memory_bound_s: In everything else a chip computes.
        collective_s: In collectives; none are overlapped in this model.
        model_flops: FLOPs of forward and backward, recomputation not counted.
        mfu: `model_flops / (step_s * chips * peak)`.
        tokens_per_s: Batch positions per second, when the batch holds token ids.
        memory: Bytes at the peak.
        collectives: Every planned collective.
    """

    step_s: float
    matmul_s: float
    memory_bound_s: float
    collective_s: float
    model_flops: float
    mfu: float
    tokens_per_s: float
    memory: MemoryTable
    collectives: tuple[Collective, ...]


class Certificate(_Model):
    """How good the plan is, within the space and the cost model that were used.

    Candidates with accumulation are ranked by a price scaled from the program without
    it; only the plan that is written is traced and priced with its accumulation.

    Attributes:
        lower_bound_s: No candidate of the space is predicted faster.
        gap: `step_s / lower_bound_s - 1`.
        enumerated: Candidates priced.
        indivisible: Candidates left out because a dim does not divide.
        infeasible: Candidates that do not fit in memory.
        complete: Whether every candidate of the space was priced.
    """

    lower_bound_s: float
    gap: float
    enumerated: int
    indivisible: int
    infeasible: int
    complete: bool


class MeshAxis(_Model):
    """One axis of the mesh and its size."""

    axis: str
    size: int


class Plan(_Model):
    """Everything about how a program is spread over a cluster.

    `strategy` is the filled policy: the same document as a strategy file with every
    `"auto"` replaced. The rest follows from it and from the program. Plans are written
    as sorted, deterministic JSON; see `autoshard.plan.files`.

    Attributes:
        schema_version: See `SCHEMA_VERSION`.
        autoshard: Version that wrote it.
        program: What it was made for.
        cluster: Where it runs.
        axes: Mesh axes with more than one device or named by the strategy, slowest
            network first; devices are laid out row-major in this order.
        strategy: The filled policy.
        tensors: State and data tensors.
        outputs: Spec per flat result of the step.
        constraints: Values the lowering pins.
        notes: What a reader should know: conflicts resolved, leaves not sharded.
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
    predicted: Estimate
    certificate: Certificate

    @model_validator(mode="after")
    def _has_no_holes(self) -> Plan:
        holes = [
            *(f"mesh.{a}" for a, n in self.strategy.mesh.items() if n == "auto"),
            *(f"rules.{r.logical}" for r in self.strategy.rules if r.axes == "auto"),
            *(
                f"storage.{s}"
                for s in STATES
                if getattr(self.strategy.storage, s) == "auto"
            ),
            *(
                f"schedule.{f}"
                for f in ("microbatches", "remat")
                if getattr(self.strategy.schedule, f) == "auto"
            ),
        ]
        if holes:
            raise ValueError(f"a plan has no holes, but {', '.join(holes)} is 'auto'")
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
        """`"none"` or `"full"`."""
        return self.strategy.schedule.remat

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
