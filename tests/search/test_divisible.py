"""What does not divide is named: an argument, the batch, or an op."""

from __future__ import annotations

import pytest
from propagate.programs import mlp_step, shape

import autoshard as ash
from autoshard.ir.errors import InfeasibleError
from autoshard.plan.strategy import Schedule, Storage, Strategy


def refused(fn, *args, chips=4, **given):
    strategy = Strategy(name="mine", about="", **given)
    with pytest.raises(InfeasibleError) as caught:
        ash.search(fn, *args, cluster=f"cpu:{chips}", strategy=strategy)
    return str(caught.value)


def test_a_result_names_its_op_and_line():
    def fn(x):
        return ash.annotate(x[:, :6] * 2, None, "columns")

    message = refused(fn, shape(8, 8), mesh={"data": 4}, rules={"columns": ["data"]})
    assert "6, the size of a dim of " in message
    assert "test_divisible.py:" in message
    assert "is not divisible by 4 (data)" in message


def test_the_batch_and_its_microbatches():
    message = refused(
        mlp_step(),
        shape(8, 32, 32),
        mesh={"data": 4},
        rules={"batch": ["data"], "seq": [], "embed": [], "mlp": []},
        schedule=Schedule(microbatches=4, remat="none"),
    )
    parts = "the batch of 8 is not divisible into microbatches and devices: 16 (data)"
    assert parts in message


def test_storage_for_which_no_dim_is_left():
    def fn(w, x):
        return x @ w

    message = refused(
        fn,
        shape(6, 6),
        shape(8, 6),
        mesh={"data": 1, "fsdp": 4},
        rules={"batch": ["data"]},
        storage=Storage(params=["fsdp"]),
    )
    assert "no dim of " in message
    assert "is divisible further, by 4 (fsdp)" in message
