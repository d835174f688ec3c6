"""How a plan shows itself, without the plan knowing who draws it.

`autoshard.report` draws plans and stands above this package, so it registers its
views here, and `Plan` looks them up. Where nothing registered (a program that imports
only the schema) a plan shows itself as its headline.
"""

from __future__ import annotations

import html as _html
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from autoshard.plan.schema import Plan

Kind = Literal["text", "html", "rich"]
View = Callable[["Plan"], Any]

_views: dict[Kind, View] = {}


def register(*, text: View, html: View, rich: View) -> None:
    """Sets the views of a plan; a later call replaces an earlier one.

    Args:
        text: Plan to a string, for `print`.
        html: Plan to a self-contained piece of HTML, for notebooks.
        rich: Plan to anything that `rich` can print.
    """
    _views.update({"text": text, "html": html, "rich": rich})


def render(plan: Plan, kind: Kind) -> Any:
    """The plan in one of its views, or its headline where none is registered."""
    view = _views.get(kind)
    if view is not None:
        return view(plan)
    line = headline(plan)
    return f"<pre>{_html.escape(line)}</pre>" if kind == "html" else line


def headline(plan: Plan) -> str:
    """One line that says what a plan is for: program, cluster and mesh."""
    ref = plan.program.model
    what = ref.model if ref else f"program {plan.program.fingerprint}"
    mesh = " ".join(f"{a.axis}={a.size}" for a in plan.axes if a.size > 1)
    return f"Plan of {what} on {plan.cluster.name}: {mesh or 'one device'}"
