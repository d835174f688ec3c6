"""A strategy: the policy by which a program is spread, with holes for the search.

A plan holds one without holes; see `autoshard.plan.schema`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from jax.sharding import PartitionSpec
from pydantic import Field, PrivateAttr, field_validator, model_validator

from autoshard.ir.errors import NameUnknownError
from autoshard.ir.mesh import check_axis
from autoshard.ir.remat import check_remat, parts_of
from autoshard.plan.base import Record

Auto = Literal["auto"]
Axes = tuple[str, ...]
PipelineSchedule = Literal["none", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2"]
Vocab = Literal["ends", "spread"]
ContextKind = Literal["all_gather", "ring", "ulysses", "usp"]
STATES = ("params", "gradients", "optimizer")
Offloadable = Literal["optimizer", "params", "activations"]
OFFLOADABLE: tuple[Offloadable, ...] = ("optimizer", "params", "activations")
"""What may be kept in the host's memory, in the order in which it is written down."""
REMAT_HOLES = ("auto", "mix")
"""One policy for all blocks is to be found, or a mix of two where that is better."""


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
        pipeline: Schedule of the stages, `"none"` where there is one; for the others
            see `autoshard.cost.pipeline.Pipeline`.
        virtual: Parts of a stage, more than one for `"interleaved"` alone.
        vocab: Where the embedding and the output projection are: at the pipeline's
            `"ends"`, or `"spread"` over all stages.
        blocks: Blocks of every part of every stage, in the order in which data passes
            them; empty for a cut that is as balanced as can be.
        context_kind: What attention does with keys and values of a sequence that is
            sharded over `context`; see `autoshard.cost.context`.
        context_heads: Under `"usp"`, how many devices share heads, the others being a
            ring; 0 for the fastest number.
        remat: What of each block the backward pass recomputes: `"none"`, `"full"`,
            `"dots"` for all but the results of products with weights, or
            `"save:NAME+NAME"` for all but the values of these names
            (`jax.ad_checkpoint.checkpoint_name`); or a mix, `"full=8,none=24"`: so for
            the first 8 blocks, and so for the 24 after them. Beside the hole `"auto"`
            there is `"mix"`, for which search tries mixes of two policies, too.
        offload: What is kept in the host's memory, of `OFFLOADABLE`: the `"optimizer"`
            state, the `"params"`, and the `"activations"` that are kept for the
            backward pass; see `autoshard.cost.offload`.
    """

    microbatches: Annotated[int, Field(ge=1)] | Auto = 1
    pipeline: PipelineSchedule | Auto = "none"
    virtual: Annotated[int, Field(ge=1)] | Auto = 1
    vocab: Vocab | Auto = "ends"
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    context_kind: ContextKind | Auto = "all_gather"
    context_heads: Annotated[int, Field(ge=0)] = 0
    remat: str = "none"
    offload: tuple[Offloadable, ...] | Auto = ()

    @field_validator("offload")
    @classmethod
    def _offload_is_in_order(cls, given: Any) -> Any:
        if given != "auto" and len(set(given)) < len(given):
            raise ValueError(f"offload = {list(given)} names a state twice; keep one")
        return given if given == "auto" else tuple(sorted(given, key=OFFLOADABLE.index))

    @field_validator("remat")
    @classmethod
    def _remat_is_known(cls, text: str) -> str:
        if text in REMAT_HOLES:
            return text
        try:
            return check_remat(text)
        except ValueError as error:
            raise ValueError(f"{error}; 'auto' and 'mix' leave it open") from None

    @property
    def remat_is_open(self) -> bool:
        """Whether what is recomputed is a hole."""
        return self.remat in REMAT_HOLES

    @model_validator(mode="after")
    def _parts_suit_the_schedule(self) -> Schedule:
        fits = self.pipeline in ("auto", "interleaved") or self.virtual in ("auto", 1)
        if not fits or (self.pipeline == "interleaved" and self.virtual == 1):
            raise ValueError(
                f"pipeline = {self.pipeline!r} has virtual = {self.virtual}: "
                "'interleaved' has two parts a stage or more, every other schedule one"
            )
        return self

    @model_validator(mode="after")
    def _heads_are_shared_by_some(self) -> Schedule:
        if self.context_heads and self.context_kind != "usp":
            raise ValueError(
                f"context_heads = {self.context_heads} is with context_kind = "
                f"{self.context_kind!r}: only 'usp' has that number to choose"
            )
        if self.context_heads == 1:
            raise ValueError(
                "context_heads = 1 is a ring: two devices or more share heads under "
                "'usp'; set context_kind = 'ring'"
            )
        return self


class Strategy(Record):
    """A policy: which axes exist, what they shard, and which fields search fills.

    Attributes:
        name: Its name in reports.
        about: One sentence.
        cite: Where it was published.
        mesh: Size per mesh axis; an axis not named has size 1.
        order: How axes are laid out over the devices, the outermost first, row-major:
            the last has its devices next to each other. Axes that are named share the
            places that they have in the canonical order (`ir.mesh.AXES`), the others
            stay where they are in it; none need be named.
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
    order: Axes | Auto = ()
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
        self._check(self.order, "order")
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

    @model_validator(mode="after")
    def _blocks_differ_in_one_stage(self) -> Strategy:
        schedule, stages = self.schedule, self.mesh.get("stage", 1)
        others = {
            f"pipeline = {schedule.pipeline!r}": schedule.pipeline
            not in ("auto", "none"),
            f"stage = {stages}": stages not in ("auto", 1)
            and schedule.pipeline != "none",
            "offload of activations": "activations" in schedule.offload,
        }
        if (
            not schedule.remat_is_open
            and parts_of(schedule.remat)
            and any(others.values())
        ):
            [other, *_] = [text for text, given in others.items() if given]
            raise ValueError(
                f"remat = {schedule.remat!r} has blocks that are not alike, and "
                f"{other} is priced for blocks that are: take one policy for all "
                "blocks, or leave the other out"
            )
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
