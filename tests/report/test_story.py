import copy

import pytest
from helpers.plans import plan

from autoshard import report
from autoshard.report import html, table

STORY = {
    "annotations": {
        "counts": [
            {"kind": "annotate", "found": 3, "reached": 3},
            {"kind": "reshard", "found": 2, "reached": 1},
        ],
        "hints": ["write out_sharding"],
        "unused": ["annotate at toy.py:4"],
    },
    "blocks": [
        {"kind": "scanned", "copies": 2, "ops": 5, "source": ""},
        {"kind": "unrolled", "copies": 32, "ops": 57, "source": "a/b/model.py:12 (f)"},
    ],
    "conflicts": [
        {
            "where": "add at toy.py:5",
            "kept": "data",
            "kept_origin": "reshard at toy.py:3",
            "lost": "tensor",
            "lost_origin": "reshard at toy.py:4",
            "moved_bytes": 2048,
        }
    ],
    "delayed": [
        {
            "roots": [
                {"address": "dot_general#0", "contraction": 0},
                {"address": "dot_general#1", "contraction": 0},
            ],
            "carriers": ["add#0", "add#1"],
            "axes": ["tensor"],
            "specs": [[["data"], []], [["data"], []]],
        }
    ],
    "replicated": [
        {"primitive": "fft", "address": f"fft#{k}", "source": "toy.py:6 (f)"}
        for k in range(2)
    ],
    "constraints": [
        {"address": f"add#{k}", "slot": "out0", "spec": [["data"]]} for k in range(7)
    ],
}

LINES = {
    "annotations": "5 found, 4 reached the program",
    "blocks": "32 copies of 57 ops, 2 copies of 5 ops",
    "conflicts": "1 wish not met",
    "delayed": "1 reduction",
    "replicated": "2 ops without a rule",
    "constraints": "7 values pinned of 12 ops",
}

TITLES = {
    "annotations": "Annotations: 5 found",
    "blocks": "Blocks",
    "conflicts": "Conflicts (1)",
    "delayed": "Delayed reductions (1)",
    "replicated": "Computed whole on every device, as asked (2)",
}


def _text(made):
    return table.to_text(table.whole(report.explain(made)))


def test_the_document_has_it_as_the_plan_has_it():
    d = report.explain(plan(**STORY))
    for key in ("annotations", "blocks", "conflicts", "delayed", "replicated"):
        assert d[key] == STORY[key]
    assert d["constraints"] == {"pinned": 7, "ops": 12}


def test_specs_leave_out_axes_of_one_device():
    story = copy.deepcopy(STORY)
    story["delayed"][0]["specs"] = [[["fsdp", "data"], []]]
    assert report.explain(plan(**story))["delayed"][0]["specs"] == [[["data"], []]]


def test_summary_has_a_line_each():
    text = str(plan(**STORY))
    for name, line in LINES.items():
        assert any(
            row.startswith(name) and row.endswith(line) for row in text.splitlines()
        ), name


@pytest.mark.parametrize("field", list(LINES))
def test_what_is_empty_is_left_out(field):
    empty = {"counts": [], "hints": [], "unused": []} if field == "annotations" else []
    text = _text(plan(**{**STORY, field: empty}))
    assert LINES[field] not in text
    assert all(line in text for name, line in LINES.items() if name != field)
    for name, title in TITLES.items():
        assert (title in text) == (name != field)


def test_sections_say_both_sides_of_a_conflict_and_the_bytes():
    text = _text(plan(**STORY))
    for part in ("reshard at toy.py:3", "reshard at toy.py:4", "2.00 KiB"):
        assert part in text


def test_sections_name_blocks_sums_and_uses():
    text = _text(plan(**STORY))
    lines = text.splitlines()
    assert "- 32 copies of 57 ops, unrolled, b/model.py:12 (f)" in lines
    assert "- 2 copies of 5 ops, scanned" in lines
    assert "- unused: annotate at toy.py:4: nothing reads its result" in lines
    assert "- hint: write out_sharding" in lines
    row = next(line for line in lines if "dot_general#0" in line).split()
    assert (row[0], row[-1]) == ("tensor", "add#1")
    assert next(line for line in lines if line.startswith("fft")).split() == [
        "fft",
        "2",
        "toy.py:6",
        "(f)",
    ]


def test_html_has_the_sections_escaped():
    story = copy.deepcopy(STORY)
    story["conflicts"][0]["lost_origin"] = "<script>alert(1)</script>"
    text = html.page(plan(**story))
    for part in (*LINES.values(), *TITLES.values(), "b/model.py:12 (f)", "add#1"):
        assert part in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "Conflicts" not in html.page(plan())


def test_compare_lists_what_came_about_otherwise():
    rows = report.compare(plan(), plan(**STORY))["policy"]
    assert [row["field"] for row in rows] == list(LINES)
    assert rows[-1] == {
        "field": "constraints",
        "a": "-",
        "b": "7 values pinned of 12 ops",
    }
    assert report.compare(plan(**STORY), plan(**STORY))["same"]
