import copy

import jax
import jax.numpy as jnp
import pytest
from helpers.plans import document, plan, tensor

import autoshard as ash
from autoshard import report
from autoshard.ir.annotate import annotate
from autoshard.ir.errors import NameUnknownError, PlanMismatchError
from autoshard.plan.files import plan_from_json, plan_to_json
from autoshard.plan.strategy import Strategy
from autoshard.report import depth, table
from autoshard.report.provenance import provenance

MLP = "rule mlp = [tensor], annotation of params/w"
BATCH = "rule batch = [data], role of tokens"
MOMENT = "storage optimizer = [data]"


def _dim(axes, step=None, dim=0, origin=""):
    return {"axes": [axes], "step": step, "dim": dim, "origin": origin}


def _step(what, source, address, shape, *dims):
    return {
        "what": what,
        "source": source,
        "address": address,
        "shape": shape,
        "dims": list(dims),
    }


# tokens -> product -> tanh; the moment of w takes `tensor` from w, and adds storage.
TRAIL = [
    _step("params/w", "", "", [8, 16], None, _dim("tensor", origin=MLP)),
    _step(
        "opt_state/0/mu/w",
        "",
        "",
        [8, 16],
        _dim("data", origin=MOMENT),
        _dim("tensor", 0, 1),
    ),
    _step("tokens", "", "", [4, 32], _dim("data", origin=BATCH), None),
    _step(
        "dot_general",
        "pkg/toy.py:7:4 (loss)",
        "dot_general#0",
        [4, 16],
        _dim("data", 2, 0),
        _dim("tensor", 0, 1),
    ),
    _step(
        "tanh",
        "pkg/toy.py:9:4 (loss)",
        "tanh#0",
        [4, 16],
        _dim("data", 3, 0),
        _dim("tensor", 3, 1),
    ),
]


def _plan(trail=TRAIL, **changes):
    return plan(trail=trail, **changes)


def _short(ways):
    return [
        (w["dim"], w["axes"], [(s["what"], s["dim"]) for s in w["steps"]], w["origin"])
        for w in ways
    ]


PRODUCT = ("dot_general", 0), ("dot_general", 1)
TANH = [
    (0, ["data"], [("tanh", 0), PRODUCT[0], ("tokens", 0)], BATCH),
    (1, ["tensor"], [("tanh", 1), PRODUCT[1], ("params/w", 1)], MLP),
]


@pytest.mark.parametrize(
    "query",
    [
        "toy.py:9",
        "pkg/toy.py:9",
        "./pkg/toy.py:9",
        "/home/me/pkg/toy.py:9",
        "toy.py:9:4",
    ],
)
def test_a_line_is_walked_back_to_the_annotation(query):
    assert _short(provenance(_plan(), query)) == TANH


def test_a_step_says_what_it_is():
    assert provenance(_plan(), "toy.py:9")[1]["steps"][1] == {
        "what": "dot_general",
        "source": "pkg/toy.py:7:4 (loss)",
        "address": "dot_general#0",
        "shape": [4, 16],
        "dim": 1,
        "spec": [["data"], ["tensor"]],
    }


def test_storage_is_told_apart_from_what_it_is_added_to():
    moment = [("opt_state/0/mu/w", 0)], [("opt_state/0/mu/w", 1), ("params/w", 1)]
    assert _short(provenance(_plan(), "opt_state/0/mu/w")) == [
        (0, ["data"], moment[0], MOMENT),
        (1, ["tensor"], moment[1], MLP),
    ]


def test_axes_that_join_on_the_way_keep_both_origins():
    trail = copy.deepcopy(TRAIL)
    joined = {"axes": ["tensor", "data"], "step": 0, "dim": 1, "origin": MOMENT}
    trail[1]["dims"] = [None, joined]
    trail[4]["dims"] = [None, {**_dim("data", 1, 1)}]
    (way,) = provenance(_plan(trail), "opt_state/0/mu/w")
    assert way["origin"] == f"{MOMENT}; {MLP}"
    # Only `data` is asked for: the way ends where it began, not where `tensor` did.
    (way,) = provenance(_plan(trail), "toy.py:9")
    assert _short([way]) == [
        (0 + 1, ["data"], [("tanh", 1), ("opt_state/0/mu/w", 1)], MOMENT)
    ]


def test_a_tensor_that_nothing_shards_has_no_way():
    assert provenance(_plan(), "params/b") == []


def test_a_copy_of_a_layer_is_explained_by_the_one_that_stands_for_it():
    tensors = [
        tensor(
            f"params/blocks/{k}/{name}",
            [8],
            "params",
            [None],
            [["tensor"]],
            [["tensor"]],
        )
        for k in range(3)
        for name in ("norm1", "norm2")
    ]
    trail = [
        _step(f"params/blocks/0/{name}", "", "", [8], _dim("tensor", origin=name))
        for name in ("norm1", "norm2")
    ]
    (way,) = provenance(_plan(trail, tensors=tensors), "params/blocks/2/norm2")
    assert way["origin"] == "norm2"
    text = way["steps"][0]["what"]
    assert text == "params/blocks/2/norm2 (as params/blocks/0/norm2)"


def test_a_path_that_ends_like_a_line_is_a_path():
    entry = tensor("params/w:3", [8], "params", [None], [["tensor"]], [["tensor"]])
    trail = [_step("params/w:3", "", "", [8], _dim("tensor", origin=MLP))]
    made = _plan(trail, tensors=[entry])
    assert [way["origin"] for way in provenance(made, "params/w:3")] == [MLP]
    assert report.explain_tensor(made, "params/w:3")["path"] == "params/w:3"


