"""Real devices in the order in which a plan counts the chips of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def row_major(devices: Sequence[Any]) -> list[Any]:
    """Devices as they are linked: neighbours come one after the other.

    TPUs row-major over the dims of their torus, by their coordinates; GPUs by number,
    node after node; others as they are. `jax.make_mesh` does so but for TPUs: it gives
    whole dims of the torus to axes as it sees fit, and has no layout where an axis
    covers a part of a dim (JAX 0.10.2).

    Args:
        devices: Of `jax.devices()`, or of a topology.

    >>> import jax
    >>> row_major(jax.devices("cpu")) == jax.devices("cpu")
    True
    """
    kinds = {device.platform for device in devices}
    if kinds == {"tpu"}:
        return sorted(devices, key=lambda d: (*d.coords, d.core_on_chip))
    if kinds & {"gpu", "cuda", "rocm"}:
        return sorted(devices, key=lambda d: d.id)
    return list(devices)
