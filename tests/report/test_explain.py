import json

import pytest
from helpers.plans import collective, document, plan, tensor

from autoshard import report
from autoshard.ir.errors import InputError, NameUnknownError, PlanMismatchError
from autoshard.plan.schema import HostTable
from autoshard.report import depth, table


def _tensors(*entries):
    return plan(tensors=list(entries))


def test_is_json():
    text = json.dumps(report.explain(plan()), allow_nan=False)
    assert json.loads(text)["predicted"]["step_s"] == 0.010


def test_local_shape_and_bytes():
    rows = {row["path"]: row for row in report.explain(plan())["tensors"]}
    w, mu = rows["params/w"], rows["opt_state/0/mu/w"]
    assert (w["local_shape"], w["bytes_"], w["bytes_per_device"]) == ([8, 4], 512, 128)
    assert (mu["local_shape"], mu["bytes_per_device"]) == ([4, 4], 64)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("key<fry>", 8)])
def test_width_of_a_dtype(dtype, width):
    entry = tensor("params/x", [3], "params", [None], [[]], [[]], dtype=dtype)
    assert report.explain(_tensors(entry))["tensors"][0]["bytes_"] == 3 * width


def test_unknown_dtype():
    entry = tensor("params/x", [3], "params", [None], [[]], [[]], dtype="float33")
    with pytest.raises(InputError, match="float33"):
        report.explain(_tensors(entry))


def test_dim_that_does_not_divide():
    entry = tensor("params/x", [6], "params", [None], [["tensor"]], [[]])
    with pytest.raises(
        PlanMismatchError, match=r"dim 0 of tensor params/x.*tensor \(4"
    ):
        report.explain(_tensors(entry))


def test_spec_of_another_rank():
    entry = tensor("params/x", [8, 8], "params", [None], [["tensor"]], [["tensor"]])
    with pytest.raises(PlanMismatchError, match="one entry per dim"):
        report.explain(_tensors(entry))


def test_collectives_are_summed_by_kind_axes_and_source():
    first, second = report.explain(plan())["collectives"]
    assert first["kind"] == "all_gather"  # 2 ms, against 0.5 + 0.5 ms
    assert (first["runs"], first["bytes_"]) == (3, 3 * 64)
    assert second["runs"] == 2 + 1
    assert second["bytes_"] == 2 * 128 + 24
    assert second["time_s"] == pytest.approx(0.001)
    assert second["values"] == ["params/w", "params/b"]


def test_collectives_of_other_lines_stay_apart():
    changed = document()
    changed["predicted"]["collectives"][1]["source"] = "toy.py:9 (loss)"
    assert len(report.explain(plan(**changed))["collectives"]) == 3


def test_time_that_the_parts_leave_over_is_shown():
    changed = document()
    changed["predicted"]["step_s"] = 0.012
    parts = report.explain(plan(**changed))["predicted"]["time"]
    assert parts[-1]["part"] == "other"
    assert parts[-1]["time_s"] == pytest.approx(0.002)
    assert [p["part"] for p in report.explain(plan())["predicted"]["time"]] == [
        "matmul",
        "memory-bound",
        "exposed collectives",
    ]


def test_hidden_collectives_are_no_part_of_the_step():
    changed = document()
    changed["predicted"]["hidden_s"] = 0.004
    explained = report.explain(plan(**changed))
    parts = explained["predicted"]["time"]
    assert sum(p["time_s"] for p in parts) == pytest.approx(0.010)
    shown = table.to_text(table.time_bars(explained))
    assert "hidden beside it" in shown
    assert "4.00 ms" in shown
    assert "hidden" not in table.to_text(table.time_bars(report.explain(plan())))


def test_axes_of_one_device_are_left_out():
    changed = document()
    changed["axes"] = [{"axis": "data", "size": 2}, {"axis": "tensor", "size": 1}]
    changed["strategy"]["mesh"] = {"data": 2, "tensor": 1}
    d = report.explain(plan(**changed))
    assert {"logical": "mlp", "axes": []} in d["rules"]
    w = next(row for row in d["tensors"] if row["path"] == "params/w")
    assert w["storage"] == [[], []]


def test_tensor_says_which_entry_put_each_axis():
    mu = report.explain_tensor(plan(), "opt_state/0/mu/w")
    assert mu["parameter"] == "params/w"
    assert mu["local_shape"] == [4, 4]
    assert mu["local_compute_shape"] == [8, 4]
    assert mu["bytes_per_device_compute"] == 8 * 4 * 4
    assert mu["dims"][0]["why"] == ["data (2 ways): storage optimizer = [data]"]
    assert mu["dims"][1]["why"] == ["tensor (4 ways): rule mlp = [tensor]"]
    assert [c["value"] for c in mu["collectives"]] == ["params/w"]


