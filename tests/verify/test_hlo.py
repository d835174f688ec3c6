"""Collectives read from HLO text written by hand: kind, axes, bytes, runs, source."""

from __future__ import annotations

import pytest

from autoshard.ir.errors import InputError
from autoshard.verify.hlo import collectives
from autoshard.verify.module import Module, bytes_of

MESH = {"data": 2, "tensor": 4}

TABLES = """
FileNames
1 "/home/user/model.py"
2 "/home/user/train.py"

FunctionNames
1 "layer"
2 "main"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=4 end_column=9}
2 {file_name_id=2 function_name_id=2 line=7 end_line=7 column=0 end_column=3}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
"""


def read(entry, *, before="", signature="(p: f32[8,4]) -> f32[8,4]"):
    lines = "\n".join(f"  {line}" for line in entry)
    text = f"HloModule m\n{TABLES}\n{before}\nENTRY %main {signature} {{\n{lines}\n}}\n"
    return collectives(Module(text), MESH)


P = "%p = f32[8,4]{1,0} parameter(0)"


@pytest.mark.parametrize(
    ("line", "kind", "axes", "bytes_"),
    [
        # f32[8,4] is 128 bytes; the larger side counts.
        (
            "ROOT %c = f32[8,4]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8],"
            " to_apply=%add",
            "all_reduce",
            ("tensor",),
            128,
        ),
        (
            "ROOT %c = f32[32,4]{1,0} all-gather(%p), dimensions={0},"
            " replica_groups={{0,1,2,3},{4,5,6,7}}",
            "all_gather",
            ("tensor",),
            512,
        ),
        (
            "ROOT %c = f32[4,4]{1,0} reduce-scatter(%p), dimensions={0},"
            " replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add",
            "reduce_scatter",
            ("data",),
            128,
        ),
        (
            "ROOT %c = f32[8,4]{1,0} all-to-all(%p), dimensions={0},"
            " replica_groups=[2,4]<=[8]",
            "all_to_all",
            ("tensor",),
            128,
        ),
        (
            "ROOT %c = f32[8,4]{1,0} collective-permute(%p),"
            " source_target_pairs={{0,4},{4,0}}",
            "permute",
            ("data",),
            128,
        ),
        (
            "%s = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%p),"
            " dimensions={0}, replica_groups=[2,4]<=[8]",
            "all_gather",
            ("tensor",),
            512,
        ),
        (
            "%s = f32[8,4]{1,0} all-reduce-start(%p), replica_groups={}, to_apply=%add",
            "all_reduce",
            ("data", "tensor"),
            128,
        ),
        (
            "%s = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[])"
            " collective-permute-start(%p), source_target_pairs={{0,1}}",
            "permute",
            ("tensor",),
            128,
        ),
    ],
)
def test_each_kind(line, kind, axes, bytes_):
    [found] = read([P, line])
    assert (found.kind, found.axes, found.bytes_, found.count) == (
        kind,
        axes,
        bytes_,
        1,
    )


def test_the_done_of_an_asynchronous_pair_is_not_counted_again():
    found = read(
        [
            P,
            "%s = f32[8,4]{1,0} all-reduce-start(%p), replica_groups={}",
            "ROOT %d = f32[8,4]{1,0} all-reduce-done(%s)",
        ]
    )
    assert [f.name for f in found] == ["s"]


def test_a_wrapped_asynchronous_collective():
    before = (
        "%wrapped (q: f32[8,4]) -> f32[4,4] {\n"
        "  %q = f32[8,4]{1,0} parameter(0)\n"
        "  ROOT %rs = f32[4,4]{1,0} reduce-scatter(%q), dimensions={0},"
        " replica_groups=[4,2]<=[2,4]T(1,0)\n}\n"
    )
    found = read(
        [
            P,
            "%s = ((f32[8,4]), f32[4,4], s32[]) async-start(%p), calls=%wrapped",
            "ROOT %d = f32[4,4]{1,0} async-done(%s), calls=%wrapped",
        ],
        before=before,
    )
    assert [(f.kind, f.bytes_) for f in found] == [("reduce_scatter", 128)]


