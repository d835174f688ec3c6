import re
import subprocess
import sys

import matplotlib as mpl
import pytest
from helpers.plans import document, plan

from autoshard import report
from autoshard.ir.errors import InputError
from autoshard.report import html

mpl.use("agg")

SCRIPT = "<script>alert(1)</script>"


@pytest.mark.parametrize("view", [html.fragment, html.page])
def test_html_escapes_whatever_comes_from_the_plan(view):
    changed = document()
    changed["notes"] = [SCRIPT]
    changed["tensors"][0]["path"] = f"params/{SCRIPT}"
    changed["predicted"]["collectives"][0]["value"] = SCRIPT
    changed["program"]["model"]["model"] = SCRIPT
    changed["strategy"]["about"] = SCRIPT
    text = view(plan(**changed))
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 5


def test_html_needs_nothing_else():
    text = html.page(plan())
    assert not re.findall(r"""(?:src|href)=|url\(|@import""", text)
    assert text.startswith("<!doctype html>")


def test_html_has_the_same_content_as_the_table():
    text = html.fragment(plan())
    for part in (
        "params/w",
        "[data, tensor]",
        "12.8 k tokens/s",
        "1.00 KiB",
        "toy.py:7",
    ):
        assert part in text


def test_notebook_shows_html():
    assert plan()._repr_html_() == html.fragment(plan())


def test_a_plan_without_registered_views_shows_its_headline():
    code = (
        "from autoshard.plan import views\n"
        "views._views.clear()\n"
        "from helpers.plans import plan\n"
        "print(str(plan())); print(plan()._repr_html_())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=_environment(),
    )
    line = "Plan of toy on cpu:8: data=2 tensor=4"
    assert done.stdout.splitlines() == [line, f"<pre>{line}</pre>"]


def _environment():
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_memory_figure_has_the_parts_and_the_capacity():
    ax = report.plot_memory(plan())
    widths = [bar.get_width() * 2**30 for bar in ax.patches]
    assert widths == pytest.approx([152, 152, 64, 600, 56, 1024])
    assert ax.lines[0].get_xdata()[0] * 2**30 == pytest.approx(4096)


def test_time_figure_is_in_milliseconds():
    ax = report.plot_time(plan())
    assert [b.get_width() for b in ax.patches] == pytest.approx([6, 1, 3, 10])


def test_losses_begin_at_step_one_and_go_on_the_given_axes():
    ax = report.plot_losses([3.0, 2.0])
    again = report.plot_losses({"b": [5.0]}, ax=ax)
    assert again is ax
    assert list(ax.lines[0].get_xdata()) == [1, 2]
    assert list(ax.lines[0].get_ydata()) == [3.0, 2.0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["b"]


@pytest.mark.parametrize("losses", [[], {"a": [1.0], "b": []}])
def test_no_losses(losses):
    with pytest.raises(InputError, match="at least one step"):
        report.plot_losses(losses)
