"""What the backward pass recomputes: nothing, all of a block, or what is not saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core as jex

from autoshard.ir import _jaxcompat
from autoshard.ir.errors import InputError

SAVE = "save:"
FORMS = "'none', 'full', 'dots' or 'save:NAME+NAME'"


def names_of(remat: str) -> tuple[str, ...] | None:
    """The named values that a block keeps; None where it is not said by names.

    >>> names_of("save:attention+mlp"), names_of("full")
    (('attention', 'mlp'), None)
    """
    if not remat.startswith(SAVE):
        return None
    return tuple(remat.removeprefix(SAVE).split("+"))


def check_remat(remat: str) -> str:
    """The same text, if it is one that can be followed.

    Raises:
        ValueError: It is none of the forms.
    """
    names = names_of(remat)
    if remat in ("none", "full", "dots") or (names and all(names)):
        return remat
    raise ValueError(f"{remat!r} is not a way to rematerialise: it is {FORMS}")


def policy(remat: str) -> Callable[..., Any] | None:
    """What `jax.checkpoint` saves of a block besides its operands; None for nothing.

    Args:
        remat: "full" for nothing; "dots" for the results of products that have no
            batch dim, which are those with weights (Korthikanti et al. 2022,
            arXiv:2205.05198, recompute attention alone in the same way);
            "save:NAME+NAME" for what `jax.ad_checkpoint.checkpoint_name` named so.

    >>> policy("full") is None
    True
    """
    policies = jax.checkpoint_policies
    names = names_of(check_remat(remat))
    if names is not None:
        return policies.save_only_these_names(*names)
    return policies.dots_with_no_batch_dims_saveable if remat == "dots" else None


def named_values(jaxpr: Any) -> Iterator[str]:
    """The names that `checkpoint_name` gave in a jaxpr and what it calls."""
    opened, _ = _jaxcompat.open_jaxpr(jaxpr)
    for eqn in opened.eqns:
        if eqn.primitive.name == "name":
            yield eqn.params["name"]
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from named_values(inner)


def check_names(remat: str, jaxpr: Any) -> None:
    """Raises `InputError` where a name that is to be saved names nothing."""
    wanted = names_of(remat)
    if wanted is None:
        return
    found = sorted(set(named_values(jaxpr)))
    missing = [name for name in wanted if name not in found]
    if missing:
        there = ", ".join(found) if found else "none"
        raise InputError(
            f"remat = {remat!r} saves {', '.join(missing)}, and the loss function has "
            f"no such name (it has {there}); name a value with "
            "jax.ad_checkpoint.checkpoint_name(x, 'NAME') in the model."
        )
