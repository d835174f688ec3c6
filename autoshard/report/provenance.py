"""Where the axes of a tensor, or of what a source line makes, came from: op by op."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from autoshard.ir.errors import NameUnknownError, PlanMismatchError
from autoshard.plan.records import TrailDim, TrailStep, numberless
from autoshard.plan.schema import Plan, TensorPlan
from autoshard.report.explain import Document

_LINE = re.compile(r"(?P<file>.+?):(?P<line>\d+)(:\d+)?( \(.*\))?")
_MOST = 5


def provenance(plan: Plan, query: str) -> list[Document]:
    """The way back from each sharded dim to where its axes began.

    Args:
        plan: Any plan.
        query: Path of a tensor, or a source line as `file.py:LINE`; of the file's path
            as much as tells it apart (`model.py:12`, `pkg/model.py:12`).

    Returns:
        A dict per sharded dim, with `dim`, `axes`, `steps` and `origin` (the
        annotation, rule or storage entry behind the axes). A step has `what` (a path,
        or the primitive that makes the value), `source`, `address`, `shape`, `dim` and
        `spec` (axes per dim); the first is the value asked for, the last the one where
        the axes began. A tensor that nothing shards has none.

    Raises:
        NameUnknownError: The plan has no such tensor, or nothing sharded is made at
            this line; the message names those near.
        PlanMismatchError: The trail of the plan is damaged.
    """
    if is_line(plan, query):
        return [way for step in steps_at(plan, query) for way in ways(plan, step)]
    tensor = find_tensor(plan, query)
    step = step_of(plan, tensor)
    if step is None:
        return []
    found = ways(plan, step)
    twin = plan.trail[step].what
    if twin != tensor.path:
        for way in found:
            way["steps"][0]["what"] = f"{tensor.path} (as {twin})"
    return found


def is_line(plan: Plan, query: str) -> bool:
    """Whether a query is a source line rather than the path of a tensor."""
    known = any(tensor.path == query for tensor in plan.tensors)
    return not known and _LINE.fullmatch(query) is not None


def find_tensor(plan: Plan, path: str) -> TensorPlan:
    """The tensor of this path.

    Raises:
        NameUnknownError: There is none; the message names the close ones.
    """
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
        f"required, or a source line (file.py:LINE). "
        f"{hint or 'It has: ' + ', '.join(paths[:10]) + '.'} "
        "`autoshard explain PLAN` lists all of them."
    )


def step_of(plan: Plan, tensor: TensorPlan) -> int | None:
    """Index of the step of a tensor, or of the one like it that stands for it."""
    wanted = tuple(
        tuple(a for a in axes if plan.sizes[a] > 1) for axes in tensor.storage.dims
    )
    if not any(wanted):
        return None
    name = numberless(tensor.path)
    copies: list[tuple[int, int]] = []
    for k, step in enumerate(plan.trail):
        if step.what == tensor.path:
            return k
        if step.address or step.shape != tensor.shape or numberless(step.what) != name:
            continue
        if tuple(dim.axes if dim else () for dim in step.dims) == wanted:
            pairs = zip(step.what.split("/"), tensor.path.split("/"), strict=True)
            copies.append((sum(a != b for a, b in pairs), k))
    return min(copies)[1] if copies else None


def steps_at(plan: Plan, query: str) -> list[int]:
    """Indices of the steps of the values that a source line makes.

    Raises:
        NameUnknownError: Nothing sharded is made there.
    """
    file, line = _parsed(query)
    lines: dict[int, list[int]] = {}
    for k, (path, number) in enumerate(_places(plan)):
        if path and _same_file(path, file):
            lines.setdefault(number, []).append(k)
    if line in lines:
        return lines[line]
    if not plan.trail:
        raise NameUnknownError(
            f"the plan has no sharded value at {query!r}: nothing in it is sharded, or "
            "it was written without a trail. Search again to write one."
        )
    if lines:
        near = sorted(sorted(lines, key=lambda n: (abs(n - line), n))[:_MOST])
        raise NameUnknownError(
            f"no sharded value is made at line {line} of {file}: the line makes none, "
            "or what it makes is whole on every device. The nearest lines that make "
            f"some: {', '.join(map(str, near))} (of {len(lines)} in this file)."
        )
    files = sorted({path for path, _ in _places(plan) if path})
    ends = {path.rpartition("/")[2]: path for path in files}
    close = difflib.get_close_matches(file.rpartition("/")[2], ends, n=3, cutoff=0.6)
    listed = [ends[name] for name in close] or files[:10]
    raise NameUnknownError(
        f"the plan has no sharded value of a file {file!r}; it has some of: "
        f"{', '.join(listed)}. Write file.py:LINE, or the path of a tensor."
    )


def at_line(source: str, query: str) -> bool:
    """Whether a source line is the one of a query; columns do not count."""
    file, line = _parsed(query)
    path, number = _place(source)
    return bool(path) and number == line and _same_file(path, file)


def ways(plan: Plan, step: int) -> list[Document]:
    """The way back of every sharded dim of a step."""
    dims = plan.trail[step].dims
    return [_way(plan, step, d, dim) for d, dim in enumerate(dims) if dim is not None]


def _way(plan: Plan, index: int, d: int, dim: TrailDim) -> Document:
    steps: list[Document] = []
    origins: list[str] = []
    wanted, here, at = set(dim.axes), dim, d
    seen: set[tuple[int, int]] = set()
    while True:
        if (index, at) in seen:
            raise PlanMismatchError(
                f"the trail of the plan runs in a circle at step {index} "
                f"({plan.trail[index].what}). The plan was edited: search again."
            )
        seen.add((index, at))
        steps.append(_step(plan.trail[index], at))
        if here.step is None:
            origins.append(here.origin)
            break
        index, at = here.step, here.dim
        before = _dim_at(plan, index, at)
        if here.origin and wanted - set(before.axes):
            origins.append(here.origin)
        wanted &= set(before.axes)
        if not wanted:
            break
        here = before
    return {
        "dim": d,
        "axes": list(dim.axes),
        "steps": steps,
        "origin": "; ".join(dict.fromkeys(filter(None, origins))),
    }


def _dim_at(plan: Plan, index: int, at: int) -> TrailDim:
    step = plan.trail[index] if 0 <= index < len(plan.trail) else None
    dim = step.dims[at] if step and 0 <= at < len(step.dims) else None
    if dim is None:
        raise PlanMismatchError(
            f"the trail of the plan points to dim {at} of step {index}, which is not "
            f"there or not sharded (it has {len(plan.trail)} steps). The plan was "
            "edited: search again."
        )
    return dim


def _step(step: TrailStep, dim: int) -> Document:
    return {
        "what": step.what,
        "source": step.source,
        "address": step.address,
        "shape": list(step.shape),
        "dim": dim,
        "spec": [list(each.axes) if each else [] for each in step.dims],
    }


def _parsed(query: str) -> tuple[str, int]:
    match = _LINE.fullmatch(query)
    assert match is not None, query
    return match["file"].removeprefix("./"), int(match["line"])


def _places(plan: Plan) -> Iterator[tuple[str, int]]:
    return (_place(step.source) for step in plan.trail)


def _place(source: str) -> tuple[str, int]:
    """File and line of `pkg/model.py:12:4 (fn)`; an empty file where there is none."""
    match = _LINE.fullmatch(source)
    return (match["file"], int(match["line"])) if match else ("", 0)


def _same_file(path: str, asked: str) -> bool:
    """Whether one path ends in the other, by whole names.

    >>> _same_file("pkg/model.py", "model.py"), _same_file("my_model.py", "model.py")
    (True, False)
    """
    one, two = f"/{path}", f"/{asked}"
    return one.endswith(two) or two.endswith(one)
