"""What the backward pass recomputes: nothing, all of a block, or what is not saved.

One policy is for all blocks; or the first blocks have one and those after them another:
`"full=8,none=24"`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import jax
from jax.extend import core as jex

from autoshard.ir import _jaxcompat
from autoshard.ir.errors import InputError

SAVE = "save:"
FORMS = "'none', 'full', 'dots' or 'save:NAME+NAME'"

_PART = re.compile(r"(.+)=([1-9][0-9]*)", re.DOTALL)

Part = tuple[str, int]
"""A policy, and how many blocks have it."""


def parts_of(remat: str) -> tuple[Part, ...]:
    """The policies of a mix and how many blocks have each, in order of blocks.

    Returns:
        Parts; none where one policy is for all blocks.

    Raises:
        ValueError: A part is not of the form POLICY=COUNT, or has the policy of the
            part before it.

    >>> parts_of("full=8,none=24"), parts_of("full")
    ((('full', 8), ('none', 24)), ())
    """
    texts = remat.split(",")
    if len(texts) == 1:
        return ()
    found: list[Part] = []
    for text in texts:
        match = _PART.fullmatch(text)
        if not match:
            raise ValueError(
                f"{remat!r} has the part {text!r}: each part of a mix is a policy and "
                "how many blocks have it, such as 'full=8,none=24'"
            )
        found.append((match[1], int(match[2])))
    for (one, some), (other, more) in pairwise(found):
        if one == other:
            raise ValueError(
                f"{remat!r} has {one!r} twice in a row: write {one}={some + more}"
            )
    return tuple(found)


def policies_of(remat: str) -> tuple[str, ...]:
    """The policies of the blocks, without how many have each.

    >>> policies_of("full=8,none=24"), policies_of("dots")
    (('full', 'none'), ('dots',))
    """
    return tuple(policy for policy, _ in parts_of(remat)) or (remat,)


def mixed(*parts: Part) -> str:
    """The text of a mix.

    >>> mixed(("full", 8), ("none", 24))
    'full=8,none=24'
    """
    return ",".join(f"{policy}={count}" for policy, count in parts)


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
    for policy in policies_of(remat):
        names = names_of(policy)
        if policy not in ("none", "full", "dots") and not (names and all(names)):
            raise ValueError(
                f"{policy!r} is not a way to rematerialise: it is {FORMS}, or several "
                "for so many blocks each, 'full=8,none=24'"
            )
    return remat


def checkpoint(policy: str) -> Callable[..., Any]:
    """What wraps a block so that its policy is followed, called as `jax.checkpoint` is.

    Args:
        policy: Of one block; no mix.

    >>> import jax.numpy as jnp
    >>> float(jax.grad(checkpoint("full")(jnp.sin))(0.0))
    1.0
    """
    if policy == "none":
        return lambda run, **_: run
    return partial(jax.checkpoint, policy=saved_by(policy))


def saved_by(remat: str) -> Callable[..., Any] | None:
    """What `jax.checkpoint` saves of a block besides its operands; None for nothing.

    Args:
        remat: Of one block: "full" for nothing; "dots" for the results of products that
            have no batch dim, which are those with weights (Korthikanti et al. 2022,
            arXiv:2205.05198, recompute attention alone in the same way);
            "save:NAME+NAME" for what `jax.ad_checkpoint.checkpoint_name` named so.

    >>> saved_by("full") is None
    True
    """
    policies = jax.checkpoint_policies
    names = names_of(remat)
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
    wanted = [name for policy in policies_of(remat) for name in names_of(policy) or ()]
    if not wanted:
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