def test_tensor_says_why_an_axis_is_not_used():
    b = report.explain_tensor(plan(), "params/b")
    assert b["unused"] == [
        {
            "axis": "tensor",
            "offered_by": "rule mlp = [tensor]",
            "reason": "dim 0 of size 6 does not divide by 4",
        }
    ]
    assert report.explain_tensor(plan(), "params/w")["unused"] == []


def test_tensor_whose_axis_is_taken():
    entry = tensor(
        "params/x", [8, 8], "params", ["mlp", "mlp"], [["tensor"], []], [["tensor"], []]
    )
    (row,) = report.explain_tensor(_tensors(entry), "params/x")["unused"]
    assert row["reason"] == "it shards dim 0 already"


def test_storage_that_no_dim_takes():
    entry = tensor("opt_state/0/mu/b", [7], "optimizer", [None], [[]], [[]])
    (row,) = report.explain_tensor(_tensors(entry), "opt_state/0/mu/b")["unused"]
    assert row["offered_by"] == "storage optimizer = [data]"
    assert row["reason"] == "no dim of the local shape 7 divides by 2"


def test_propagated_axis_is_not_credited_to_a_rule():
    entry = tensor("params/x", [8], "params", ["embed"], [["tensor"]], [["tensor"]])
    (dim,) = report.explain_tensor(_tensors(entry), "params/x")["dims"]
    assert "propagated" in dim["why"][0]
    assert "embed" in dim["why"][0]


def test_collective_of_a_gradient_is_found_by_its_parameter():
    changed = document()
    changed["predicted"]["collectives"] = [
        collective("all_reduce", ["data"], 8, 1, 0.1, "gradient of params/w"),
        collective("all_reduce", ["data"], 8, 1, 0.1, "gradient of params/w2"),
    ]
    found = report.explain_tensor(plan(**changed), "params/w")["collectives"]
    assert [c["value"] for c in found] == ["gradient of params/w"]


def test_unknown_tensor_names_the_close_ones():
    with pytest.raises(NameUnknownError, match=r"Close to it: .*params/w") as info:
        report.explain_tensor(plan(), "param/w")
    assert "tokens" not in str(info.value)


def test_text_shows_brackets_and_every_tensor():
    text = table.to_text(table.whole(report.explain(plan())))
    assert "b [6] is whole & <unsharded>" in text
    assert "[data, tensor]" in text
    assert all(len(line) <= table.TEXT_WIDTH for line in text.splitlines())
    lines = text.splitlines()
    # The moment stands below the prefix that leads to its parameter.
    at = lines.index("opt_state/0/mu/")
    assert lines[at + 1].split()[0] == "w"


def test_tensor_text_has_the_reasons():
    text = table.to_text(depth.depth_view(report.explain_tensor(plan(), "params/b")))
    assert "dim 0 of size 6 does not divide by 4" in text


def test_print_shows_the_summary():
    text = str(plan())
    for part in ("data=2 tensor=4", "10.0 ms", "MFU 50.0 %", "gap 25.0 %", "1.00 KiB"):
        assert part in text


def test_ranking_is_in_the_order_given():
    slow = document()
    slow["predicted"]["step_s"] = 0.5
    text = table.to_text(table.ranking([plan(), plan(**slow)]))
    assert text.index("10.0 ms") < text.index("500 ms")


def offloaded():
    """A plan that keeps optimizer state of 2 GiB, of 8 GiB there are, on the host."""
    given = plan()
    host = HostTable(
        params=0, optimizer=2 * GIB, activations=0, total=2 * GIB, capacity=8 * GIB
    )
    memory = given.predicted.memory.model_copy(update={"host": host})
    predicted = given.predicted.model_copy(
        update={"memory": memory, "host_s": 0.002, "step_s": 0.012}
    )
    return given.model_copy(update={"predicted": predicted})


GIB = 2**30


def test_what_is_on_the_host_is_shown():
    assert report.explain(plan())["predicted"]["memory"]["host"] is None
    predicted = report.explain(offloaded())["predicted"]
    host = predicted["memory"]["host"]
    assert host["parts"] == [{"part": "optimizer", "bytes_": 2 * GIB, "fraction": 0.25}]
    times = {row["part"]: row["time_s"] for row in predicted["time"]}
    assert times["host transfers"] == 0.002
    page = offloaded()._repr_html_()
    assert "host memory, of 8.00 GiB usable" in page
    assert page.count("2.00 GiB") == 2  # of optimizer state, and in all
    assert "host memory" not in plan()._repr_html_()


def test_what_is_on_the_host_is_compared():
    def rows(a, b):
        return {row["part"]: row for row in report.compare(a, b)["memory"]}

    assert "on the host" not in rows(plan(), plan())
    assert rows(plan(), offloaded())["on the host"]["difference"] == 2 * GIB
