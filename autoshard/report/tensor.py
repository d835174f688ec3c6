"""One tensor of a plan in depth: where each axis came from, and what moves it."""

from __future__ import annotations

import difflib
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


def explain_tensor(plan: Plan, path: str) -> Document:
    """One tensor: its specs, why each axis is where it is, and why not elsewhere.

    Args:
        plan: Any plan.
        path: Path of a tensor in the state or the data, such as `params/blocks/q`.

    Returns:
        The tensor's row in `explain`, and besides: `local_compute_shape`,
        `bytes_per_device_compute`, `dims` (per dim its `size`, `logical` name,
        `storage` and `compute` axes, and `why`: a list of sentences), `unused` (axes
        that the policy offers and the tensor does not use, with the reason),
        `parameter` (for optimizer state, the path of its parameter, else None) and
        `collectives` (those that move it, or its parameter).

    Raises:
        NameUnknownError: The plan has no tensor of this path.
    """
    tensor = _find(plan, path)
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
    }


def _find(plan: Plan, path: str) -> TensorPlan:
    for tensor in plan.tensors:
        if tensor.path == path:
            return tensor
    paths = [tensor.path for tensor in plan.tensors]
    inside = [p for p in paths if path.strip("/") and path.strip("/") in p]
    near = [*inside, *difflib.get_close_matches(path, paths, n=5, cutoff=0.5)]
    near = list(dict.fromkeys(near))[:5]
    hint = f"Close to it: {', '.join(near)}." if near else ""
    raise NameUnknownError(
        f"the plan has no tensor {path!r}; a full path in the state or the data is "
        f"required. {hint or 'It has: ' + ', '.join(paths[:10]) + '.'} "
        "`autoshard explain PLAN` lists all of them."
    )


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
