"""Chip types: what one chip can do, and the network it comes with.

A chip type is one TOML file in `catalogue/`. Every figure in it is an inline table of
a value and of where the value was published, so that a prediction can be traced to a
data sheet. To add a chip, add a file: nothing here names one. A file of one's own,
given by its path, is read by the same schema. A chip in another system is a file with
`base = "h100"`, which takes over every field, and every level of `links`, that it does
not give.

Three kinds of network are told apart, by the levels of `links`, innermost first:

- `gpu`: "node" (a switch inside a node) and "network" (one card a chip between nodes);
- `tpu`: "ici" (a torus of neighbour links) and "dcn" (the data-center network between
  slices, which one `Cluster`, being one slice, does not cross);
- `cpu`: "host" (virtual devices that share memory).

Bandwidths are of one direction, and per chip; of "ici", per link. All are peaks as
published; what is reached in practice is said by `efficiency` and the other optional
figures of a `Link`, each of them measured.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from autoshard.ir.errors import InputError, NameUnknownError

Kind = Literal["gpu", "tpu", "cpu"]
Level = Literal["node", "network", "ici", "dcn", "host"]
Dtype = Literal["f64", "f32", "bf16", "f16", "f8", "i8"]

LEVELS: dict[Kind, tuple[Level, ...]] = {
    "gpu": ("node", "network"),
    "tpu": ("ici", "dcn"),
    "cpu": ("host",),
}
_LEVELS_OF: dict[str, tuple[Level, ...]] = {
    "launch_s": ("node", "ici", "host"),
    "switch_efficiency": ("node",),
    "congestion": ("network", "dcn"),
}
NAME = r"^[A-Za-z0-9._-]+$"
"""What a chip type may be called."""

_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
PositiveInt = Annotated[int, Field(gt=0, strict=True)]
Shape = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class Model(BaseModel):
    """Frozen, and without fields that the schema does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(Model):
    """A positive number, and where it was published.

    Attributes:
        value: The number, in the unit that the name of the field ends in.
        source: The document and, within it, the table or the line.

    >>> Figure(value=989.4e12, source="NVIDIA H100 datasheet (SXM5), dense bf16").value
    989400000000000.0
    """

    value: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
    source: _Text


class Link(Model):
    """One level of the network.

    Attributes:
        level: What the link joins; see the module's docstring.
        bytes_per_s: One direction, per chip; at level "ici", per link.
        latency_s: Of one hop, or of one step of a ring.
        efficiency: Share of `bytes_per_s` that large messages reach; at level
            "network", between two nodes.
        half_bytes: A rank's piece of the buffer at which its rate is half-way from that
            of small messages to that of large ones.
        launch_s: At the innermost level only: time of a collective that moves nothing.
        switch_efficiency: At level "node" only: share of `bytes_per_s` at which the
            switch itself adds (NVLink SHARP); absent where it cannot.
        congestion: At level "network" or "dcn" only: N > 2 nodes get
            (2 / N) ** congestion of the rate of two.
        torus_dims: At level "ici" only: how many dims the torus has.
        max_shape: At level "ici" only: the largest torus there is.
        wrap_multiple: At level "ici" only: a dim that is a multiple of this is a ring.
        wrap_whole: At level "ici" only: whether rings need all dims to be multiples.
        torus_source: At level "ici" only: where these four were published.

    >>> load_type("v5e").links[0].wrap_multiple
    16
    """

    level: Level
    bytes_per_s: Figure
    latency_s: Figure
    efficiency: Figure | None = None
    half_bytes: Figure | None = None
    launch_s: Figure | None = None
    switch_efficiency: Figure | None = None
    congestion: Figure | None = None
    torus_dims: Literal[2, 3] | None = None
    max_shape: Shape | None = None
    wrap_multiple: PositiveInt | None = None
    wrap_whole: bool | None = None
    torus_source: _Text | None = None

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        for name in ("efficiency", "switch_efficiency"):
            share = getattr(self, name)
            if share is not None and share.value > 1:
                raise ValueError(f"{name} is {share.value}; it is a share of the peak")
        for name, levels in _LEVELS_OF.items():
            if getattr(self, name) is not None and self.level not in levels:
                raise ValueError(
                    f'{name} is not used in the link of level "{self.level}"'
                )
        return self

    @model_validator(mode="after")
    def _check_torus(self) -> Self:
        names = ["torus_dims", "max_shape", "wrap_multiple", "wrap_whole"]
        names.append("torus_source")
        for name in names:
            given = getattr(self, name) is not None
            if given != (self.level == "ici"):
                needed = "needed" if self.level == "ici" else "not used"
                raise ValueError(
                    f'{name} is {needed} in the link of level "{self.level}"'
                )
        if self.max_shape and len(self.max_shape) != self.torus_dims:
            raise ValueError(
                f"max_shape has {len(self.max_shape)} dims and torus_dims is "
                f"{self.torus_dims}"
            )
        return self


