"""Other people's programs: planned, run on 8 devices, compared with one device.

Each runs in a process of its own, as its package may change global settings when it is
imported. `make clients` installs them; elsewhere these tests are skipped.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = str(BENCHMARKS / "third_party.py")
sys.path.append(str(BENCHMARKS))

import third_party  # noqa: E402
from clients import clients  # noqa: E402

# Together: dropout, tied embeddings, encoder and decoder, convolution, pooling, batch
# statistics, mesh axes in annotations, experts, plain functions and train steps.
QUICK = (
    "haiku-resnet50",
    "hf-gpt2",
    "hf-resnet",
    "hf-t5",
    "nano-moe",
    "tunix-llama3",
)
OTHERS = tuple(name for name in clients() if name not in QUICK)


def found(name: str, *words: str) -> dict:
    why = clients()[name].missing()
    if why:
        # Some packages do not install beside every Python or JAX; the reason is shown.
        pytest.skip(why)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, "--child", name, *words],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(BENCHMARKS)]),
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def check_small(name: str, *strategies: str) -> None:
    by_strategy = found(name, "--stage", "small", "--strategies", *strategies)["small"]
    assert set(by_strategy) == set(strategies)
    for strategy, facts in by_strategy.items():
        assert "error" not in facts, (strategy, facts)
        assert set(facts["worst"]) == {"metrics", "gradients", "optimizer", "state"}
        assert facts["passed"], (strategy, facts["worst"], facts["where"])
        assert max(facts["worst"].values()) <= 1e-5
        # One gradient per parameter, and more than the step count beside them.
        assert facts["leaves"]["gradients"] <= facts["leaves"]["state"]
        assert math.prod(facts["mesh"].values()) == 8
        assert facts["collectives"] > 0


@pytest.mark.parametrize("name", QUICK)
def test_small_equals_one_device(name):
    check_small(name, "fsdp-tp")


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_client_equals_one_device(name):
    check_small(name, "fsdp-tp")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "fsdp", "megatron-tp"])
@pytest.mark.parametrize("name", QUICK)
def test_small_under_other_strategies(name, strategy):
    check_small(name, strategy)


def test_published_size_is_propagated():
    whole = found("nano-moe", "--stage", "full")["full"]
    assert "error" not in whole, whole
    assert whole["ops"] > 4000
    # 256 tokens and 128 positions of width 128; per layer: two norms, a router, q k v
    # and output, four experts of two products; a norm, and the head.
    width, hidden, vocab = 128, 512, 256
    expert = 2 * width * hidden + hidden + width
    attention = 4 * (width * width + width)
    layer = 4 * width + 4 * width + attention + 4 * expert
    outside = (vocab + 128) * width + 2 * width + width * vocab + vocab
    assert whole["params"] == outside + 4 * layer
    for strategy, facts in whole["strategies"].items():
        assert "error" not in facts, (strategy, facts)
        assert math.prod(facts["mesh"].values()) == 64
        assert facts["fits"]


def test_unknown_client_is_named():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--only", "hf-gpt3"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert "unknown clients ['hf-gpt3']" in done.stderr
    assert "hf-gpt2" in done.stderr


# --- the comparison itself ------------------------------------------------------------


def merged(leaves, noise=()):
    kinds: dict = {}
    third_party._merge(kinds, leaves, noise)
    return kinds


def test_difference_is_relative_to_its_leaf():
    one = np.array([3.0, 4.0])
    kinds = merged(
        {
            "0/params/a": (one, one + np.array([0.0, 5e-4])),
            "0/params/large": (1e6 * one, 1e6 * one),
            "0/opt_state/gradients/a": (one, one),
            "0/opt_state/inner/0/mu/a": (one, one),
            "1/metrics/loss": (np.float32(2.0), np.float32(2.0)),
        }
    )
    assert kinds["state"]["worst"] == pytest.approx(1e-4)
    assert kinds["state"]["where"] == "0/params/a"
    assert kinds["gradients"] == {"worst": 0.0, "where": "", "leaves": 1}
    assert set(kinds) == {"state", "gradients", "optimizer", "metrics"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_never_passes(bad):
    kinds = merged({"0/params/a": (np.ones(2), np.array([1.0, bad]))})
    assert kinds["state"]["worst"] > third_party.BAR
    assert kinds["state"]["where"] == "0/params/a"


def test_rounding_noise_is_held_against_all_leaves_of_its_kind():
    large, noise = np.array([30.0, 40.0]), np.array([1e-9])
    leaves = {
        "0/params/key/kernel": (large, large),
        "0/params/key/bias": (noise, noise + 5e-4),
    }
    assert merged(leaves)["state"]["worst"] > 1e5
    named = merged(leaves, (r"key/bias$",))
    assert named["state"]["worst"] == pytest.approx(1e-5)
