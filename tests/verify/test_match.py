"""Planned against emitted collectives: all forms that agree, all causes that differ."""

from __future__ import annotations

import pytest

from autoshard.plan.schema import Collective
from autoshard.verify import comparison as c
from autoshard.verify.hlo import Emitted
from autoshard.verify.match import compare


def plan(
    kind="all_reduce", axes="tensor", bytes_=64, count=1, op="dot_general", **more
):
    fields = {
        "time_s": 0.0,
        "source": "model.py:3:8 (f)",
        "address": f"jvp()/{op}#0",
        "value": "x",
    }
    return Collective(
        kind=kind, axes=axes.split("+"), bytes_=bytes_, count=count, **fields | more
    )


def emit(
    kind="all_reduce", axes="tensor", bytes_=64, count=1, op="dot_general", **more
):
    fields = {"source": "/home/u/model.py:3", "name": f"{kind}.{axes}", **more}
    return Emitted(
        kind, tuple(axes.split("+")), bytes_, count, f"jit(s)/jvp()/{op}", **fields
    )


@pytest.mark.parametrize(
    ("form", "planned", "emitted", "bytes_"),
    [
        (c.AS_PLANNED, [plan(count=4)], [emit(count=4)], 256),
        (c.AS_PLANNED, [plan(axes="data+tensor")], [emit(axes="tensor+data")], 64),
        # Elsewhere in the program, but it moves what was planned.
        (c.AS_PLANNED, [plan()], [emit(op="mul", source="/other.py:9")], 64),
        (c.SLICED_SUM, [plan("reduce_scatter")], [emit(sliced=True)], 64),
        (c.PADDED_SUM, [plan("all_gather")], [emit(padded=True)], 64),
        (c.OTHER_LOOPS, [plan(count=3)], [emit(), emit(count=2)], 192),
        (c.MOVED_LOOP, [plan(count=4)], [emit(bytes_=256)], 256),
    ],
)
def test_what_agrees(form, planned, emitted, bytes_):
    found = compare(planned, emitted)
    assert found.by_form() == {form: bytes_}
    assert found.fraction == 1.0
    assert found.differences == ()


def test_a_sum_over_two_axes_in_two_steps():
    first = emit(axes="tensor", name="a")
    second = emit(axes="data", name="b", fed_by=("a", 0))
    found = compare([plan(axes="data+tensor")], [second, first])
    assert found.by_form() == {c.IN_STEPS: 64}
    assert found.differences == ()
    assert (found.emitted_bytes, found.steps_bytes, found.fraction) == (64, 64, 1.0)


def test_steps_are_not_taken_for_other_sums_of_their_axes():
    steps = [
        emit(axes="tensor", name="a"),
        emit(axes="data", name="b", fed_by=("a", 0)),
        emit(axes="data", name="c"),
    ]
    found = compare([plan(axes="data"), plan(axes="data+tensor")], steps)
    assert found.by_form() == {c.AS_PLANNED: 64, c.IN_STEPS: 64}
    assert found.differences == ()


def test_steps_of_which_one_is_smaller_are_not_one_sum():
    steps = [
        emit(axes="tensor", name="a"),
        emit(axes="data", bytes_=16, name="b", fed_by=("a", 0)),
    ]
    found = compare([plan(axes="data+tensor")], steps)
    assert found.matched_bytes == 0


@pytest.mark.parametrize(
    ("cause", "planned", "emitted"),
    [
        (c.KEPT_WHOLE, [plan("reduce_scatter")], [emit()]),
        (c.CUT, [], [emit("all_gather", op="pad")]),
        (c.CUT, [], [emit("permute", op="slice")]),
        (c.DEVICE_ORDER, [], [emit("permute")]),
        (c.PADDED, [plan("all_gather")], [emit("all_gather", bytes_=72)]),
        (
            c.OTHER_DTYPE,
            [plan(bytes_=32)],
            [emit(bytes_=64, unconverted=96)],
        ),
        (c.OTHER_AXES, [plan("all_gather")], [emit("all_gather", axes="data")]),
        (c.OTHER_BYTES, [plan("all_gather")], [emit("all_gather", bytes_=640)]),
        (c.OTHER_KIND, [plan("all_gather")], [emit("all_to_all", bytes_=16)]),
        (c.UNNAMED_GROUPS, [], [emit(axes="?")]),
        (
            c.RECOMPUTED,
            [],
            [emit("all_gather", op="checkpoint/rematted_computation/mul")],
        ),
        (c.UNEXPLAINED, [plan()], []),
        (c.UNEXPLAINED, [], [emit()]),
        # The same movement for another op on another line is no explanation.
        (
            c.UNEXPLAINED,
            [plan("all_gather", source="a.py:1 (f)")],
            [],
        ),
    ],
)
def test_what_differs(cause, planned, emitted):
    found = compare(planned, emitted)
    assert [d.cause for d in found.differences] == [cause]
    assert found.matched_bytes == 0
    assert found.fraction == 0.0
    assert bool(found.unexplained) == (cause == c.UNEXPLAINED)


