"""A covering subset of the matrix; `make full` runs all of it."""

from __future__ import annotations

import pytest
from helpers.equality import pinned, run_and_compare

from autoshard.plan.files import load_strategy, strategy_names

TOLERANCE = 1e-5

# Every strategy, both models, both forms of the layers, both remats, with and without
# accumulation, each value next to several of the others.
CASES = [
    ("llama3-tiny", True, "dp", 2, "full", {}),
    ("gpt2-tiny", False, "zero1", 1, "none", {}),
    ("llama3-tiny", True, "fsdp", 2, "dots", {"data": 2, "fsdp": 4}),
    ("gpt2-tiny", False, "megatron-sp", 1, "dots", {"data": 2, "tensor": 4}),
    ("llama3-tiny", False, "zero2", 2, "full", {}),
    ("gpt2-tiny", True, "fsdp", 2, "full", {"data": 2, "fsdp": 4}),
    ("gpt2-tiny", False, "megatron-tp", 2, "full", {"data": 2, "tensor": 4}),
    ("llama3-tiny", True, "redco", 2, "none", {"data": 4, "tensor": 2}),
    ("llama3-tiny", True, "megatron-sp", 1, "none", {"data": 1, "tensor": 8}),
    ("gpt2-tiny", True, "fsdp-tp", 4, "none", {"data": 2, "fsdp": 2, "tensor": 2}),
    (
        "llama3-tiny",
        True,
        "fsdp-tp-cp",
        2,
        "full",
        {"data": 1, "fsdp": 2, "context": 2},
    ),
    ("gpt2-tiny", False, "fsdp-tp-cp", 1, "none", {"data": 1, "fsdp": 1, "tensor": 2}),
    ("mixtral-tiny", True, "ep", 2, "full", {"data": 2, "fsdp": 1, "expert": 4}),
    ("mixtral-tiny", False, "ep", 1, "none", {"data": 2, "fsdp": 2, "expert": 2}),
]


@pytest.mark.parametrize(
    ("model", "scan", "name", "cuts", "remat", "mesh"),
    [
        # Every second one is run on the newest JAX, too.
        pytest.param(*case, marks=pytest.mark.one_jax if k % 2 else ())
        for k, case in enumerate(CASES)
    ],
)
def test_sharded_equals_single_device(model, scan, name, cuts, remat, mesh):
    strategy = pinned(name, microbatches=cuts, remat=remat, **mesh)
    found = run_and_compare(model, scan, strategy)
    assert (found["microbatches"], found["remat"]) == (cuts, remat)
    assert found["round_trip"]
    assert max(found["worst"].values()) <= TOLERANCE, found


@pytest.mark.one_jax
@pytest.mark.parametrize(
    ("name", "order", "mesh"),
    [
        ("fsdp", ("fsdp", "data"), {"data": 2, "fsdp": 4}),
        ("megatron-sp", ("tensor", "data"), {"data": 4, "tensor": 2}),
        (
            "fsdp-tp",
            ("tensor", "fsdp", "data"),
            {"data": 2, "fsdp": 2, "tensor": 2},
        ),
    ],
)
def test_another_order_of_axes_equals_single_device(name, order, mesh):
    strategy = pinned(name, microbatches=2, remat="full", **mesh)
    strategy = strategy.model_copy(update={"order": order})
    found = run_and_compare("llama3-tiny", True, strategy)
    assert tuple(found["mesh"]) == order
    assert max(found["worst"].values()) <= TOLERANCE, found


@pytest.mark.one_jax
@pytest.mark.parametrize(
    ("model", "scan", "name", "cuts", "remat", "mesh"),
    [
        ("llama3-tiny", True, "fsdp", 2, "full=1,none=3", {"data": 2, "fsdp": 4}),
        ("gpt2-tiny", False, "megatron-tp", 1, "dots=2,full=2", {"tensor": 8}),
    ],
)
def test_a_mix_of_policies_equals_single_device(model, scan, name, cuts, remat, mesh):
    strategy = pinned(name, microbatches=cuts, remat=remat, **mesh)
    found = run_and_compare(model, scan, strategy)
    assert (found["microbatches"], found["remat"]) == (cuts, remat)
    assert found["round_trip"]
    assert max(found["worst"].values()) <= TOLERANCE, found


@pytest.mark.one_jax
def test_what_auto_chooses_equals_single_device():
    found = run_and_compare("llama3-tiny", True, load_strategy("auto"))
    assert max(found["worst"].values()) <= TOLERANCE, found


def test_every_strategy_is_covered():
    assert {case[2] for case in CASES} | {"auto"} == set(strategy_names())
