"""The scatter plot of predictions: what is drawn, and where it cannot go."""

from __future__ import annotations

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from autoshard.ir.errors import InputError, OutputError
from autoshard.report.plots import save_scatter

SERIES = {"a": [(1.0, 1.5), (4.0, 2.0)], "none": [], "b": [(0.5, 8.0)]}


@pytest.fixture
def drawn(monkeypatch):
    """Axes of figures as they are saved."""
    found = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        found.append(figure.axes[0])
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def test_each_series_is_drawn(tmp_path, drawn):
    save_scatter(str(tmp_path / "out.png"), SERIES)
    (on,) = drawn
    points = {
        dots.get_label(): [tuple(at) for at in dots.get_offsets()]
        for dots in on.collections
    }
    assert points == {"a": SERIES["a"], "b": SERIES["b"]}
    assert on.get_xscale() == on.get_yscale() == "log"
    names = [text.get_text() for text in on.get_legend().get_texts()]
    assert names == ["a", "b"]


def test_the_line_of_no_error_spans_all_points(tmp_path, drawn):
    save_scatter(str(tmp_path / "out.png"), SERIES)
    (line,) = drawn[0].lines
    assert list(line.get_xdata()) == list(line.get_ydata()) == [0.5, 8.0]


@pytest.mark.parametrize("series", [{}, {"a": []}])
def test_nothing_to_draw(tmp_path, drawn, series):
    path = tmp_path / "out.png"
    save_scatter(str(path), series)
    assert path.stat().st_size > 0
    assert not drawn[0].lines
    assert drawn[0].get_legend() is None


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_the_ending_names_the_format(tmp_path, ending, start):
    path = tmp_path / f"out.{ending}"
    save_scatter(str(path), SERIES)
    assert path.read_bytes().startswith(start)


def test_figures_are_closed(tmp_path):
    before = plt.get_fignums()
    save_scatter(str(tmp_path / "out.png"), SERIES)
    with pytest.raises(OutputError):
        save_scatter(str(tmp_path / "nowhere/out.png"), SERIES)
    assert plt.get_fignums() == before


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match=r"out\.png cannot be written"):
        save_scatter(str(tmp_path / "nowhere/out.png"), SERIES)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match=r"folder\.png cannot be written"):
        save_scatter(str(tmp_path / "folder.png"), SERIES)


def test_an_unknown_format(tmp_path):
    with pytest.raises(InputError, match=r"out\.doc cannot be written"):
        save_scatter(str(tmp_path / "out.doc"), SERIES)