def test_two_sides_that_have_nothing_in_common_are_two_differences():
    found = compare([plan(op="exp")], [emit(axes="data", op="log")])
    assert [d.cause for d in found.differences] == [c.UNEXPLAINED] * 2
    assert found.by_cause() == {c.UNEXPLAINED: 128}


def test_a_sum_that_is_scattered_but_never_sliced_is_no_match():
    found = compare([plan("reduce_scatter", count=2)], [emit(count=2)])
    assert found.by_cause() == {c.KEPT_WHOLE: 128}


def test_moved_once_where_the_plan_moves_it_twice():
    found = compare([plan("all_gather"), plan("all_gather")], [emit("all_gather")])
    assert found.by_cause() == {c.MERGED: 64}
    assert found.fraction == 0.5


def test_moved_twice_where_the_plan_moves_it_once():
    found = compare([plan("all_gather")], [emit("all_gather"), emit("all_gather")])
    assert found.by_cause() == {c.REPEATED: 64}
    assert found.fraction == 0.5


def test_a_lookup_is_summed_over_all_axes_at_once():
    planned = [
        plan("reduce_scatter", "fsdp", 64, op="scatter-add"),
        plan("all_reduce", "data", 16, op="scatter-add"),
    ]
    emitted = [emit("all_reduce", "data+fsdp", 64, op="scatter-add", sliced=True)]
    found = compare(planned, emitted)
    [difference] = found.differences
    assert difference.cause == c.AT_ONCE
    assert (difference.planned_bytes, difference.emitted_bytes) == (80, 64)


def test_the_same_op_is_preferred_when_there_are_too_few():
    near = plan(value="near")
    far = plan(value="far", op="exp", source="other.py:1 (g)")
    found = compare([far, near], [emit()])
    assert [a.planned.value for a in found.agreements] == ["near"]


def test_run_once_before_a_loop():
    found = compare([plan("all_gather", count=4)], [emit("all_gather")])
    assert found.by_form() == {c.OTHER_LOOPS: 64}
    assert found.by_cause() == {c.HOISTED: 192}
    assert found.fraction == 0.25


def test_a_sliced_sum_is_left_for_the_reduce_scatter():
    planned = [plan(), plan("reduce_scatter")]
    found = compare(planned, [emit(sliced=True), emit()])
    assert found.by_form() == {c.AS_PLANNED: 64, c.SLICED_SUM: 64}
    assert compare([plan()], [emit(sliced=True)]).by_form() == {c.AS_PLANNED: 64}


def test_a_pin_names_its_op():
    pinned = "pinned[jvp(a->b)/mul#7]in0/sharding_constraint"
    planned = [plan(value=f"x{k}", address=f"jvp(a->b)/mul#{k}") for k in (6, 7, 8)]
    found = compare(planned, [emit(op=pinned)])
    assert [a.planned.value for a in found.agreements] == ["x7"]


def test_slices_and_branches_not_taken_are_left_out():
    found = compare([plan("slice")], [emit(count=0)])
    assert (found.planned_bytes, found.emitted_bytes, found.fraction) == (0, 0, 1.0)


def test_totals_are_those_of_both_sides():
    found = compare(
        [plan(count=2), plan("all_gather", bytes_=10)],
        [emit(count=2), emit("permute", bytes_=7)],
    )
    assert (found.planned_bytes, found.emitted_bytes) == (138, 135)
    assert found.matched_bytes == 128
    assert found.fraction == pytest.approx(128 / 138)


def test_a_difference_names_both_sides():
    found = compare([plan("all_gather")], [emit("all_gather", axes="data")])
    text = str(found.differences[0])
    assert text.startswith(c.OTHER_AXES)
    assert "planned all_gather over tensor of 64 B x 1 (model.py:3:8 (f))" in text
    assert "emitted all_gather over data of 64 B x 1 (/home/u/model.py:3)" in text


def test_every_name_is_listed_once():
    assert len(set(c.FORMS)) == len(c.FORMS)
    assert len(set(c.CAUSES)) == len(c.CAUSES)


# -- what TPU and GPU passes make of a program ---------------------------------------


@pytest.mark.parametrize(
    ("form", "planned", "emitted"),
    [
        # A sum takes what was planned and makes bf16 of it.
        (c.CONVERTS, plan(bytes_=64), emit(bytes_=32, taken_bytes=64)),
        (
            c.CONVERTS,
            plan("reduce_scatter", bytes_=64),
            emit(bytes_=32, taken_bytes=64, sliced=True),
        ),
        (c.SCATTERED, plan("all_reduce"), emit("reduce_scatter")),
        (
            c.MOVED_LOOP,
            plan(count=4),
            emit(bytes_=256, op="while", source="", looped=True),
        ),
    ],
)
def test_what_passes_write_otherwise(form, planned, emitted):
    found = compare([planned], [emitted])
    assert list(found.by_form()) == [form]
    assert found.differences == ()


