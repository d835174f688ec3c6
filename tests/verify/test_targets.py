"""What a plan is compiled for, and what is said where that cannot be."""

from __future__ import annotations

import re

import jax
import pytest
from helpers.plans import plan

from autoshard.ir.errors import InputError, NameUnknownError
from autoshard.plan import chip
from autoshard.plan.cluster import cluster
from autoshard.plan.schema import ClusterRef
from autoshard.verify import targets
from autoshard.verify.targets import Target, require_compiler, target_config, target_of


def plan_for(name):
    where = ClusterRef(name=name, fingerprint="0", num_chips=8)
    return plan().model_copy(update={"cluster": where})


@pytest.mark.parametrize(
    ("name", "asked", "kind"),
    [
        ("v5e:2x4", None, "tpu"),
        ("h100:1x8", None, "gpu"),
        ("cpu:8", None, "host"),
        ("cpu:8", "host", "host"),
        ("v5e:2x4", "host", "host"),
        ("own:8", "host", "host"),
    ],
)
def test_the_plan_says_the_target(name, asked, kind):
    target = target_of(plan_for(name), asked)
    assert (target.kind, target.num_chips) == (kind, 8)


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("v5e:2x4", "gpu", "of kind tpu; use --target tpu or host"),
        ("h100:1x8", "tpu", "of kind gpu; use --target gpu or host"),
        ("cpu:8", "tpu", "use --target host"),
        ("own:8", None, "no compiler knows"),
        ("v5e:3x5", None, "does not come as 3x5"),
        ("v5p:64x64x64", None, "the largest torus is 16x20x28"),
    ],
)
def test_what_cannot_be_a_target(name, asked, words):
    with pytest.raises(InputError, match=re.escape(words)):
        target_of(plan_for(name), asked)


def test_a_target_that_does_not_exist():
    with pytest.raises(NameUnknownError, match="known: tpu, gpu, host"):
        target_of(plan_for("cpu:8"), "npu")


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_missing_compiler_is_named_with_its_extra(kind, monkeypatch):
    monkeypatch.setitem(targets._PLUGINS, kind, ("no_such_package.plugin",))
    with pytest.raises(InputError, match=re.escape(f"'autoshard[{kind}]'")):
        require_compiler(kind)


@pytest.mark.parametrize("name", ["tpu7x:2x2x1", "v100-16g:8"])
def test_a_chip_that_the_compilers_are_not_told_of(name, monkeypatch):
    monkeypatch.setattr(targets, "require_compiler", lambda kind: None)
    chips = cluster(name)
    target = Target(chips.kind, chips.name, chips, chips.num_chips)
    with pytest.raises(InputError, match="cannot be asked about") as refusal:
        target.devices()
    assert "--target host" in str(refusal.value)


def test_every_fact_is_of_a_chip_of_the_catalogue():
    facts = targets._facts()
    for kind, names in facts.items():
        for name in names:
            assert chip.load_type(name).kind == kind


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "a100-40g", "a100-80g"])
def test_the_peak_of_the_description_is_that_of_the_chip(name):
    chips = cluster(f"{name}:8")
    text = target_config(chips)
    cores = int(re.search(r"core_count: (\d+)", text)[1])
    # 16 is the number of bfloat16 among XLA's element types.
    rate = re.search(
        r"key: 16 value \{ clock_rate_ghz: (\S+) units_per_core: (\d+) "
        r"ops_per_clock: (\d+) ",
        text,
    )
    peak = 2 * cores * float(rate[1]) * 1e9 * int(rate[2]) * int(rate[3])
    assert peak == pytest.approx(chips.peak_flops_per_s("bf16"), rel=1e-5)
    assert f"device_memory_size: {chips.hbm_bytes}" in text


def test_the_clock_of_a_tpu_gives_its_peak_in_whole_products():
    for name, shape in (("v4", "2x2x1"), ("v5e", "2x4"), ("v5p", "2x2x1")):
        chips = cluster(f"{name}:{shape}")
        target = Target("tpu", chips.name, chips, chips.num_chips)
        products = chips.peak_flops_per_s("bf16") / (2 * 128 * 128 * target.clock_hz)
        assert products == pytest.approx(round(products), rel=0.01)


def test_a_host_of_more_devices_than_there_are():
    jax.devices()  # from here on their number is fixed
    with pytest.raises(InputError, match="4096 virtual devices"):
        Target("host", "host:4096", None, 4096).devices()
