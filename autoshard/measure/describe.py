"""From the devices at hand to a chip type: what is measured, and what is taken over."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

from autoshard.cost.collectives import Meshes
from autoshard.cost.network import Fabric, Group
from autoshard.ir.errors import InputError
from autoshard.ir.mesh import AXES
from autoshard.measure import programs
from autoshard.measure.effort import FULL, Effort, seconds_of_one
from autoshard.measure.fit import Sample, fit_link
from autoshard.plan.chip import NAME, ChipType, Figure, Link, load_type
from autoshard.plan.cluster import Cluster
from autoshard.plan.devices import row_major

Log = Callable[[str], None]

DEVICE_KINDS = {
    "a100-40g": r"A100.*40GB",
    "a100-80g": r"A100.*80GB",
    "b200": r"B200",
    "h100": r"H100",
    "h200": r"H200",
    "v100-16g": r"V100.*16GB",
    "v100-32g": r"V100.*32GB",
    "v4": r"TPU v4$",
    "v5e": r"TPU v5 lite|TPU v5e",
    "v5p": r"TPU v5p?$",
    "v6e": r"TPU v6",
    "tpu7x": r"TPU ?7",
}
"""What JAX calls the devices of a chip type (`Device.device_kind`)."""

KEEP_HALF_BYTES = 1024.0
"""A half-way piece below this is no ramp that the sizes measured can show."""


def calibrate(
    devices: Sequence[Any] | None = None,
    *,
    name: str | None = None,
    base: str | None = None,
    effort: Effort = FULL,
    log: Log | None = None,
) -> Cluster:
    """Measures products, memory and collectives, and describes the chip by them.

    Args:
        devices: Of one host; this process's own when None.
        name: Of the chip type; made from the kind of the devices when None.
        base: Chip type that what cannot be measured on one host is taken from: its
            network between hosts, the memory of a chip, its torus. Found by the kind of
            the devices when None.
        effort: What is measured and how long.
        log: Called with each result in words.

    Returns:
        The devices as a cluster. Each figure's source says how it was got.

    Raises:
        InputError: There is no device, no chip type for what cannot be measured, or the
            times cannot be told from noise.
    """
    devices = _local_devices() if devices is None else list(devices)
    if not devices:
        raise InputError("There is no device to measure.")
    if name is not None and not re.fullmatch(NAME, name):
        raise InputError(
            f"A chip type cannot be called {name!r}: letters, digits and '.', '_', '-' "
            "are allowed."
        )
    say = log or (lambda _: None)
    below = _base(devices[0], base)
    kind = str(devices[0].device_kind)
    today = datetime.date.today().isoformat()
    source = (
        f"measured by autoshard calibrate on {len(devices)} x {kind}, {today}, jax "
        f"{jax.__version__}"
    )
    peaks, shares = _products(devices, below, effort, source, say)
    rate, stream_share = _memory(devices, below, effort, source, say)
    links = _links(devices, below, effort, source, say)
    count, shape = len(devices), _shape(devices, below)
    fields: dict[str, Any] = {
        "name": name or re.sub(r"[^A-Za-z0-9._-]+", "-", kind).strip("-").lower(),
        "kind": below.kind,
        "about": f"{kind}, {count} of one host. Peaks are the best that was reached.",
        "peak_flops_per_s": peaks,
        "matmul_efficiency": shares,
        "hbm_bytes": _capacity(devices, below),
        "hbm_bytes_per_s": rate,
        "hbm_efficiency": stream_share,
        "chips_per_node": below.chips_per_node
        if below.kind == "tpu"
        else Figure(value=float(count), source=f"counted; {source}"),
        "links": links,
        "default_shape": shape,
    }
    return Cluster(chip=ChipType(**fields), shape=shape)


def _local_devices() -> list[Any]:
    try:
        return jax.local_devices()
    except RuntimeError as error:
        raise InputError(f"JAX finds no device here: {error}") from error


def _base(device: Any, name: str | None) -> ChipType:
    """The chip type to take over from."""
    platform, kind = str(device.platform), str(device.device_kind)
    if name is None:
        found = [n for n, pattern in DEVICE_KINDS.items() if re.search(pattern, kind)]
        name = "cpu" if platform == "cpu" else (found or [None])[0]
    if name is None:
        raise InputError(
            f"No chip type of the catalogue is a {kind!r}. What cannot be measured on "
            "one host (the network between hosts, the memory of a chip) is taken from "
            "a chip type: name one with base, or a cluster file of your own; on the "
            "command line --base h100."
        )
    base = load_type(name)
    if base.kind != platform:
        raise InputError(
            f"The chip type {name} is of kind {base.kind!r}, and the devices here are "
            f"of kind {platform!r} ({kind}). Name another base."
        )
    if base.name == "tpu7x":
        raise InputError(
            "JAX shows each TPU7x chip as two devices, and the catalogue counts chips: "
            "it cannot be calibrated. Take the chip type tpu7x as it is."
        )
    return base


def _products(
    devices: Sequence[Any], base: ChipType, effort: Effort, source: str, say: Log
) -> tuple[dict[str, Figure], Figure]:
    """Best rate per dtype, and what products of all sizes reach of it on average."""
    small = base.kind == "cpu"
    sizes = effort.cpu_matmul_sizes if small else effort.matmul_sizes
    peaks: dict[str, Figure] = {}
    shares: list[float] = []
    for dtype in base.peak_flops_per_s:
        rates = []
        for size in sizes:
            what = f"a {dtype} product of side {size}"
            try:
                with jax.enable_x64(True) if dtype == "f64" else nullcontext():
                    run, flops = programs.matmul(devices, size, dtype)
                    rates.append(flops / seconds_of_one(run, effort, what))
            except (
                # What JAX and its backends raise where a chip has no such product.
                jax.errors.JaxRuntimeError,
                NotImplementedError,
                TypeError,
            ) as error:
                reason = str(error).partition("\n")[0]
                say(f"{what} does not run here and is left out: {reason}")
                break
        if len(rates) < len(sizes):
            continue
        at = sizes[int(np.argmax(rates))]
        peaks[dtype] = _figure(max(rates), f"{source}: square products, best at {at}")
        shares += [rate / max(rates) for rate in rates]
        say(f"{dtype} products: {max(rates) / 1e12:.4g} TFLOP/s at side {at}")
    if not peaks:
        raise InputError("No matrix product runs on these devices.")
    average = float(np.exp(np.mean(np.log(shares))))
    sides = ", ".join(map(str, sizes))
    return peaks, _figure(
        average, f"{source}: geometric mean of square products of side {sides}"
    )


def _memory(
    devices: Sequence[Any], base: ChipType, effort: Effort, source: str, say: Log
) -> tuple[Figure, Figure]:
    """The best of copy and triad, and the other's share of it."""
    bytes_ = effort.cpu_stream_bytes if base.kind == "cpu" else effort.stream_bytes
    rates = []
    for what, arrays in (("copy", 1), ("triad", 2)):
        run, moved = programs.stream(devices, bytes_, arrays)
        rates.append(moved / seconds_of_one(run, effort, f"a {what} of memory"))
        say(f"memory, {what}: {rates[-1] / 1e9:.4g} GB/s")
    share = float(np.sqrt(min(rates) / max(rates)))
    return (
        _figure(max(rates), f"{source}: the better of copy and triad"),
        _figure(share, f"{source}: geometric mean of copy and triad"),
    )


