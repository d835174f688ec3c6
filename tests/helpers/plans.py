"""Plans made by hand: small enough that every number in them can be checked by eye."""

from typing import Any

from autoshard.plan.schema import Plan


def document(**changes: Any) -> dict[str, Any]:
    """A plan of two parameters over data=2, tensor=4, as its JSON document.

    Element counts: w is 8 x 16 float32 (512 B), b is 6 float32 (24 B), tokens are
    4 x 32 int32 (512 B).
    """
    plan = {
        "schema_version": 1,
        "autoshard": "0.0",
        "program": {
            "fingerprint": "p0",
            "jax": "0",
            "model": {
                "model": "toy",
                "batch": 4,
                "seq": 32,
                "optimizer": "adamw",
                "learning_rate": 0.001,
                "dtype": "f32",
                "scan_layers": True,
            },
            "ops": 12,
            "params": 134,
        },
        "cluster": {"name": "cpu:8", "fingerprint": "c0", "num_chips": 8},
        "axes": [{"axis": "data", "size": 2}, {"axis": "tensor", "size": 4}],
        "strategy": {
            "name": "toy-tp",
            "about": "A strategy for tests.",
            "cite": [],
            "mesh": {"data": 2, "tensor": 4},
            "rules": {
                "batch": ["data"],
                "mlp": ["tensor"],
                "seq.residual": ["tensor"],
            },
            "storage": {"params": [], "gradients": [], "optimizer": ["data"]},
            "schedule": {"microbatches": 1, "pipeline": "none", "remat": "none"},
        },
        "tensors": [
            tensor("params/b", [6], "params", ["mlp"], [[]], [[]]),
            tensor(
                "params/w",
                [8, 16],
                "params",
                ["embed", "mlp"],
                [[], ["tensor"]],
                [[], ["tensor"]],
            ),
            tensor(
                "opt_state/0/mu/w",
                [8, 16],
                "optimizer",
                [None, "mlp"],
                [["data"], ["tensor"]],
                [[], ["tensor"]],
            ),
            tensor(
                "tokens",
                [4, 32],
                "data",
                ["batch", "seq"],
                [["data"], []],
                [["data"], []],
                dtype="int32",
            ),
        ],
        "outputs": [[]],
        "constraints": [],
        "notes": ["b [6] is whole & <unsharded>"],
        "predicted": {
            "step_s": 0.010,
            "matmul_s": 0.006,
            "memory_bound_s": 0.001,
            "collective_s": 0.003,
            "model_flops": 2.0e9,
            "mfu": 0.5,
            "tokens_per_s": 12_800.0,
            "memory": {
                "params": 152,
                "gradients": 152,
                "optimizer": 64,
                "activations": 600,
                "other": 56,
                "total": 1024,
                "capacity": 4096,
            },
            "collectives": [
                collective("all_reduce", ["data"], 128, 2, 0.0005, "params/w"),
                collective("all_reduce", ["data"], 24, 1, 0.0005, "params/b"),
                collective("all_gather", ["tensor"], 64, 3, 0.002, "reshape"),
            ],
        },
        "certificate": {
            "lower_bound_s": 0.008,
            "gap": 0.25,
            "enumerated": 10,
            "indivisible": 2,
            "infeasible": 1,
            "complete": True,
        },
    }
    return plan | changes


def tensor(
    path: str,
    shape: list[int],
    state: str,
    logical: list[str | None],
    storage: list[list[str]],
    compute: list[list[str]],
    dtype: str = "float32",
) -> dict[str, Any]:
    """One entry of `tensors`."""
    return {
        "path": path,
        "shape": shape,
        "dtype": dtype,
        "state": state,
        "logical": logical,
        "storage": storage,
        "compute": compute,
    }


def collective(
    kind: str, axes: list[str], bytes_: int, count: int, time_s: float, value: str
) -> dict[str, Any]:
    """One entry of `predicted.collectives`."""
    return {
        "kind": kind,
        "axes": axes,
        "bytes_": bytes_,
        "count": count,
        "time_s": time_s,
        "source": "toy.py:7 (loss)",
        "address": "0/1",
        "value": value,
    }


def plan(**changes: Any) -> Plan:
    """The plan of `document`, with top-level fields replaced."""
    return Plan.model_validate(document(**changes))
