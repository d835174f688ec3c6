import json

import pytest
from helpers.plans import document, plan, tensor

from autoshard import report
from autoshard.report import table


def _text(result):
    return table.to_text(report.comparison(result))


def test_equal_plans():
    result = report.compare(plan(), plan())
    assert result["same"]
    assert "say the same" in _text(result)


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        (("strategy", "storage", "params"), ["data"], "policy"),
        (("strategy", "schedule", "remat"), "full", "policy"),
        (("tensors", 1, "storage", 0), ["data"], "tensors"),
        (("tensors", 1, "dtype"), "int32", "tensors"),
        (("predicted", "collectives", 0, "count"), 9, "collectives"),
    ],
)
def test_each_difference_is_found_where_it_is(path, value, key):
    changed = node = document()
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    result = report.compare(plan(), plan(**changed))
    assert not result["same"]
    assert [k for k in ("policy", "tensors", "collectives") if result[k]] == [key]


def test_rows_hold_both_sides():
    changed = document()
    changed["axes"][1]["size"] = 2
    changed["strategy"]["mesh"]["tensor"] = 2
    changed["strategy"]["rules"]["batch"] = []
    rows = report.compare(plan(), plan(**changed))["policy"]
    assert {"field": "mesh", "a": "data=2 tensor=4", "b": "data=2 tensor=2"} in rows
    assert {"field": "rule batch", "a": "data", "b": "-"} in rows


def test_tensor_of_one_plan_only():
    changed = document()
    changed["tensors"].append(tensor("rest/x", [2], "other", [None], [[]], [[]]))
    result = report.compare(plan(), plan(**changed))
    (row,) = result["tensors"]
    assert (row["path"], row["a"], row["b"]["storage"]) == ("rest/x", None, [[]])
    assert "absent" in _text(result)


def test_a_tensor_that_moved_shows_both_specs():
    changed = document()
    changed["tensors"][1]["storage"][0] = ["data"]
    result = report.compare(plan(), plan(**changed))
    (row,) = result["tensors"]
    assert (row["a"]["bytes_per_device"], row["b"]["bytes_per_device"]) == (128, 64)
    line = next(x for x in _text(result).splitlines() if x.strip().startswith("w "))
    cells = [cell.strip() for cell in line.split("   ")]
    assert cells[-2:] == [
        "[-, tensor], 128 B",
        "[data, tensor], 64 B",
    ]


def test_folders_that_change_alike_are_one():
    one, two = document(), document()
    for changed, axes in ((one, []), (two, ["data"])):
        moments = [
            tensor(
                f"opt_state/0/{m}/w",
                [8, 16],
                "optimizer",
                [None] * 2,
                [axes, []],
                [[], []],
            )
            for m in ("mu", "nu")
        ]
        changed["tensors"] = [*changed["tensors"][:2], *moments]
    lines = _text(report.compare(plan(**one), plan(**two))).splitlines()
    at = lines.index("opt_state/0/mu/")
    assert lines[at + 1] == "opt_state/0/nu/"
    assert sum("[data, -], 256 B" in line for line in lines) == 1


def test_collective_of_one_plan_only():
    changed = document()
    del changed["predicted"]["collectives"][2]
    (row,) = report.compare(plan(), plan(**changed))["collectives"]
    assert (row["kind"], row["values"]) == ("all_gather", ["reshape"])
    assert row["a"] == {"runs": 3, "bytes_": 192, "time_s": 0.002}
    assert row["b"] == {"runs": 0, "bytes_": 0, "time_s": 0.0}


def test_verdict_names_the_cost():
    changed = document()
    changed["predicted"]["step_s"] = 0.005
    changed["predicted"]["memory"]["total"] = 3072
    result = report.compare(plan(), plan(**changed))
    assert "50.0 % less time" in result["verdict"]
    assert "2.00 KiB more" in result["verdict"]
    back = report.compare(plan(**changed), plan())
    assert "100.0 % more time" in back["verdict"]
    assert "2.00 KiB less" in back["verdict"]


def test_memory_and_time_have_signed_differences():
    changed = document()
    changed["predicted"]["memory"]["optimizer"] = 32
    result = report.compare(plan(), plan(**changed))
    row = next(r for r in result["memory"] if r["part"] == "optimizer")
    assert row == {"part": "optimizer", "a": 64, "b": 32, "difference": -32}
    assert "-50.0 %" in _text(result)


def test_other_program_is_said():
    changed = document()
    changed["program"]["fingerprint"] = "p1"
    result = report.compare(plan(), plan(**changed))
    assert not result["same"]
    assert "different programs" in _text(result)


def test_is_json():
    changed = document()
    changed["tensors"] = []
    json.dumps(report.compare(plan(), plan(**changed)), allow_nan=False)