@pytest.mark.parametrize(
    "emitted",
    [
        emit("all_gather", bytes_=32, unconverted=64),
        emit("all_gather", bytes_=128, converted=64),
        # Far from its op, with no line left.
        emit("all_gather", bytes_=128, converted=64, op="", source=""),
    ],
)
def test_a_conversion_that_changed_its_place(emitted):
    found = compare([plan("all_gather")], [emitted])
    assert list(found.by_cause()) == [c.OTHER_DTYPE]


def test_a_conversion_to_another_size_explains_nothing():
    found = compare(
        [plan("all_gather", source="a.py:1:1")],
        [emit("all_gather", bytes_=128, converted=32, op="mul")],
    )
    assert list(found.by_cause()) == [c.UNEXPLAINED]


def test_a_gather_takes_the_size_it_is_converted_to_before_one_by_chance():
    # The f32 of one is as large as the bf16 of the other.
    planned = [
        plan("all_gather", bytes_=64, source="a.py:1:1", value="params/q"),
        plan("all_gather", bytes_=32, source="a.py:2:1", value="params/k"),
    ]
    emitted = [
        emit("all_gather", bytes_=128, converted=64, op="", source="", name="q"),
        emit("all_gather", bytes_=64, converted=32, op="", source="", name="k"),
    ]
    found = compare(planned, emitted)
    assert found.by_cause() == {c.OTHER_DTYPE: 128 + 64}


def test_a_sum_of_padded_parts_is_left_for_the_gather():
    planned = [plan("all_gather", op="mul"), plan("all_reduce", op="reduce_sum")]
    emitted = [
        emit(op="", source="", padded=True, name="a"),
        emit(op="reduce_sum", source="", name="b", sliced=True),
    ]
    found = compare(planned, emitted)
    assert found.by_form() == {c.AS_PLANNED: 64, c.PADDED_SUM: 64}


def test_sums_at_once_where_the_plan_scatters_and_sums():
    planned = [
        plan("reduce_scatter", axes="tensor", bytes_=64),
        plan("all_reduce", axes="data", bytes_=16),
    ]
    found = compare(planned, [emit(axes="data+tensor", sliced=True)])
    assert list(found.by_cause()) == [c.AT_ONCE]


def test_a_sum_scattered_over_one_axis_and_then_summed_over_the_other():
    emitted = [
        emit("reduce_scatter", axes="tensor", bytes_=64, name="a"),
        emit(axes="data", bytes_=16, name="b", source="", fed_by=("a", 0)),
    ]
    found = compare([plan(axes="data+tensor")], emitted)
    assert list(found.by_cause()) == [c.SCATTERED_FIRST]
    # Nothing ties these two together.
    apart = [emitted[0], emit(axes="data", bytes_=16, name="b", source="")]
    assert compare([plan(axes="data+tensor")], apart).unexplained


def test_sums_after_the_loop_that_adds_up():
    planned = [plan(count=2, op="a"), plan(count=2, op="b", source="m.py:4:1")]
    emitted = [
        emit(op="while", name="a", looped=True),
        emit(op="", source="", name="b", looped=True),
    ]
    found = compare(planned, emitted)
    assert found.by_cause() == {c.SUNK: 128}
    assert found.by_form() == {c.OTHER_LOOPS: 128}


def test_two_sums_that_are_added_and_summed_once():
    planned = [plan(), plan(op="scatter", source="m.py:9:1", value="y")]
    found = compare(planned, [emit(added=True)])
    assert list(found.by_cause()) == [c.ADDED]
    # One sum of two values stands for two, not for three.
    three = [*planned, plan(op="mul", source="m.py:10:1", value="z")]
    assert len(compare(three, [emit(added=True)]).unexplained) == 1
    assert compare(planned, [emit()]).unexplained


def test_a_gather_of_what_was_never_cut():
    summed = plan(op="reduce_sum")
    gather = plan("all_gather", op="pad", value="pad in0")
    found = compare([summed, gather], [emit(op="reduce_sum")])
    assert list(found.by_cause()) == [c.CANCELLED]
    # A parameter is not cut out of a sum, nor is what stands elsewhere.
    for other in ({"value": "params/w"}, {"source": "model.py:4:1"}):
        gather = plan("all_gather", op="pad", **{"value": "pad in0", **other})
        assert compare([summed, gather], [emit(op="reduce_sum")]).unexplained


def test_a_gather_that_serves_another_op_as_well():
    planned = [
        plan("all_gather", op="gather", bytes_=64, value="gather in0"),
        plan("all_gather", op="dot_general", bytes_=32, value="dot in1", source=""),
    ]
    users = frozenset({"jit(s)/while/body/jvp()/dot_general"})
    found = compare(planned, [emit("all_gather", op="gather", users=users)])
    assert list(found.by_cause()) == [c.MERGED]
    assert compare(planned, [emit("all_gather", op="gather")]).unexplained


def test_indices_of_a_lookup_that_are_gathered_for_it():
    gather = emit("all_gather", dtype="s32", used_by="jit(s)/jvp()/gather")
    assert list(compare([], [gather]).by_cause()) == [c.INDICES]
    floats = emit("all_gather", dtype="f32", used_by="jit(s)/jvp()/gather")
    assert compare([], [floats]).unexplained
