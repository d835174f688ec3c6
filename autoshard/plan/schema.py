"""One schema for strategies and plans.

A strategy is a plan with holes: the sections `mesh`, `rules`, `storage` and `schedule`
are the same in both, only a strategy may leave a field `"auto"`. A plan adds what the
search filled in and what follows from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from jax.sharding import PartitionSpec
from pydantic import Field, PrivateAttr, field_validator, model_validator

from autoshard.ir.errors import NameUnknownError
from autoshard.ir.mesh import AXES, check_axis
from autoshard.plan import views
from autoshard.plan.base import PlanSpec, Record
from autoshard.plan.predicted import Certificate as Certificate
from autoshard.plan.predicted import Collective as Collective
from autoshard.plan.predicted import Estimate as Estimate
from autoshard.plan.predicted import MemoryTable as MemoryTable
from autoshard.plan.records import (
    Annotations,
    BlockRecord,
    ConflictRecord,
    DelayedSum,
    Replicated,
    TrailStep,
)

SCHEMA_VERSION = 1
"""Raised whenever an older plan could be misread."""

Auto = Literal["auto"]
Axes = tuple[str, ...]
Remat = Literal["none", "full"]
STATES = ("params", "gradients", "optimizer")


class Rule(Record):
    """One logical axis and the mesh axes that shard it in compute.

    Attributes:
        logical: A logical axis; with the suffix `.residual` the rule holds only for
            activations between blocks, where nothing else wants the axes.
        axes: Mesh axes, major first; `"auto"` is a hole.
    """

    logical: str
    axes: Axes | Auto


class Storage(Record):
    """Mesh axes that shard each kind of state in memory beyond its compute spec.

    ZeRO-1 is `optimizer`, ZeRO-2 adds `gradients`, ZeRO-3 (FSDP) adds `params`
    (Rajbhandari et al. 2020, arXiv:1910.02054).
    """

    params: Axes | Auto = ()
    gradients: Axes | Auto = ()
    optimizer: Axes | Auto = ()


class Schedule(Record):
    """How a step is cut in time.

    Attributes:
        microbatches: Pieces the batch is cut into; gradients are accumulated.
        pipeline: Pipeline schedule; only `"none"` exists yet.
        remat: `"full"` recomputes each block in the backward pass.
    """

    microbatches: Annotated[int, Field(ge=1)] | Auto = 1
    pipeline: Literal["none"] = "none"
    remat: Remat | Auto = "none"


class Strategy(Record):
    """A policy: which axes exist, what they shard, and which fields search fills.

    Attributes:
        name: Its name in reports.
        about: One sentence.
        cite: Where it was published.
        mesh: Size per mesh axis; an axis not named has size 1.
        rules: Logical axis to mesh axes, in order of priority.
        storage: See `Storage`.
        schedule: See `Schedule`.
        specs: Regular expression over parameter paths to mesh axes per dim: the first
            that matches fixes the parameter. An entry is an axis, a list of axes, `""`
            for a dim that stays whole, `"*"` for one that is left open, `"..."` at the
            end for all that follow whole.
        aliases: Canonical axis per name that the program gives a mesh axis, beyond
            the well-known ones (`tp`, `dp`, ...).
        replicate: Primitives without a factor rule that every device may compute
            whole; each use is listed in the plan.

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
    specs: dict[str, tuple[str | Axes, ...]] = Field(default_factory=dict)
    aliases: dict[str, str] = Field(default_factory=dict)
    replicate: tuple[str, ...] = ()
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def places(self) -> Mapping[str, str]:
        """Where fields were fixed, by key, as far as that is known."""
        return self._places

    def where(self, key: str) -> str:
        """Where a field was fixed, ` (my.toml:7)`; empty if that is not known.

        Args:
            key: `tensor`, `microbatches`, `storage.params`, `rules.vocab` and the like.
        """
        place = self._places.get(key)
        return f" ({place})" if place else ""

    def placed(self, places: Mapping[str, str]) -> Strategy:
        """The same strategy, and where fields of it were fixed, by key."""
        found = self.model_copy()
        found._places = {**self._places, **places}
        return found

    def __eq__(self, other: object) -> bool:
        # Where a field was fixed is no part of the policy.
        return isinstance(other, Strategy) and dict(self) == dict(other)

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
        for name, axis in self.aliases.items():
            check_axis(axis, f"[aliases] {name}")
        return self

    @property
    def names(self) -> list[str]:
        """The logical axes that the rules name."""
        return [rule.logical.removesuffix(".residual") for rule in self.rules]

    def with_wishes(
        self,
        specs: Mapping[str, Any],
        aliases: Mapping[str, str],
        replicate: Iterable[str],
    ) -> Strategy:
        """The same policy with path maps, names of axes and opt-ins added to it.

        Args:
            specs: As the field; a value may also be a `jax.sharding.PartitionSpec`.
                They come before those of the policy.
            aliases: As the field.
            replicate: As the field.
        """
        if not (specs or aliases or (replicate := tuple(replicate))):
            return self
        added = {text: _entries(spec) for text, spec in specs.items()}
        return Strategy.model_validate(
            {
                **self.model_dump(),
                "specs": {
                    **added,
                    **{k: v for k, v in self.specs.items() if k not in added},
                },
                "aliases": {**self.aliases, **aliases},
                "replicate": tuple(dict.fromkeys((*self.replicate, *replicate))),
            }
        ).placed(self._places)

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


def _entries(spec: Any) -> tuple[str | Axes, ...]:
    """A `PartitionSpec`, which may end early, in the words of a strategy file."""
    short = isinstance(spec, PartitionSpec) and len(spec) > 0
    entries = tuple(
        "*"
        if entry is PartitionSpec.UNCONSTRAINED
        else ""
        if entry is None
        else entry
        if isinstance(entry, str)
        else tuple(entry)
        for entry in spec
    )
    return (*entries, "...") if short else entries


def _dotted(table: dict[str, object], prefix: str = "") -> dict[str, object]:
    """TOML reads `seq.residual = x` as a nested table; both spellings are one name."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(_dotted(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


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
        axes: Mesh axes with more than one device or named by the strategy, slowest
            network first; devices are laid out row-major in this order.
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
