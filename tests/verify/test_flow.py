"""Where a collective's operand comes from and its result goes, on TPUs and GPUs."""

from __future__ import annotations

from autoshard.verify.hlo import collectives
from autoshard.verify.module import Module

SIZES = {"data": 2, "tensor": 4}
TENSOR = "replica_groups=[2,4]<=[8]"


def read(*computations):
    """The first is the entry; each is a head, lines, and has its root marked."""
    text = "HloModule m, num_partitions=8\n\n"
    entry, *others = computations
    for head, *lines in others:
        text += f"%{head} {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n\n"
    head, *lines = entry
    text += f"ENTRY %{head} {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n"
    return collectives(Module(text), SIZES)


def test_a_gather_that_tpus_run_beside_other_ops_counts_once():
    gather = (
        "%{} = bf16[32]{{0}} all-gather(%p), channel_id=7, "
        f"{TENSOR}, dimensions={{{{0}}}}"
    )
    found = read(
        (
            "main (x: bf16[8]) -> bf16[32]",
            "%x = bf16[8]{0} parameter(0)",
            "%s = (bf16[8], bf16[32]) fusion(%x), kind=kCustom, calls=%start",
            "%b = (bf16[8], bf16[32]) fusion(%s), kind=kLoop, calls=%beside",
            "ROOT %d = bf16[32]{0} fusion(%b), kind=kCustom, calls=%done",
        ),
        (
            "start (p: bf16[8]) -> (bf16[8], bf16[32])",
            "%p = bf16[8]{0} parameter(0)",
            gather.format("a"),
            "ROOT %c = (bf16[8], bf16[32]) custom-call(%a), "
            'custom_call_target="AsyncCollectiveStart"',
        ),
        (
            "beside (p: bf16[8]) -> (bf16[8], bf16[32])",
            "%p = bf16[8]{0} parameter(0)",
            gather.format("e"),
            'ROOT %c = (bf16[8], bf16[32]) custom-call(%e), custom_call_target="x"',
        ),
        (
            "done (p: bf16[8]) -> bf16[32]",
            "%p = bf16[8]{0} parameter(0)",
            gather.format("f"),
            "ROOT %c = bf16[32]{0} custom-call(%f), "
            'custom_call_target="AsyncCollectiveDone"',
        ),
    )
    assert [(f.kind, f.axes, f.bytes_) for f in found] == [
        ("all_gather", ("tensor",), 64)
    ]


def test_what_a_gpu_lays_end_to_end_counts_one_by_one():
    found = read(
        (
            "main (x: f32[8,2], y: f32[4]) -> f32[20]",
            "%x = f32[8,2]{1,0} parameter(0)",
            "%y = f32[4]{0} parameter(1)",
            '%a = f32[8,2]{1,0} negate(%x), metadata={op_name="jit(s)/neg"}',
            "%b = f32[16]{0} bitcast(%a)",
            "%c = f32[20]{0} fusion(%b, %y), kind=kLoop, calls=%wrapped",
            f"ROOT %r = f32[20]{{0}} all-reduce(%c), {TENSOR}",
        ),
        (
            "wrapped (p: f32[16], q: f32[4]) -> f32[20]",
            "%p = f32[16]{0} parameter(0)",
            "%q = f32[4]{0} parameter(1)",
            "ROOT %k = f32[20]{0} concatenate(%p, %q), dimensions={0}",
        ),
    )
    assert [(f.bytes_, f.element, f.op_name) for f in found] == [
        (64, 0, "jit(s)/neg"),
        (16, 1, ""),
    ]


def test_a_concatenation_of_the_users_is_one():
    found = read(
        (
            "main (x: f32[4], y: f32[4]) -> f32[8]",
            "%x = f32[4]{0} parameter(0)",
            "%y = f32[4]{0} parameter(1)",
            "%c = f32[8]{0} concatenate(%x, %y), dimensions={0}, "
            'metadata={op_name="jit(s)/concatenate"}',
            f"ROOT %r = f32[8]{{0}} all-reduce(%c), {TENSOR}",
        )
    )
    assert [f.bytes_ for f in found] == [32]


def test_a_copy_that_converts_before_a_loop_is_a_conversion():
    found = read(
        (
            "main (i: s32[], x: f32[8]) -> (s32[], bf16[8])",
            "%i = s32[] parameter(0)",
            "%x = f32[8]{0} parameter(1)",
            "%c = bf16[8]{0} copy(%x)",
            "%t = (s32[], bf16[8]) tuple(%i, %c)",
            "ROOT %w = (s32[], bf16[8]) while(%t), condition=%test, body=%body, "
            'backend_config={"known_trip_count":{"n":"3"}}',
        ),
        (
            "body (t: (s32[], bf16[8])) -> (s32[], bf16[8])",
            "%t = (s32[], bf16[8]) parameter(0)",
            "%i = s32[] get-tuple-element(%t), index=0",
            "%c = bf16[8]{0} get-tuple-element(%t), index=1",
            f"%g = bf16[32]{{0}} all-gather(%c), {TENSOR}, dimensions={{0}}",
            "ROOT %r = (s32[], bf16[8]) tuple(%i, %c)",
        ),
        (
            "test (t: (s32[], bf16[8])) -> pred[]",
            "%t = (s32[], bf16[8]) parameter(0)",
            "ROOT %c = pred[] constant(true)",
        ),
    )
    assert [(f.bytes_, f.count, f.unconverted) for f in found] == [(64, 3, 128)]


