"""What a plan says, as JSON-able data that every view is drawn from.

Nothing is computed here that the plan does not imply: sums, shares, local shapes, and
which entry of the policy put an axis where it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from autoshard.ir.errors import InputError, PlanMismatchError
from autoshard.ir.mesh import Spec
from autoshard.plan.schema import Estimate, HostTable, Plan, TensorPlan
from autoshard.plan.strategy import OFFLOADABLE, STATES
from autoshard.plan.views import headline

Document = dict[str, Any]

# The impls that jax.random.key takes: two or four uint32 words a key.
_KEY_BYTES = {"key<fry>": 8, "key<rbg>": 16, "key<urbg>": 16}


def explain(plan: Plan) -> Document:
    """Everything a plan says, as one JSON-able document.

    Args:
        plan: Any plan.

    Returns:
        A dict with the keys `headline`, `program`, `cluster`, `mesh`, `strategy`,
        `rules`, `storage`, `schedule`, `predicted`, `certificate`, `tensors`,
        `collectives` (grouped by kind, axes and source line, the slowest first),
        `annotations`, `blocks`, `conflicts`, `delayed`, `replicated` (as in the plan),
        `constraints` (how many values are `pinned`, of how many `ops`) and `notes`.
        The trail is not in it: see `explain_tensor`. Times are in seconds, memory in
        bytes. Axes of one device shard nothing, and are left out everywhere but in
        `mesh`.

    Raises:
        PlanMismatchError: A dim does not divide over the axes that shard it.
        InputError: A dtype has no known width.
    """
    filled = plan.strategy
    return {
        "headline": headline(plan),
        "program": plan.program.model_dump(mode="json"),
        "cluster": plan.cluster.model_dump(mode="json"),
        "mesh": [{"axis": a.axis, "size": a.size} for a in plan.axes],
        "strategy": {
            "name": filled.name,
            "about": filled.about,
            "cite": list(filled.cite),
        },
        "rules": [
            {"logical": r.logical, "axes": active(plan, r.axes)} for r in filled.rules
        ],
        "storage": {s: active(plan, getattr(filled.storage, s)) for s in STATES},
        "schedule": filled.schedule.model_dump(mode="json"),
        "predicted": _predicted(plan.predicted),
        "certificate": plan.certificate.model_dump(mode="json"),
        "tensors": [tensor_row(plan, t) for t in plan.tensors],
        "collectives": collective_groups(plan.predicted),
        "annotations": plan.annotations.model_dump(mode="json"),
        "blocks": [b.model_dump(mode="json") for b in plan.blocks],
        "conflicts": [c.model_dump(mode="json") for c in plan.conflicts],
        "delayed": [
            {
                **d.model_dump(mode="json"),
                "specs": [[active(plan, dim) for dim in s.dims] for s in d.specs],
            }
            for d in plan.delayed
        ],
        "replicated": [r.model_dump(mode="json") for r in plan.replicated],
        "constraints": {"pinned": len(plan.constraints), "ops": plan.program.ops},
        "not_executable": list(plan.not_executable),
        "notes": list(plan.notes),
    }


def _predicted(estimate: Estimate) -> Document:
    parts = [
        ("matmul", estimate.matmul_s),
        ("memory-bound", estimate.memory_bound_s),
        ("exposed collectives", estimate.collective_s),
    ]
    if estimate.bubble_s or estimate.transfer_s:
        parts.append(("pipeline bubble", estimate.bubble_s))
        parts.append(("stage transfers", estimate.transfer_s))
    if estimate.host_s:
        parts.append(("host transfers", estimate.host_s))
    rest_s = estimate.step_s - sum(time_s for _, time_s in parts)
    # A sum that differs from the step by more than rounding is shown, not hidden.
    if abs(rest_s) > 1e-6 * estimate.step_s:
        parts.append(("overlap" if rest_s < 0 else "other", rest_s))
    memory = estimate.memory
    return {
        "step_s": estimate.step_s,
        "hidden_s": estimate.hidden_s,
        "time": [
            {
                "part": part,
                "time_s": time_s,
                "fraction": _ratio(time_s, estimate.step_s),
            }
            for part, time_s in parts
        ],
        "memory": {
            "parts": [
                {
                    "part": part,
                    "bytes_": getattr(memory, part),
                    "fraction": _ratio(getattr(memory, part), memory.capacity),
                }
                for part in MEMORY_PARTS
            ],
            "total": memory.total,
            "capacity": memory.capacity,
            "fraction": _ratio(memory.total, memory.capacity),
            "host": _on_host(memory.host) if memory.host else None,
        },
        "model_flops": estimate.model_flops,
        "mfu": estimate.mfu,
        "tokens_per_s": estimate.tokens_per_s,
    }


def _on_host(host: HostTable) -> Document:
    return {
        "parts": [
            {
                "part": kind,
                "bytes_": getattr(host, kind),
                "fraction": _ratio(getattr(host, kind), host.capacity),
            }
            for kind in OFFLOADABLE
            if getattr(host, kind)
        ],
        "total": host.total,
        "capacity": host.capacity,
        "fraction": _ratio(host.total, host.capacity),
    }


MEMORY_PARTS = ("params", "gradients", "optimizer", "activations", "other")
"""Fields of `MemoryTable` that add up to its total, in the order they are shown."""


def tensor_row(plan: Plan, tensor: TensorPlan) -> Document:
    """One tensor: shapes, specs, and its bytes over all and on one device."""
    local = local_shape(plan, tensor, tensor.storage)
    width = element_bytes(tensor.dtype)
    return {
        "path": tensor.path,
        "state": tensor.state,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "logical": list(tensor.logical),
        "storage": [active(plan, dim) for dim in tensor.storage.dims],
        "compute": [active(plan, dim) for dim in tensor.compute.dims],
        "local_shape": local,
        "bytes_": math.prod(tensor.shape) * width,
        "bytes_per_device": math.prod(local) * width,
    }


def local_shape(plan: Plan, tensor: TensorPlan, spec: Spec) -> list[int]:
    """Shape on one device of a tensor that lies as `spec` says.

    Raises:
        PlanMismatchError: A dim does not divide over its axes, or the spec has another
            rank than the tensor.
    """
    if len(spec.dims) != len(tensor.shape):
        raise PlanMismatchError(
            f"tensor {tensor.path} has shape {tensor.shape} and the spec {spec!r} of "
            f"{len(spec.dims)} dims; one entry per dim is required. The plan was "
            "edited or is damaged: search again."
        )
    local = []
    for dim, (size, axes) in enumerate(zip(tensor.shape, spec.dims, strict=True)):
        ways = ways_of(plan, axes)
        if size % ways:
            raise PlanMismatchError(
                f"dim {dim} of tensor {tensor.path} has size {size}, which does not "
                f"divide over {'+'.join(axes)} ({ways} ways). The plan was edited: "
                "take other axes for this dim, or search again."
            )
        local.append(size // ways)
    return local


def active(plan: Plan, axes: Iterable[str]) -> list[str]:
    """These axes without those of one device."""
    return [axis for axis in axes if plan.sizes[axis] > 1]


def ways_of(plan: Plan, axes: tuple[str, ...]) -> int:
    """How many pieces these mesh axes cut a dim into."""
    return math.prod(plan.sizes[axis] for axis in axes)


def element_bytes(dtype: str) -> int:
    """Bytes of one element.

    Args:
        dtype: The name JAX prints: "bfloat16", "int32", "key<fry>".

    Raises:
        InputError: No such dtype.

    >>> element_bytes("bfloat16"), element_bytes("key<fry>")
    (2, 8)
    """
    import jax.numpy as jnp

    if dtype in _KEY_BYTES:
        return _KEY_BYTES[dtype]
    try:
        return jnp.dtype(dtype).itemsize
    except TypeError:
        raise InputError(
            f"the plan has a tensor of dtype {dtype!r}, whose width is not known; "
            "a dtype of NumPy or JAX is required, such as 'float32' or 'bfloat16'."
        ) from None


def collective_groups(estimate: Estimate) -> list[Document]:
    """Collectives summed over kind, axes and source line, the slowest first.

    Returns:
        Dicts with `kind`, `axes`, `source`, `runs` (per step), `bytes_` (of all runs,
        on one device), `time_s` (of all runs) and `values` (what is communicated).
    """
    groups: dict[tuple[Any, ...], Document] = {}
    for c in estimate.collectives:
        row = groups.setdefault(
            (c.kind, c.axes, c.source),
            {
                "kind": c.kind,
                "axes": list(c.axes),
                "source": c.source,
                "runs": 0,
                "bytes_": 0,
                "time_s": 0.0,
                "values": {},
            },
        )
        row["runs"] += c.count
        row["bytes_"] += c.bytes_ * c.count
        row["time_s"] += c.time_s
        row["values"][c.value] = None
    return sorted(
        ({**row, "values": list(row["values"])} for row in groups.values()),
        key=lambda row: (-row["time_s"], row["kind"], row["axes"], row["source"]),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
