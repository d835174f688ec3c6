"""Whether a plan belongs to a program."""

from __future__ import annotations

from typing import Any

import jax

from autoshard.ir.errors import PlanMismatchError
from autoshard.ir.train_step import TrainStep, path_string
from autoshard.plan.schema import Plan


def check_tensors(step: TrainStep, plan: Plan, batch: Any) -> None:
    """Compares the state's leaves with those of the plan, by path, shape and dtype.

    Raises:
        PlanMismatchError: Naming the first leaf that differs.
    """
    state = step.abstract_state()
    have = {
        path_string(path): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }
    want = {t.path: (t.shape, t.dtype) for t in plan.tensors if t.state != "data"}
    if list(have.items()) == list(want.items()):
        return
    made_for = plan.program.model.model if plan.program.model else "another model"
    for path in (*want, *have):
        if have.get(path) != want.get(path):
            raise PlanMismatchError(
                f"the plan (made for {made_for}) does not fit this model: {path} is "
                f"{_show(want.get(path))} in the plan and {_show(have.get(path))} in "
                "the model. Search again with this model."
            )
    raise PlanMismatchError(
        f"the plan (made for {made_for}) lists the same state in another order; "
        "search again with this model."
    )


def _show(entry: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if entry is None else f"{entry[1]}{list(entry[0])}"


def check_fingerprint(fingerprint: str, plan: Plan) -> None:
    """Compares structure hashes.

    Raises:
        PlanMismatchError: They differ.
    """
    if fingerprint == plan.program.fingerprint:
        return
    hint = ""
    if plan.program.jax != jax.__version__:
        hint = (
            f" The plan was made with JAX {plan.program.jax}, this is "
            f"{jax.__version__}, which may trace the same program differently."
        )
    raise PlanMismatchError(
        f"the plan was made for a program with fingerprint {plan.program.fingerprint}, "
        f"this one has {fingerprint}: the loss, model or optimizer is not the "
        f"same.{hint} Search again with this program."
    )
