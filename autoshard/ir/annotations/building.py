"""Building a model abstractly, with an eye on what its annotations become."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import meta

from autoshard.ir import _jaxcompat
from autoshard.ir.annotations import linen
from autoshard.ir.annotations.calls import answered, silenced

_DEPRECATED = re.compile(r"'(sharding|sharding_names)' is deprecated")


@dataclass
class Built:
    """What was seen while a model was built.

    Attributes:
        hints: Deprecated spellings, in words.
        boxes: Names of every Linen box that was made, and its kind.
    """

    hints: dict[str, None] = field(default_factory=dict)
    boxes: dict[tuple[Any, ...], str] = field(default_factory=dict)


def build(
    make: Callable[..., Any], shapes: Callable[..., Any] | None
) -> tuple[Any, Built]:
    """Builds a model without sharding anything.

    Args:
        make: Builds it.
        shapes: Makes shapes only, as `jax.eval_shape` or `nnx.eval_shape` do; None to
            build it in earnest.

    Returns:
        What `make` returned, as `jax.ShapeDtypeStruct`s where asked, and what was seen.
    """
    seen = Built()
    with contextlib.ExitStack() as stack:
        # Flax calls the deprecation a warning and keeps no trace of the spelling.
        stack.enter_context(_deprecations(seen))
        stack.enter_context(nnx.use_eager_sharding(False))
        stack.enter_context(silenced())
        stack.enter_context(_jaxcompat.quick_to_refuse())
        if shapes is None:
            return make(), seen
        for box in (nn.Partitioned, nn.LogicallyPartitioned):
            stack.enter_context(answered(box.unbox, _unbox, seen))
        return shapes(make), seen


def dropped(tree: Any, seen: Built) -> list[tuple[str, str]]:
    """The boxes that were made while `tree` was built and are not part of it.

    Returns:
        Kind and sentence of each.
    """
    kept = [
        tuple(x.names)
        for x in jax.tree.leaves(tree, is_leaf=meta.is_axis_metadata)
        if isinstance(x, nn.Partitioned)
    ]
    return [
        (
            kind,
            f"{names} ({kind}) of an initializer: the model function returns its "
            "parameter without the box. Return module.init(...)['params'] as it is; "
            "apply takes the boxes off by itself.",
        )
        for names, kind in seen.boxes.items()
        # A scan or vmap adds a name to those that the initializer gave.
        if not any(_within(names, other) for other in kept)
    ]


def _within(names: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    rest = iter(other)
    return all(name in rest for name in names)


def _unbox(before: Any, seen: Built, box: Any, *args: Any, **kwargs: Any) -> Any:
    logical = isinstance(box, nn.LogicallyPartitioned)
    seen.boxes[tuple(box.names)] = linen.LOGICAL if logical else linen.MESH
    return before(box, *args, **kwargs)


@contextlib.contextmanager
def _deprecations(seen: Built) -> Iterator[None]:
    """Turns flax's warnings of old spellings into hints; passes the others on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        found = _DEPRECATED.match(str(warning.message))
        if found is None:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        else:
            seen.hints[
                f"{found[1]}= of a variable is an old spelling, which works: write "
                "out_sharding=."
            ] = None
