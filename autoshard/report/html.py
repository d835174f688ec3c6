"""A plan as HTML that needs nothing else: no script, no network, no other file."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from autoshard.plan.schema import Plan
from autoshard.report import story, table, units, words
from autoshard.report.explain import explain


def fragment(plan: Plan) -> str:
    """The plan as one `<div>`, for notebooks.

    Everything that comes from the plan is escaped; the tensors and the collectives are
    folded away.
    """
    return _template("fragment").render(_context(plan))


def page(plan: Plan) -> str:
    """The plan as a whole page, for a file."""
    return _template("page").render(_context(plan))


def _context(plan: Plan) -> dict[str, Any]:
    document = explain(plan)
    return {
        "d": document,
        "lines": [
            *table.policy_lines(document),
            *table.predicted_lines(document),
            *story.story_lines(document),
        ],
        "sections": story.sections(document),
    }


@cache
def _template(name: str) -> Any:
    # Not at the top: planning without a report need not load a template engine.
    import jinja2

    folder = resources.files("autoshard.report") / "templates"

    def load(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=units.bytes_text,
        seconds=units.seconds_text,
        percent=units.percent_text,
        spec=words.spec_text,
        shape=words.shape_text,
    )
    return environment.get_template(f"{name}.html")