def _capacity(devices: Sequence[Any], base: ChipType) -> Figure:
    if base.kind != "cpu":
        held = base.hbm_bytes
        return Figure(value=held.value, source=f"as {base.name}: {held.source}")
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        source = f"as {base.name}, the host does not say: {base.hbm_bytes.source}"
        return Figure(value=base.hbm_bytes.value, source=source)
    source = f"memory of the host (sysconf SC_PHYS_PAGES), shared by {len(devices)}"
    return Figure(value=float(pages // len(devices)), source=source)


def _links(
    devices: Sequence[Any], base: ChipType, effort: Effort, source: str, say: Log
) -> tuple[Link, ...]:
    """The innermost link as measured; outer ones as in the base."""
    outer = [_taken(link, f"one host only; as {base.name}") for link in base.links[1:]]
    if len(devices) < 2:
        say(
            f"one device has no links to measure; they are those of {base.name}. "
            "--devices 8 measures virtual ones."
        )
        why = f"one device only; as {base.name}"
        return (_taken(base.links[0], why), *outer)
    samples = []
    sizes = effort.cpu_message_bytes if base.kind == "cpu" else effort.message_bytes
    placed, pairs = row_major(devices), [2] * (len(devices) % 2 == 0)
    counts = sorted({*pairs, len(devices)})
    for count, kind in ((c, k) for c in counts for k in programs.COLLECTIVES):
        group = _group(placed, count, base)
        for bytes_ in sizes:
            run, real = programs.collective(placed, kind, bytes_, count)
            what = f"{kind} of {real} bytes over {count} devices"
            samples.append(
                Sample(kind, group, float(real), seconds_of_one(run, effort, what))
            )
        rate = max(s.bytes_ / s.seconds for s in samples[-len(sizes) :])
        say(f"{kind} over {count} devices: up to {rate / 1e9:.4g} GB/s")
    whole = Cluster(chip=base, shape=_shape(devices, base))
    found = fit_link(samples, Fabric.of(whole))
    how = (
        f"{source}: fitted to {len(samples)} collectives of {sizes[0]} to {sizes[-1]} "
        f"bytes over {' and '.join(map(str, counts))} devices, median error "
        f"{found.error:.0%}"
    )
    say(f"links: {found.bytes_per_s / 1e9:.4g} GB/s, median error {found.error:.0%}")
    figures = {
        "bytes_per_s": found.bytes_per_s,
        "latency_s": found.latency_s,
        "launch_s": found.launch_s,
    }
    if found.half_bytes >= KEEP_HALF_BYTES:
        figures["half_bytes"] = found.half_bytes
    if base.links[0].switch_efficiency is not None and found.switch_efficiency:
        figures["switch_efficiency"] = found.switch_efficiency
    updates: dict[str, Any] = {
        name: _figure(value, how) for name, value in figures.items()
    }
    updates["efficiency"] = Figure(
        value=1.0, source="bytes_per_s is what was reached, not a peak"
    )
    absent = {"half_bytes", "switch_efficiency"} - set(figures)
    updates.update(dict.fromkeys(absent))
    return (base.links[0].model_copy(update=updates), *outer)


def _taken(link: Link, why: str) -> Link:
    """A link that was not measured, with each figure's source saying so."""
    changed = {
        name: Figure(value=value.value, source=f"not measured, {why}: {value.source}")
        for name in Link.model_fields
        if isinstance(value := getattr(link, name), Figure)
    }
    return link.model_copy(update=changed)


def _figure(value: float, source: str) -> Figure:
    # Four digits are more than repeats of a measurement agree in.
    return Figure(value=float(f"{value:.4g}"), source=source)


# --- where the devices are ---


def _shape(devices: Sequence[Any], base: ChipType) -> tuple[int, ...]:
    count = len(devices)
    if base.kind == "tpu":
        places = zip(*(d.coords for d in devices), strict=True)
        sides = [len(set(side)) for side in places][: base.links[0].torus_dims]
        return tuple(sorted(sides, key=lambda side: (side == 1, side)))
    return (1, count) if base.kind == "gpu" else (count,)


def _group(devices: Sequence[Any], members: int, base: ChipType) -> Group:
    """A group of neighbours, over the links of the base."""
    if base.kind != "tpu":
        return Group(inside=float(members))
    chips = Cluster(chip=base, shape=_shape(devices, base))
    of = {"tensor": members, "data": len(devices) // members}
    sizes = np.array([[of.get(axis, 1) for axis in AXES]])
    found = Meshes(chips, sizes).group(frozenset(["tensor"]))
    fields = ("inside", "links", "hops", "crossing", "stride")
    return Group(**{f: float(np.ravel(getattr(found, f))[0]) for f in fields})