def test_one_that_moves_several_arrays_counts_each_with_its_own_op():
    found = read(
        [
            P,
            "%q = bf16[6]{0} parameter(1)",
            "%c = (f32[8,4]{1,0}, bf16[6]{0}) all-reduce(%p, %q),"
            " replica_groups=[2,4]<=[8], to_apply=%add,"
            ' metadata={op_name="jit(f)/(a:b)"}',
            "%x = f32[8,4]{1,0} get-tuple-element(%c), index=0,"
            ' metadata={op_name="jit(f)/a" stack_frame_id=2}',
            "ROOT %y = bf16[6]{0} get-tuple-element(%c), index=1,"
            ' metadata={op_name="jit(f)/b" stack_frame_id=1}',
        ]
    )
    assert [(f.bytes_, f.element, f.elements) for f in found] == [
        (128, 0, 2),
        (12, 1, 2),
    ]
    assert [(f.op_name, f.source) for f in found] == [
        ("jit(f)/a", "/home/user/model.py:42"),
        ("jit(f)/b", "/home/user/train.py:7"),
    ]


def test_an_all_to_all_of_one_array_per_device_is_one():
    [found] = read(
        [
            P,
            "%q = f32[8,4]{1,0} parameter(1)",
            "ROOT %c = (f32[8,4]{1,0}, f32[8,4]{1,0}) all-to-all(%p, %q),"
            " replica_groups={{0,4},{1,5},{2,6},{3,7}}",
        ]
    )
    assert (found.axes, found.bytes_) == (("data",), 256)


def test_a_group_of_one_device_moves_nothing():
    line = "ROOT %c = f32[8,4]{1,0} all-reduce(%p), replica_groups=[8,1]<=[8]"
    assert read([P, line]) == ()


def test_source_lines_in_the_older_form():
    [found] = read(
        [
            P,
            "ROOT %c = f32[8,4]{1,0} all-reduce(%p), replica_groups={},"
            ' metadata={op_name="jit(f)/x" source_file="/m.py" source_line=3}',
        ]
    )
    assert (found.op_name, found.source) == ("jit(f)/x", "/m.py:3")


# --- what runs how often --------------------------------------------------------------

INNER = """
%cond (t: (s32[], f32[8,4])) -> pred[] {{
  %t = (s32[], f32[8,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant({bound})
  ROOT %lt = pred[] compare(%i, %n), direction={direction}
}}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {{
  %t = (s32[], f32[8,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant({step})
  %x = f32[8,4]{{1,0}} get-tuple-element(%t), index=1
  %c = f32[8,4]{{1,0}} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %j = s32[] {op}(%i, %one)
  ROOT %r = (s32[], f32[8,4]{{1,0}}) tuple(%j, %c)
}}
"""


def loop(first=0, *, bound=12, direction="LT", step=1, op="add", config=""):
    return read(
        [
            P,
            f"%z = s32[] constant({first})",
            "%t = (s32[], f32[8,4]{1,0}) tuple(%z, %p)",
            "ROOT %w = (s32[], f32[8,4]{1,0}) while(%t), condition=%cond, body=%body"
            + config,
        ],
        before=INNER.format(bound=bound, direction=direction, step=step, op=op),
    )


@pytest.mark.parametrize(
    ("changes", "trips"),
    [
        ({}, 12),
        ({"first": 2}, 10),
        ({"step": 5}, 3),
        ({"direction": "LE"}, 13),
        ({"first": 12, "bound": 0, "direction": "GT", "op": "subtract"}, 12),
        ({"first": 12, "bound": 0, "direction": "GE", "op": "subtract"}, 13),
        ({"first": 20}, 0),
        (
            {
                "bound": 99,
                "config": ', backend_config={"known_trip_count":{"n":"4"}}',
            },
            4,
        ),
    ],
)
def test_runs_of_a_loop(changes, trips):
    [found] = loop(**changes)
    assert (found.count, found.bounded) == (trips, True)


def test_a_loop_without_a_known_end_counts_once_and_says_so():
    [found] = loop(direction="NE")
    assert (found.count, found.bounded) == (1, False)


def test_of_two_branches_the_one_that_moves_more_counts():
    before = "".join(
        f"%{name} (q: f32[8,4]) -> f32[8,4] {{\n"
        "  %q = f32[8,4]{1,0} parameter(0)\n"
        f"  ROOT %{name}.c = f32[{rows},4]{{1,0}} all-gather(%q), dimensions={{0}},"
        f" replica_groups={groups}\n}}\n"
        for name, rows, groups in (
            ("few", 16, "[4,2]<=[2,4]T(1,0)"),
            ("many", 32, "[2,4]<=[8]"),
        )
    )
    line = "ROOT %c = f32[8,4]{1,0} conditional(%k, %p, %p), "
    for names in (
        "branch_computations={%few, %many}",
        "true_computation=%few, false_computation=%many",
    ):
        found = read([P, "%k = s32[] parameter(1)", line + names], before=before)
        assert [(f.axes, f.count) for f in found] == [(("data",), 0), (("tensor",), 1)]


