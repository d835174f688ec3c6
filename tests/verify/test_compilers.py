"""Plans of the zoo against the TPU and GPU compilers, where these are installed."""

from __future__ import annotations

import importlib.util

import jax
import pytest

from autoshard import api
from autoshard.ir.errors import InputError
from autoshard.plan.cluster import cluster
from autoshard.plan.schema import ModelRef
from autoshard.verify.targets import Target


def has(package):
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


TPU = [pytest.mark.tpu, pytest.mark.skipif(not has("libtpu"), reason="no libtpu")]
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has("jax_plugins.xla_cuda13"), reason="no CUDA plugin"),
]


def verified(spec, strategy, *, model="llama3-tiny", batch=16, seq=64, **mesh):
    ref = ModelRef(
        model=model,
        batch=batch,
        seq=seq,
        optimizer="adamw",
        learning_rate=1e-3,
        dtype="bf16",
    )
    resolved = api.resolve(ref)
    policy = api.load_strategy(strategy)
    policy = policy.model_copy(update={"mesh": {**policy.mesh, **mesh}})
    plan = api.search(
        resolved.step,
        resolved.batch,
        cluster=spec,
        strategy=policy,
        model_ref=ref,
        executable=True,
    )
    return api.verify_plan(resolved.step, plan)


CASES = [("dp", {"data": 8}), ("fsdp-tp", {"data": 2, "fsdp": 2, "tensor": 2})]


@pytest.mark.parametrize(
    "spec",
    [pytest.param("v5e:2x4", marks=TPU), pytest.param("h100:8", marks=GPU)],
)
@pytest.mark.parametrize(("strategy", "mesh"), CASES)
def test_every_difference_has_a_cause(spec, strategy, mesh):
    found = verified(spec, strategy, **mesh)
    assert found.unexplained == 0
    # For GPUs XLA gathers in float32 and converts afterwards, twice the planned bytes.
    least = 0.9 if spec.startswith("v5e") else 0.4
    assert found.comparison.fraction > least
    assert found.time.compute_s > 0
    assert found.compiled.peak_bytes > 0
    assert found.fits


@pytest.mark.tpu
@pytest.mark.skipif(not has("libtpu"), reason="no libtpu")
def test_a_tpu_refuses_what_does_not_fit():
    chips = cluster("v5e:2x4")
    [device, *_] = Target("tpu", chips.name, chips, 8).devices()
    where = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**16, 2**17), "float32", sharding=where)
    from autoshard.verify.aot import compile_for

    lowered = jax.jit(lambda x: x + 1).lower(x)
    found = compile_for(lowered, Target("tpu", chips.name, chips, 1))
    assert found.refused.needed_bytes > found.refused.available_bytes


@pytest.mark.tpu
@pytest.mark.skipif(not has("libtpu"), reason="no libtpu")
def test_a_topology_that_libtpu_does_not_have():
    chips = cluster("v5e:2x4").model_copy(update={"shape": (3, 5)})
    with pytest.raises(InputError, match="has no topology v5e:3x5"):
        Target("tpu", chips.name, chips, 15).devices()
