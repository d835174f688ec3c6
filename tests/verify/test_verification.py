"""A plan against a whole compiled program: verdict, rows, and what is reckoned."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.equality import abstract_batch, make_step, pinned

from autoshard import api
from autoshard.api import verifying
from autoshard.ir.errors import InputError
from autoshard.plan.cluster import cluster
from autoshard.plan.schema import Collective, ModelRef
from autoshard.search import search_plans
from autoshard.verify import beyond, unplanned
from autoshard.verify.aot import CompiledMemory, OutOfMemory
from autoshard.verify.clocks import CompilerTime
from autoshard.verify.hlo import Emitted
from autoshard.verify.match import compare
from autoshard.verify.verification import Verification, rows


def planned(bytes_=64, count=1, **more):
    fields = {"source": "m.py:3:1 (f)", "address": "jvp()/dot#0", "value": "x"}
    return Collective(
        kind="all_reduce",
        axes=("data",),
        bytes_=bytes_,
        count=count,
        time_s=0.0,
        **fields | more,
    )


def emitted(bytes_=64, count=1, kind="all_reduce", **more):
    fields = {"op_name": "jit(s)/jvp()/dot", "source": "m.py:3", "name": "ar"}
    return Emitted(kind, ("data",), bytes_, count, **fields | more)


def verification(plans, found, **changes):
    comparison = compare(plans, found)
    made = Verification(
        target="tpu v5e:2x4",
        planned_memory_bytes=1000,
        capacity_bytes=2000,
        compiled=CompiledMemory(500, 400, 300, 200),
        refused=None,
        planned_compute_s=1.0,
        counted_compute_s=None,
        planned_collective_s=0.5,
        time=CompilerTime(2.0, None, 0),
        comparison=comparison,
        partitioned=None,
        rematerialized=(),
        rows=rows(comparison),
        blocks=(),
        compile_s=3.0,
    )
    return replace(made, **changes)


def test_alike_collectives_share_a_row_and_differences_come_first():
    found = verification(
        [planned(), planned(), planned(8, address="jvp()/mul#0", source="m.py:4:1")],
        [emitted(), emitted(), emitted(4, source="m.py:4", op_name="jit(s)/jvp()/mul")],
    ).rows
    assert [row.agrees for row in found] == [False, True]
    assert (
        found[1].planned == found[1].emitted == (("all_reduce", ("data",), "m.py:3"),)
    )
    assert (found[1].planned_runs, found[1].planned_bytes) == (2, 128)
    assert (found[0].planned_bytes, found[0].emitted_bytes) == (8, 4)


def test_memory_is_the_sum_that_is_allocated_at_once():
    found = verification([], [])
    assert found.compiled.peak_bytes == 800
    assert found.memory_error == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"capacity_bytes": 799}, False),
        ({"capacity_bytes": None}, None),
        ({"refused": OutOfMemory("too big", None, None), "compiled": None}, False),
    ],
)
def test_whether_it_fits(changes, fits):
    assert verification([], [], **changes).fits is fits


def test_the_time_of_a_step_takes_planned_figures_where_there_are_no_others():
    assert verification([], []).step_s == 2.5
    assert verification([], [], time=CompilerTime(2.0, 0.1, 0)).step_s == 2.1
    assert verification([], [], time=None).step_s == 1.5


def test_the_share_that_is_exact_leaves_other_forms_out():
    found = verification(
        [planned(), planned(source="m.py:9:1", address="jvp()/mul#0")],
        [emitted(), emitted(kind="reduce_scatter", source="m.py:9")],
    )
    assert found.comparison.fraction == 1.0
    assert found.exact_fraction == 0.5


def test_what_the_compiler_adds_is_unplanned_and_what_passes_rewrite_is_not():
    added = emitted(32, kind="all_to_all", source="m.py:7", op_name="jit(s)/transpose")
    found = unplanned(verification([planned()], [emitted(), added]))
    assert (found.bytes_, found.lines) == (32, {"m.py:7"})
    narrow = emitted(32, unconverted=64)
    assert unplanned(verification([planned()], [narrow])).bytes_ == 0


def test_figures_of_many_blocks_from_those_of_two():
    def blocks(count):
        return verification(
            [planned(count=count), planned(8, source="end", address="output")],
            [emitted(count=count), emitted(8, source="", op_name="")],
            compiled=CompiledMemory(100 + 10 * count, 90, 80, 50 + count),
            time=CompilerTime(1.0 + count, 0.5 * count, 0),
        )

    plan = plan_of("dp", data=8)
    found = beyond(plan, blocks(1), blocks(2), (1, 2, 32))
    truth = blocks(32)
    assert found.compiled == truth.compiled
    assert found.time.compute_s == pytest.approx(truth.time.compute_s)
    assert found.time.collective_s == pytest.approx(truth.time.collective_s)
    assert set(found.rows) == set(truth.rows)
    assert found.blocks == (1, 2)
    assert found.planned_memory_bytes == plan.predicted.memory.total


def test_compute_at_the_rates_of_the_compiler_is_beside_that_of_the_chip():
    plan = plan_of("dp", data=8)
    one = verification([], [])
    predicted = plan.predicted
    assert predicted.counted_compute_s is None  # of a host
    found = beyond(plan, one, one, (1, 2, 4))
    assert found.planned_compute_s == predicted.matmul_s + predicted.memory_bound_s
    assert found.counted_compute_s is None
    counted = predicted.model_copy(update={"counted_compute_s": 0.25})
    plan = plan.model_copy(update={"predicted": counted})
    found = beyond(plan, one, one, (1, 2, 4))
    assert found.planned_compute_s == predicted.matmul_s + predicted.memory_bound_s
    assert found.counted_compute_s == 0.25


def plan_of(strategy, **mesh):
    policy = pinned(strategy, microbatches=1, remat="none", **mesh)
    step = make_step("llama3-tiny", scan=False)
    [plan] = search_plans(step, (abstract_batch(),), cluster("cpu:8"), policy)
    return plan


def named(scan, strategy="dp"):
    ref = ModelRef(
        model="llama3-tiny",
        batch=8,
        seq=16,
        optimizer="sgd",
        learning_rate=0.1,
        dtype="f32",
        scan_layers=scan,
    )
    resolved = api.resolve(ref)
    plan = api.search(
        resolved.step,
        resolved.batch,
        cluster="cpu:8",
        strategy=strategy,
        model_ref=ref,
    )
    return resolved.step, plan


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_figures_reckoned_from_two_programs_are_those_of_the_whole(scan):
    step, plan = named(scan, "fsdp")
    whole = api.verify_plan(step, plan)
    reckoned = api.verify_plan(step, plan, blocks=2)
    assert reckoned.blocks == ((2, 3) if scan else (1, 2))

    def by_verdict(found):
        sums = {}
        for row in found.rows:
            had = sums.get(row.verdict, (0, 0))
            sums[row.verdict] = (
                had[0] + row.planned_bytes,
                had[1] + row.emitted_bytes,
            )
        return sums

    assert by_verdict(reckoned) == by_verdict(whole)
    given = reckoned.compiled.argument_bytes
    assert given == pytest.approx(whole.compiled.argument_bytes, rel=0.001)


def test_blocks_of_a_program_that_names_no_model():
    step = make_step("llama3-tiny", scan=False)
    plan = plan_of("dp", data=8)
    with pytest.raises(InputError, match="needs a model by its name"):
        api.verify_plan(step, plan, blocks=2)
    with pytest.raises(InputError, match="must be auto, full, 1 or 2; got 3"):
        api.verify_plan(step, plan, blocks=3)


def test_auto_compiles_a_loop_and_few_blocks_whole():
    assert verifying._blocks(named(True)[1], "auto", 32) == ()
    unrolled = named(False)[1]
    assert verifying._blocks(unrolled, "auto", verifying.UNROLLED_AT_MOST) == ()
    assert verifying._blocks(unrolled, "auto", 32) == (1, 2)
    assert verifying._blocks(unrolled, "1", 32) == (1,)


def test_what_is_rematerialised_must_repeat():
    plan = named(False)[1]
    strategy = plan.strategy
    schedule = strategy.schedule.model_copy(update={"remat": "full"})
    plan = plan.model_copy(
        update={"strategy": strategy.model_copy(update={"schedule": schedule})}
    )
    assert verifying._blocks(plan, "2", 32) == (2, 3)
    with pytest.raises(InputError, match="verify it with --blocks 2"):
        verifying._blocks(plan, "1", 32)


def test_a_plan_without_its_constraints_is_repaired():
    step = make_step("llama3-tiny", scan=True)
    policy = pinned("megatron-sp", microbatches=1, remat="none", data=2, tensor=4)
    [plan] = search_plans(step, (abstract_batch(),), cluster("cpu:8"), policy)
    bare = plan.model_copy(update={"constraints": ()})
    done = api.repair_plan(step, bare, target="host")
    assert done.better
    assert unplanned(done.before).bytes_ > unplanned(done.after).bytes_ == 0
    assert set(done.plan.constraints) == set(done.added)
    # Nothing is left to do, and a second repair says so.
    again = api.repair_plan(step, done.plan, target="host")
    assert (again.better, again.plan) == (False, done.plan)
    assert again.why == "the compiler moves nothing that is not planned"
