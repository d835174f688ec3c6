"""One tensor or one line in depth: where each axis came from, and what moves it."""

from __future__ import annotations

import math

from autoshard.ir.errors import NameUnknownError
from autoshard.plan.schema import Plan, TensorPlan
from autoshard.report.explain import (
    Document,
    active,
    element_bytes,
    local_shape,
    tensor_row,
    ways_of,
)
from autoshard.report.provenance import (
    at_line,
    find_tensor,
    is_line,
    provenance,
    steps_at,
    ways,
)


def explain_tensor(plan: Plan, query: str) -> Document:
    """One tensor, or what a source line makes: its specs, and why each axis is there.

    Args:
        plan: Any plan.
        query: Path of a tensor in the state or the data, such as `params/blocks/q`, or
            a source line, such as `model.py:12` or `pkg/model.py:12`.

    Returns:
        Of a tensor, its row in `explain`, and besides: `local_compute_shape`,
        `bytes_per_device_compute`, `dims` (per dim its `size`, `logical` name,
        `storage` and `compute` axes, and `why`: a list of sentences), `unused` (axes
        that the policy offers and the tensor does not use, with the reason),
        `parameter` (for optimizer state, the path of its parameter, else None),
        `collectives` (those that move it, or its parameter) and `ways` (where the axes
        of each dim came from, op by op: see `provenance`).

        Of a line, `line`, `values` (the sharded values made there: `what`, `source`,
        `address`, `shape`, `spec` and `ways`) and `collectives` (those at the line).

    Raises:
        NameUnknownError: The plan has no tensor of this path; or nothing sharded is
            made, and nothing moved, at this line.
        PlanMismatchError: The trail of the plan is damaged.
    """
    if is_line(plan, query):
        return _explain_line(plan, query)
    tensor = find_tensor(plan, query)
    parameter = _parameter_of(plan, tensor)
    moved = {tensor.path, parameter}
    compute = local_shape(plan, tensor, tensor.compute)
    return {
        **tensor_row(plan, tensor),
        "local_compute_shape": compute,
        "bytes_per_device_compute": math.prod(compute) * element_bytes(tensor.dtype),
        "dims": [_dim(plan, tensor, dim) for dim in range(len(tensor.shape))],
        "unused": _unused(plan, tensor),
        "parameter": parameter,
        "collectives": [
            c.model_dump(mode="json")
            for c in sorted(plan.predicted.collectives, key=lambda c: -c.time_s)
            # The value may be a phrase about the path ("gradient of params/q").
            if moved & {c.value, *c.value.split()}
        ],
        "ways": provenance(plan, query),
    }


def _explain_line(plan: Plan, query: str) -> Document:
    collectives = [
        c.model_dump(mode="json")
        for c in sorted(plan.predicted.collectives, key=lambda c: -c.time_s)
        if at_line(c.source, query)
    ]
    try:
        steps = steps_at(plan, query)
    except NameUnknownError:
        if not collectives:
            raise
        steps = []
    values = []
    for k in steps:
        step = plan.trail[k]
        values.append(
            {
                "what": step.what,
                "source": step.source,
                "address": step.address,
                "shape": list(step.shape),
                "spec": [list(dim.axes) if dim else [] for dim in step.dims],
                "ways": ways(plan, k),
            }
        )
    return {"line": query, "values": values, "collectives": collectives}


def _parameter_of(plan: Plan, tensor: TensorPlan) -> str | None:
    """The parameter that a piece of optimizer state belongs to.

    Optimizers keep moments in trees like the parameters, so the path of a moment ends
    in the path of its parameter.
    """
    if tensor.state != "optimizer":
        return None
    found = [
        t.path
        for t in plan.tensors
        if t.state == "params"
        and t.shape == tensor.shape
        and f"/{tensor.path}".endswith("/" + t.path.removeprefix("params/"))
    ]
    return max(found, key=len, default=None)


def _dim(plan: Plan, tensor: TensorPlan, dim: int) -> Document:
    logical = tensor.logical[dim] if dim < len(tensor.logical) else None
    compute = active(plan, tensor.compute.dims[dim])
    storage = active(plan, tensor.storage.dims[dim])
    why = []
    for axis in dict.fromkeys([*compute, *storage]):
        text = f"{axis} ({plan.sizes[axis]} ways): {_reason(plan, tensor, dim, axis)}"
        if axis not in storage:
            text += "; in compute only: memory holds it whole, its use slices it"
        elif axis not in compute and tensor.state == "params":
            text += "; in memory only: gathered where it is used"
        why.append(text)
    return {
        "dim": dim,
        "size": tensor.shape[dim],
        "logical": logical,
        "storage": storage,
        "compute": compute,
        "why": why,
    }


def _reason(plan: Plan, tensor: TensorPlan, dim: int, axis: str) -> str:
    """The entry of the policy that put an axis on a dim."""
    logical = tensor.logical[dim] if dim < len(tensor.logical) else None
    if axis in tensor.compute.dims[dim]:
        for rule in plan.strategy.rules:
            if rule.logical == logical and axis in rule.axes:
                return f"rule {rule.logical} = [{', '.join(rule.axes)}]"
    given = getattr(plan.strategy.storage, tensor.state, ())
    if axis in given:
        return f"storage {tensor.state} = [{', '.join(given)}]"
    if logical is None:
        return "propagated from another tensor; this dim has no logical axis"
    return f"propagated from another tensor; no rule of {logical} has this axis"


def _unused(plan: Plan, tensor: TensorPlan) -> list[Document]:
    """Axes that the policy offers to this tensor, and the reason each is not used."""
    rows = []
    for dim, logical in enumerate(tensor.logical):
        for rule in plan.strategy.rules:
            if rule.logical != logical or logical is None:
                continue
            for axis in rule.axes:
                if plan.sizes[axis] > 1 and axis not in tensor.compute.dims[dim]:
                    reason = _refused(plan, tensor, dim, axis)
                    offered = f"rule {rule.logical} = [{', '.join(rule.axes)}]"
                    rows.append({"axis": axis, "offered_by": offered, "reason": reason})
    given = getattr(plan.strategy.storage, tensor.state, ())
    for axis in given:
        if plan.sizes[axis] > 1 and axis not in tensor.storage.axes:
            offered = f"storage {tensor.state} = [{', '.join(given)}]"
            local = local_shape(plan, tensor, tensor.storage)
            n = plan.sizes[axis]
            if any(size % n == 0 for size in local):
                reason = "a dim would divide; the notes of the plan may say why not"
            else:
                shape = " x ".join(map(str, local)) or "a scalar"
                reason = f"no dim of the local shape {shape} divides by {n}"
            rows.append({"axis": axis, "offered_by": offered, "reason": reason})
    return rows


def _refused(plan: Plan, tensor: TensorPlan, dim: int, axis: str) -> str:
    for other, axes in enumerate(tensor.compute.dims):
        if axis in axes:
            return f"it shards dim {other} already"
    ways = ways_of(plan, (*tensor.compute.dims[dim], axis))
    if tensor.shape[dim] % ways:
        return f"dim {dim} of size {tensor.shape[dim]} does not divide by {ways}"
    return f"dim {dim} would divide; the notes of the plan may say why not"