def test_unknown_path():
    with pytest.raises(NameUnknownError, match=r"Close to it: .*params/w"):
        provenance(_plan(), "param/w")


def test_a_line_without_sharded_values_names_those_that_have_some():
    with pytest.raises(NameUnknownError, match=r"line 8 of toy\.py") as info:
        provenance(_plan(), "toy.py:8")
    assert "7, 9 (of 2 in this file)" in str(info.value)


def test_the_nearest_lines_are_named():
    trail = [
        _step("sin", f"toy.py:{n}:0 (f)", f"sin#{n}", [4], _dim("data", origin=BATCH))
        for n in range(10, 30)
    ]
    with pytest.raises(NameUnknownError, match=r"26, 27, 28, 29 \(of 20 "):
        provenance(_plan(trail), "toy.py:100")


@pytest.mark.parametrize("query", ["oy.py:9", "to.py:9"])
def test_a_file_without_sharded_values_names_those_that_have_some(query):
    with pytest.raises(NameUnknownError, match=r"it has some of: pkg/toy\.py\."):
        provenance(_plan(), query)


def test_a_plan_without_a_trail_says_so():
    with pytest.raises(NameUnknownError, match="without a trail"):
        provenance(plan(), "toy.py:9")


def test_a_damaged_trail():
    trail = copy.deepcopy(TRAIL)
    trail[0]["dims"][1] = _dim("tensor", 4, 1)
    with pytest.raises(PlanMismatchError, match="runs in a circle"):
        provenance(_plan(trail), "toy.py:9")
    trail[0]["dims"][1] = _dim("tensor", 9, 0)
    with pytest.raises(PlanMismatchError, match="dim 0 of step 9"):
        provenance(_plan(trail), "toy.py:9")
    trail[0]["dims"][1] = _dim("tensor", 2, 1)
    with pytest.raises(PlanMismatchError, match="dim 1 of step 2"):
        provenance(_plan(trail), "toy.py:9")


def test_a_line_shows_its_values_and_its_collectives():
    d = report.explain_tensor(_plan(), "toy.py:7")
    (value,) = d["values"]
    assert (value["what"], value["spec"]) == ("dot_general", [["data"], ["tensor"]])
    assert {c["source"] for c in d["collectives"]} == {"toy.py:7 (loss)"}
    assert len(d["collectives"]) == 3
    assert report.explain_tensor(_plan(), "toy.py:9")["collectives"] == []


def test_a_line_that_only_moves_data_is_no_error():
    d = report.explain_tensor(plan(), "toy.py:7")
    assert d["values"] == []
    assert len(d["collectives"]) == 3
    assert "Nothing that toy.py:7 makes is sharded" in table.to_text(
        depth.depth_view(d)
    )


def test_the_view_walks_op_by_op():
    d = report.explain_tensor(_plan(), "toy.py:9")
    lines = table.to_text(depth.depth_view(d)).splitlines()
    walk = [line for line in lines if line.startswith("  from")]
    assert ["dot_general" in line for line in walk] == [True, False, True, False]
    assert "pkg/toy.py:7:4 (loss)" in walk[0]
    assert "tokens 4 x 32 [*data*, -]" in walk[1]
    assert "params/w 8 x 16 [-, *tensor*]" in walk[3]
    assert [line.strip() for line in lines if line.startswith("  by")] == [
        f"by   {BATCH}",
        f"by   {MLP}",
    ]


def test_a_way_that_was_shown_is_not_repeated():
    trail = copy.deepcopy(TRAIL)
    trail[3]["source"] = trail[4]["source"]
    d = report.explain_tensor(_plan(trail), "toy.py:9")
    text = table.to_text(depth.depth_view(d))
    # Both dims of the second value go on from the first one.
    assert text.count("... and on as above") == 2
    assert text.count("tokens 4 x 32") == 1
    assert text.count(BATCH) == 2


def test_the_view_of_a_tensor_has_the_ways():
    text = table.to_text(depth.depth_view(report.explain_tensor(_plan(), "params/w")))
    assert "Where its axes came from" in text
    assert MLP in text
    text = table.to_text(depth.depth_view(report.explain_tensor(_plan(), "params/b")))
    assert "Where its axes came from" not in text


def test_the_document_of_a_hand_made_plan_has_no_trail():
    assert "trail" not in document()
    assert report.explain_tensor(plan(), "params/w")["ways"] == []


def test_a_searched_plan_leads_from_a_line_to_the_annotation():
    def fn(w, x):
        y = annotate(x @ w, "batch", "mlp")
        return jnp.tanh(y).sum()

    first = fn.__code__.co_firstlineno
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 8), (4, 16))]
    made = ash.search(
        fn,
        *shapes,
        cluster="cpu:8",
        strategy=Strategy(
            name="both",
            about="",
            mesh={"data": 2, "tensor": 4},
            rules={"batch": ["data"], "mlp": ["tensor"]},
        ),
    )
    made = plan_from_json(plan_to_json(made))
    batch, mlp = provenance(made, f"test_provenance.py:{first + 2}")
    assert [s["what"] for s in batch["steps"]] == ["tanh", "annotate"]
    assert [s["what"] for s in mlp["steps"]] == ["tanh", "annotate"]
    assert batch["origin"].startswith("rule batch = [data], annotate at ")
    assert f"test_provenance.py:{first + 1}" in mlp["origin"]
    (weight,) = provenance(made, "0")
    assert [s["what"] for s in weight["steps"]] == ["0", "dot_general", "annotate"]
    with pytest.raises(
        NameUnknownError, match=f"nearest .*: {first + 1}, {first + 2} "
    ):
        provenance(made, f"test_provenance.py:{first}")