@pytest.mark.parametrize(
    "line",
    [
        "ROOT %c = f32[8,4]{1,0} fusion(%p), kind=kCustom, calls=%inner",
        "ROOT %c = f32[8,4]{1,0} call(%p), to_apply=%inner",
    ],
)
def test_inside_calls_and_fusions(line):
    before = (
        "%inner (q: f32[8,4]) -> f32[8,4] {\n"
        "  %q = f32[8,4]{1,0} parameter(0)\n"
        "  ROOT %ar = f32[8,4]{1,0} all-reduce(%q), replica_groups={}\n}\n"
    )
    assert [f.name for f in read([P, line], before=before)] == ["ar"]


# --- around a collective --------------------------------------------------------------

SUM = "%c = f32[8,4]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add"
SLICE = "dynamic-slice({}, %k, %k), dynamic_slice_sizes={{2,4}}"


@pytest.mark.parametrize(
    ("after", "sliced"),
    [
        ([f"ROOT %s = f32[2,4]{{1,0}} {SLICE.format('%c')}"], True),
        (
            [
                "%b = f32[8,4]{1,0} copy(%c)",
                f"ROOT %s = f32[2,4]{{1,0}} {SLICE.format('%b')}",
            ],
            True,
        ),
        (["ROOT %n = f32[8,4]{1,0} negate(%c)"], False),
        (
            [
                f"%s = f32[2,4]{{1,0}} {SLICE.format('%c')}",
                "%n = f32[8,4]{1,0} negate(%c)",
                "ROOT %t = (f32[2,4], f32[8,4]) tuple(%s, %n)",
            ],
            False,
        ),
        # What nothing depends on is removed by a later pass.
        (
            [
                "%n = f32[8,4]{1,0} negate(%c)",
                f"ROOT %s = f32[2,4]{{1,0}} {SLICE.format('%c')}",
            ],
            True,
        ),
        (["ROOT %b = f32[8,4]{1,0} copy(%c)"], False),
        (["ROOT %f = f32[2,4]{1,0} fusion(%k, %c), kind=kLoop, calls=%cut"], True),
        (["ROOT %f = f32[2,4]{1,0} fusion(%c, %k), kind=kLoop, calls=%use"], False),
    ],
)
def test_whether_only_a_slice_is_kept(after, sliced):
    before = (
        "%cut (k: s32[], q: f32[8,4]) -> f32[2,4] {\n"
        "  %k = s32[] parameter(0)\n"
        "  %q = f32[8,4]{1,0} parameter(1)\n"
        f"  ROOT %s = f32[2,4]{{1,0}} {SLICE.format('%q')}\n}}\n"
        "%use (q: f32[8,4], k: s32[]) -> f32[2,4] {\n"
        "  %q = f32[8,4]{1,0} parameter(0)\n"
        "  %k = s32[] parameter(1)\n"
        "  %n = f32[8,4]{1,0} negate(%q)\n"
        f"  ROOT %s = f32[2,4]{{1,0}} {SLICE.format('%n')}\n}}\n"
    )
    [found] = read([P, "%k = s32[] parameter(1)", SUM, *after], before=before)
    assert found.sliced is sliced


def test_what_feeds_what():
    found = read(
        [
            P,
            SUM,
            "%b = f32[32]{0} bitcast(%c)",
            "ROOT %d = f32[32]{0} all-reduce(%b), replica_groups=[4,2]<=[2,4]T(1,0)",
        ]
    )
    assert [(f.name, f.fed_by) for f in found] == [("c", None), ("d", ("c", 0))]


def test_parts_set_into_zeros():
    found = read(
        [
            P,
            "%z = f32[16,4]{1,0} broadcast(%o), dimensions={}",
            "%u = f32[16,4]{1,0} dynamic-update-slice(%z, %p, %k, %k)",
            "ROOT %c = f32[16,4]{1,0} all-reduce(%u), replica_groups={}",
        ]
    )
    assert [(f.padded, f.unconverted) for f in found] == [(True, 0)]


def test_bytes_of_element_types():
    assert bytes_of((("pred", (3,)), ("f8e4m3fn", (2,)), ("c64", ()))) == 3 + 2 + 8
    with pytest.raises(InputError, match="'tuple'"):
        bytes_of((("tuple", ()),))


def test_what_is_no_module_is_refused():
    with pytest.raises(InputError, match="no ENTRY computation"):
        Module("not a module")
