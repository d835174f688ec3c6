"""Clusters: so many chips of one type, in one shape, as people write them.

    >>> cluster("v5p:64").shape
    (4, 4, 4)

What one chip can do, and how chips are linked, is data: see `autoshard.plan.chip`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from typing import Any, Self

from pydantic import model_validator

from autoshard.ir.errors import InputError
from autoshard.plan.chip import ChipType as ChipType
from autoshard.plan.chip import Figure as Figure
from autoshard.plan.chip import Host as Host
from autoshard.plan.chip import Kind as Kind
from autoshard.plan.chip import Link as Link
from autoshard.plan.chip import Model, Shape, is_path
from autoshard.plan.chip import load_type as load_type
from autoshard.plan.chip import names as names

# The names that NumPy and JAX give to the dtypes of a peak.
_DTYPE_ALIASES = {
    "float64": "f64",
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float8_e4m3fn": "f8",
    "float8_e5m2": "f8",
    "int8": "i8",
}


class Cluster(Model):
    """So many chips of one type, in one shape.

    Attributes:
        chip: The chip and the system it comes in, with the source of each figure.
        shape: gpu: (nodes, chips in each). tpu: the dims of the torus. cpu: (devices,).

    >>> c = cluster("h100:64")
    >>> c.name, c.num_chips, c.nodes, c.peak_flops_per_s("bf16")
    ('h100:8x8', 64, 8, 989400000000000.0)
    """

    chip: ChipType
    shape: Shape

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        _check_shape(self.chip, self.shape)
        return self

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Cluster({self.name})"

    @property
    def type_name(self) -> str:
        """Name of the chip type."""
        return self.chip.name

    @property
    def kind(self) -> Kind:
        """What the network is made of: "gpu", "tpu" or "cpu"."""
        return self.chip.kind

    @property
    def name(self) -> str:
        """The full form of what `cluster` reads: "h100:8x8"."""
        return f"{self.chip.name}:{_text(self.shape)}"

    @property
    def num_chips(self) -> int:
        """How many chips there are."""
        return math.prod(self.shape)

    @property
    def chips_per_node(self) -> int:
        """How many chips of this cluster share a host."""
        if self.kind == "gpu":
            return self.shape[1]
        return min(int(self.chip.chips_per_node.value), self.num_chips)

    @property
    def nodes(self) -> int:
        """How many hosts the chips are on."""
        return math.ceil(self.num_chips / self.chips_per_node)

    @property
    def links(self) -> tuple[Link, ...]:
        """Levels of the network, innermost first."""
        return self.chip.links

    @property
    def hbm_bytes(self) -> int:
        """Memory of one chip."""
        return int(self.chip.hbm_bytes.value)

    @property
    def hbm_bytes_per_s(self) -> float:
        """Bandwidth of one chip's memory."""
        return self.chip.hbm_bytes_per_s.value

    @property
    def host_lacks(self) -> str:
        """The figure without which nothing can be offloaded; empty if all are there.

        >>> cluster("v5e:4").host_lacks, cluster("h100:8").host_lacks
        ('host.bytes_per_s', '')
        """
        for name in ("bytes_per_s", "memory_bytes"):
            if getattr(self.chip.host, name) is None:
                return f"host.{name}"
        return ""

    def _of_host(self, name: str) -> float:
        figure = getattr(self.chip.host, name)
        if figure is None:
            raise InputError(
                f"{self.chip.name} has no figure host.{name}, which is required to "
                "keep anything in the host's memory: nobody has published it. Set "
                "offload = [], or give the figure in the [host] table of a cluster "
                "file of your own."
            )
        return float(figure.value)

    @property
    def host_bytes_per_s(self) -> float:
        """What large copies reach between a chip and its host, one direction.

        Raises:
            InputError: The chip has no published figure.
        """
        share = self.chip.host.efficiency
        return self._of_host("bytes_per_s") * (share.value if share else 1.0)

    @property
    def host_memory_bytes(self) -> float:
        """A chip's part of the host's memory.

        Raises:
            InputError: The chip has no published figure.

        >>> cluster("h100:8").host_memory_bytes
        250000000000.0
        """
        return self._of_host("memory_bytes")

    @property
    def rings(self) -> tuple[bool, ...]:
        """For each dim of a torus, whether its ends are joined; empty without a torus.

        >>> cluster("v5e:8x16").rings, cluster("v5p:2x4x4").rings
        ((False, True), (False, False, False))
        """
        ici = self.links[0]
        if ici.wrap_multiple is None:
            return ()
        whole = tuple(dim % ici.wrap_multiple == 0 for dim in self.shape)
        return whole if all(whole) or not ici.wrap_whole else (False,) * len(whole)

    @property
    def fingerprint(self) -> str:
        """12 hex digits that change when a value does, but not when a sentence does."""
        data = {"chip": _values(self.chip.model_dump()), "shape": self.shape}
        text = json.dumps(data, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def peak_flops_per_s(self, dtype: str) -> float:
        """Peak of the matrix units of one chip, without sparsity.

        Args:
            dtype: "bf16", "f32", ..., or the name JAX gives it: "bfloat16".

        Raises:
            InputError: The chip has no published figure for the dtype.

        >>> cluster("v100-16g:8").peak_flops_per_s("float16")
        125000000000000.0
        """
        peaks = self.chip.peak_flops_per_s
        key = _DTYPE_ALIASES.get(dtype, dtype)
        for known, figure in peaks.items():
            if known == key:
                return figure.value
        raise InputError(
            f"{self.chip.name} has no peak FLOP/s for the dtype {dtype!r}; it has "
            f"{', '.join(peaks)}. Compute in one of these, or give the figure in a "
            "cluster file of your own."
        )


def cluster(spec: str) -> Cluster:
    """Reads a cluster as people write it.

    Args:
        spec: "h100:64" (chips), "h100:8x8" (nodes x chips in each), "v5p:4x4x4" (a
            torus), "v5p:64" (the most cubic torus of so many chips), "cpu:8",
            "own.toml:64", or "own.toml" where the file has a `default_shape`.

    Raises:
        NameUnknownError: No chip type has this name.
        InputError: The count or the shape is missing, or the type does not come in it,
            or a file of one's own cannot be used.

    >>> [cluster(s).name for s in ("h100:16", "v5p:128", "v5e:8", "cpu:8")]
    ['h100:2x8', 'v5p:4x4x8', 'v5e:2x4', 'cpu:8']
    """
    head, colon, tail = spec.strip().rpartition(":")
    if not colon or tail.endswith(".toml"):  # the latter: a drive letter's colon
        head, tail = spec.strip(), ""
    chip = load_type(head)
    if tail:
        shape = _parse_shape(chip, spec, tail)
    elif chip.default_shape is not None:
        shape = chip.default_shape
    else:
        also = ", or give the file a default_shape" if is_path(head) else ""
        raise InputError(
            f"The cluster {spec!r} says no number of chips; write it after a colon, as "
            f"in {head}:8{also}."
        )
    _check_shape(chip, shape)
    return Cluster(chip=chip, shape=shape)


def _parse_shape(chip: ChipType, spec: str, tail: str) -> tuple[int, ...]:
    # Nine digits a dim: no cluster needs more, and none of them can overflow.
    if not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", tail):
        raise InputError(
            f"The cluster {spec!r} has {tail!r} after the colon; a number of chips "
            f"(64) or a shape ({_example(chip)}) is required there."
        )
    shape = tuple(int(dim) for dim in tail.split("x"))
    if 0 in shape:
        raise InputError(f"The cluster {spec!r} has no chips; a dim of its shape is 0.")
    if len(shape) > 1 or chip.kind == "cpu":
        return shape
    count = math.prod(shape)
    if chip.kind == "gpu":
        per_node = int(chip.chips_per_node.value)
        if count > per_node and count % per_node:
            below = count // per_node * per_node
            raise InputError(
                f"{chip.name}:{count} is more than one node and not a whole number of "
                f"nodes of {per_node} chips; take {below} or {below + per_node} chips, "
                "or write the shape as nodes x chips in each."
            )
        return (count // per_node, per_node) if count > per_node else (1, count)
    tori = [s for s in _tori(chip.links[0]) if math.prod(s) == count]
    if not tori:
        counts = sorted({math.prod(s) for s in _tori(chip.links[0])})
        near = [n for n in counts if n < count][-1:] + [n for n in counts if n > count]
        raise InputError(
            f"{chip.name} has no torus of {count} chips; the nearest have "
            f"{' and '.join(str(n) for n in near[:2])}, the largest {counts[-1]}."
        )
    return min(tori, key=lambda dims: (sum(dims), max(dims)))


def _check_shape(chip: ChipType, shape: tuple[int, ...]) -> None:
    """Raises InputError where a type does not come in a shape."""
    name = f"{chip.name}:{_text(shape)}"
    per_node = int(chip.chips_per_node.value)
    ici = chip.links[0]
    num_dims = {"gpu": 2, "tpu": ici.torus_dims, "cpu": 1}[chip.kind]
    if len(shape) != num_dims:
        what = {"gpu": "nodes x chips in each", "tpu": "a torus", "cpu": "a number"}
        raise InputError(
            f"{name} has {len(shape)} dims; the shape of {chip.name} is "
            f"{what[chip.kind]} and has {num_dims}, as in {chip.name}:{_example(chip)}."
        )
    if chip.kind != "tpu" and shape[-1] > per_node:
        raise InputError(
            f"{name} has {shape[-1]} chips in a node; a node of {chip.name} has at "
            f"most {per_node}."
        )
    if chip.kind == "tpu" and _sorted_dims(shape) not in _tori(ici):
        multiple = ici.wrap_multiple or 1
        parts = [str(n) for n in range(1, multiple + 1) if multiple % n == 0]
        if ici.wrap_whole:
            rule = f"its dims are all of {', '.join(parts)}, or all multiples of"
        else:
            rule = f"each of its dims is one of {', '.join(parts)}, or a multiple of"
        raise InputError(
            f"{chip.name} does not come as {_text(shape)}: {rule} {multiple}, and the "
            f"largest torus is {_text(ici.max_shape or ())}."
        )


def _tori(ici: Link) -> list[tuple[int, ...]]:
    """All tori that an "ici" link allows, each with its dims as `_sorted_dims` does.

    Below `wrap_multiple` only its divisors tile a pod (1, 2, 4 chips of a side of 4).
    Cloud TPU docs, "TPU types and topologies", state this for v4: dims are all at most
    4, or all multiples of 4.
    """
    assert ici.max_shape is not None
    assert ici.wrap_multiple is not None
    bound, multiple = sorted(ici.max_shape), ici.wrap_multiple
    sides = [n for n in range(1, multiple) if multiple % n == 0]
    sides += range(multiple, bound[-1] + 1, multiple)
    found = []
    for dims in itertools.combinations_with_replacement(sides, len(bound)):
        fits = all(dim <= most for dim, most in zip(dims, bound, strict=True))
        whole = all(dim % multiple == 0 for dim in dims)
        if fits and (whole or not ici.wrap_whole or dims[-1] <= multiple):
            found.append(_sorted_dims(dims))
    return found


def _sorted_dims(dims: tuple[int, ...]) -> tuple[int, ...]:
    # Ascending with the ones last, as topologies are named: 4x4x8, but 2x2x1.
    return tuple(sorted(dims, key=lambda dim: (dim == 1, dim)))


def _values(node: Any) -> Any:
    """A dumped model without its prose, and with each figure as its bare value."""
    if isinstance(node, dict):
        if set(node) == set(Figure.model_fields):
            return node["value"]
        prose = {"about", "torus_source", "default_shape"}
        return {k: _values(v) for k, v in node.items() if k not in prose}
    return [_values(v) for v in node] if isinstance(node, (list, tuple)) else node


def _example(chip: ChipType) -> str:
    if chip.kind == "tpu":
        return _text((4,) * (chip.links[0].torus_dims or 1))
    return f"2x{chip.chips_per_node.value:.0f}" if chip.kind == "gpu" else "8"


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(str(dim) for dim in shape)
