"""Reports of a plan: tables, HTML, comparisons and figures, all read from the plan.

Importing this package gives `Plan` its views, so that `print(plan)` shows a table.
"""

from autoshard.plan import views as _views
from autoshard.plan.schema import Plan as _Plan
from autoshard.report import table as _table
from autoshard.report.compare import compare as compare
from autoshard.report.compare import comparison as comparison
from autoshard.report.explain import explain as explain
from autoshard.report.plots import plot_losses as plot_losses
from autoshard.report.plots import plot_memory as plot_memory
from autoshard.report.plots import plot_time as plot_time
from autoshard.report.tensor import explain_tensor as explain_tensor


def _html(plan: _Plan) -> str:
    from autoshard.report import html

    return html.fragment(plan)


_views.register(text=_table.text_view, html=_html, rich=_table.rich_view)