def test_what_a_loop_changes_is_not_what_it_got():
    found = read(
        (
            "main (i: s32[], x: f32[8]) -> (s32[], f32[8])",
            "%i = s32[] parameter(0)",
            "%x = bf16[8]{0} parameter(1)",
            "%c = f32[8]{0} convert(%x)",
            "%t = (s32[], f32[8]) tuple(%i, %c)",
            "ROOT %w = (s32[], f32[8]) while(%t), condition=%test, body=%body",
        ),
        (
            "body (t: (s32[], f32[8])) -> (s32[], f32[8])",
            "%t = (s32[], f32[8]) parameter(0)",
            "%i = s32[] get-tuple-element(%t), index=0",
            "%c = f32[8]{0} get-tuple-element(%t), index=1",
            f"%g = f32[8]{{0}} all-reduce(%c), {TENSOR}",
            "ROOT %r = (s32[], f32[8]) tuple(%i, %g)",
        ),
        (
            "test (t: (s32[], f32[8])) -> pred[]",
            "%t = (s32[], f32[8]) parameter(0)",
            "ROOT %c = pred[] constant(true)",
        ),
    )
    assert [f.unconverted for f in found] == [0]


def test_the_type_that_all_uses_convert_to():
    def gathered(*uses):
        [found] = read(
            (
                "main (x: f32[8]) -> f32[32]",
                "%x = f32[8]{0} parameter(0)",
                "%s = (f32[8], f32[32]) all-gather-start(%x), "
                f"{TENSOR}, dimensions={{0}}",
                "%g = f32[32]{0} all-gather-done(%s)",
                *uses,
            ),
            (
                "narrow (p: f32[32]) -> bf16[32]",
                "%p = f32[32]{0} parameter(0)",
                "ROOT %c = bf16[32]{0} convert(%p)",
            ),
        )
        return found.converted

    narrow = "bf16[32]{0} fusion(%g), kind=kLoop, calls=%narrow"
    assert gathered(f"ROOT %a = {narrow}") == 64
    assert gathered("ROOT %a = bf16[32]{0} convert(%g)") == 64
    assert gathered(f"%a = {narrow}", "ROOT %b = f32[32]{0} negate(%g)") == 0


def test_everything_that_takes_a_result_is_named():
    [found] = read(
        (
            "main (x: f32[8]) -> (bf16[32], bf16[32])",
            "%x = f32[8]{0} parameter(0)",
            f"%g = f32[32]{{0}} all-gather(%x), {TENSOR}, dimensions={{0}}",
            "%m = (f32[32], bf16[32]) fusion(%g), kind=kLoop, calls=%several",
            "%b = bf16[32]{0} get-tuple-element(%m), index=1",
            '%d = bf16[32]{0} negate(%b), metadata={op_name="jit(s)/neg"}',
            "ROOT %r = (bf16[32], bf16[32]) tuple(%b, %d)",
        ),
        (
            "several (p: f32[32]) -> (f32[32], bf16[32])",
            "%p = f32[32]{0} parameter(0)",
            '%a = f32[32]{0} abs(%p), metadata={op_name="jit(s)/abs"}',
            "%c = bf16[32]{0} convert(%p)",
            "ROOT %r = (f32[32], bf16[32]) tuple(%a, %c)",
        ),
    )
    assert found.users == {"jit(s)/abs", "jit(s)/neg"}


def test_what_makes_the_operand_is_seen_through_fusions_and_loops():
    def summed(*maker):
        [found] = read(
            (
                "main (x: f32[8], y: f32[8]) -> f32[8]",
                "%x = f32[8]{0} parameter(0)",
                "%y = f32[8]{0} parameter(1)",
                *maker,
                f"ROOT %r = f32[8]{{0}} all-reduce(%a), {TENSOR}",
            ),
            (
                "adds (p: f32[8], q: f32[8]) -> f32[8]",
                "%p = f32[8]{0} parameter(0)",
                "%q = f32[8]{0} parameter(1)",
                "ROOT %s = f32[8]{0} add(%p, %q)",
            ),
            (
                "sets (p: f32[8], q: f32[2]) -> f32[8]",
                "%p = f32[8]{0} parameter(0)",
                "%q = f32[2]{0} parameter(1)",
                "%k = s32[] constant(0)",
                "ROOT %s = f32[8]{0} dynamic-update-slice(%p, %q, %k)",
            ),
        )
        return found.added, found.padded, found.looped

    adds = "%a = f32[8]{0} fusion(%x, %y), kind=kLoop, calls=%adds"
    sets = "%a = f32[8]{0} fusion(%x, %y), kind=kLoop, calls=%sets"
    onto = "%a = f32[8]{0} scatter(%x, %y, %y), to_apply=%adds"
    empty = "%z = f32[8]{0} broadcast(%y), dimensions={}"
    into = "%a = f32[8]{0} scatter(%z, %y, %y), to_apply=%adds"
    assert summed(adds) == (True, False, False)
    assert summed(sets) == (False, True, False)
    assert summed(onto) == (True, False, False)
    assert summed(empty, into) == (False, False, False)


def test_a_sum_that_converts_on_its_way():
    [found] = read(
        (
            "main (x: f32[8]) -> bf16[8]",
            "%x = f32[8]{0} parameter(0)",
            f"ROOT %r = bf16[8]{{0}} all-reduce(%x), {TENSOR}",
        )
    )
    assert (found.bytes_, found.taken_bytes) == (16, 32)