class Host(Model):
    """What a chip has of the host that it sits in.

    Attributes:
        bytes_per_s: Of the link between the two, one direction, per chip.
        efficiency: Share of it that large copies reach.
        memory_bytes: Of the host's memory, by the chips that share it.

    >>> load_type("h100").host.bytes_per_s.value
    64000000000.0
    """

    bytes_per_s: Figure | None = None
    efficiency: Figure | None = None
    memory_bytes: Figure | None = None

    @model_validator(mode="after")
    def _check_share(self) -> Self:
        if self.efficiency is not None and self.efficiency.value > 1:
            raise ValueError(
                f"efficiency is {self.efficiency.value}; it is a share of the peak"
            )
        return self


class ChipType(Model):
    """All that is known of one chip and of the system it comes in.

    Attributes:
        name: What a person writes before the colon: "h100".
        kind: "gpu", "tpu" or "cpu"; decides the levels of `links`.
        about: One or two sentences for people.
        chips_per_node: Chips that share a host.
        peak_flops_per_s: Per chip and dtype, without sparsity. For "f32", what JAX's
            default matmul precision runs (TF32 or bf16 passes where the chip has them).
        hbm_bytes: Memory of one chip.
        hbm_bytes_per_s: Its bandwidth.
        links: Levels of the network, innermost first.
        default_shape: The shape taken when none is asked for.
        matmul_efficiency: Share of `peak_flops_per_s` that large products reach on
            average; absent where the cost model's own is to be taken.
        hbm_efficiency: The same of `hbm_bytes_per_s`.
        generation: Chips whose kernels behave alike: "hopper"; absent for others than
            those that the cost model knows.
        power_share: Power of a limited part over that of the full one.
        host: Link to the host and memory there; figures that nobody has published are
            absent, and then nothing can be offloaded.

    >>> load_type("v5p").links[0].torus_dims
    3
    """

    name: Annotated[_Text, StringConstraints(pattern=NAME)]
    kind: Kind
    about: _Text
    chips_per_node: Figure
    peak_flops_per_s: Annotated[dict[Dtype, Figure], Field(min_length=1)]
    hbm_bytes: Figure
    hbm_bytes_per_s: Figure
    links: tuple[Link, ...]
    default_shape: Shape | None = None
    matmul_efficiency: Figure | None = None
    hbm_efficiency: Figure | None = None
    generation: _Text | None = None
    power_share: Figure | None = None
    host: Host = Host()

    @model_validator(mode="after")
    def _check_links(self) -> Self:
        levels = tuple(link.level for link in self.links)
        if levels != LEVELS[self.kind]:
            raise ValueError(
                f'a chip of kind "{self.kind}" has links of the levels '
                f"{', '.join(LEVELS[self.kind])}, innermost first; these are "
                f"{', '.join(levels) or 'none'}"
            )
        if not self.chips_per_node.value.is_integer():
            raise ValueError(
                f"chips_per_node is {self.chips_per_node.value}, not whole"
            )
        return self


def names() -> list[str]:
    """Chip types that autoshard ships, sorted.

    >>> "h100" in names()
    True
    """
    files = _catalogue().iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name[-5:] == ".toml")


def load_type(name_or_path: str) -> ChipType:
    """Reads one chip type, by its name or from a TOML file of one's own.

    Args:
        name_or_path: One of `names()`, or a path: it ends in ".toml" or has a "/".

    Raises:
        NameUnknownError: No chip type has this name.
        InputError: The file cannot be read, is not TOML, or does not fit the schema.

    >>> load_type("h100").hbm_bytes_per_s.source
    'NVIDIA H100 datasheet (SXM5), memory bandwidth'
    """
    if is_path(name_or_path):
        where, file = name_or_path, Path(name_or_path)
    elif name_or_path in names():
        file = _catalogue() / f"{name_or_path}.toml"
        where = file.name
    else:
        close = difflib.get_close_matches(name_or_path.lower(), names(), 3, 0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise NameUnknownError(
            f"No chip type is called {name_or_path!r}.{hint} There are "
            f"{', '.join(names())}; a file of your own is given by its path, as in "
            "./mine.toml:64."
        )
    return _parse_type(_read(file, where), where)


def _read(file: Any, where: str) -> dict[str, Any]:
    """The document of a chip type, with what it takes over from its `base`."""
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(
            f"The cluster file {where} cannot be read: {e.strerror}."
        ) from e
    except ValueError as e:  # tomllib's error and the one of text that is not UTF-8
        raise InputError(f"The cluster file {where} is not TOML: {e}.") from e
    base = data.pop("base", None)
    if base is None:
        return data
    if base not in names() or f"{base}.toml" == where:
        raise InputError(
            f"The cluster file {where} is based on {base!r}, which is not a chip type "
            f"that autoshard ships: {', '.join(names())}."
        )
    below = _read(_catalogue() / f"{base}.toml", f"{base}.toml")
    own = data.get("links")
    if isinstance(own, list) and all(isinstance(link, dict) for link in own):
        levels = {link.get("level"): link for link in below["links"]}
        levels.update((link.get("level"), link) for link in own)
        data["links"] = list(levels.values())
    return {**below, **data}


def _parse_type(data: dict[str, Any], where: str) -> ChipType:
    try:
        return ChipType.model_validate(data)
    except ValidationError as e:
        lines = []
        for error in e.errors():
            field = ".".join(str(part) for part in error["loc"] if part != "[key]")
            what = error["msg"].removeprefix("Value error, ")
            if error["type"] == "missing":
                what = "is missing"
            elif error["type"] == "extra_forbidden":
                what = "is not a field of a cluster file"
            lines.append(f"  {field}: {what}" if field else f"  {what}")
        raise InputError(
            f"The cluster file {where} does not describe a chip type:\n"
            + "\n".join(lines)
            + "\nA figure is an inline table with the place it was published in: "
            'hbm_bytes = { value = 80e9, source = "data sheet" }. The files that '
            f"autoshard ships ({', '.join(names())}) are examples."
        ) from e


def to_toml(chip: ChipType) -> str:
    """A chip type as the text of a cluster file, which `load_type` reads.

    >>> chip = load_type("v5e")
    >>> _parse_type(tomllib.loads(to_toml(chip)), "v5e") == chip
    True
    """
    data = chip.model_dump(mode="json", exclude_none=True)
    links, tables = data.pop("links"), {"peak_flops_per_s": data["peak_flops_per_s"]}
    del data["peak_flops_per_s"]
    lines = [f"{key} = {_toml(value)}" for key, value in data.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in table.items())]
    for link in links:
        lines += ["", "[[links]]", *(f"{k} = {_toml(v)}" for k, v in link.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    # TOML writes text, numbers and truth as JSON does, but for the character DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def is_path(name: str) -> bool:
    """Whether a chip type is given by its path rather than by its name.

    >>> is_path("mine.toml"), is_path("h100")
    (True, False)
    """
    return name.endswith(".toml") or "/" in name or "\\" in name


def _catalogue() -> Any:  # a Traversable, whose import place differs by Python version
    return resources.files("autoshard.plan") / "catalogue"
