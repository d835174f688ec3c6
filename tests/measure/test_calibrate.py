"""Calibration as a whole, on virtual devices and with tiny sizes."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from typer.testing import CliRunner

import autoshard as ash
from autoshard.cli.app import app
from autoshard.ir.errors import InputError, NameUnknownError, OutputError
from autoshard.measure import QUICK, calibrate, describe, programs
from autoshard.plan.chip import load_type, to_toml
from autoshard.plan.cluster import Cluster

NOW = [0.0]
"""Of a clock that goes on by 1 ms a program and 0.1 ms a run, whatever they do."""

TINY = dataclasses.replace(
    QUICK,
    clock=lambda: NOW[0],
    min_s=1e-6,
    repeats=3,
    matmul_sizes=(16, 32),
    cpu_matmul_sizes=(16, 32),
    stream_bytes=1 << 14,
    cpu_stream_bytes=1 << 14,
    message_bytes=(1 << 10, 1 << 14),
    cpu_message_bytes=(1 << 10, 1 << 14),
)
DEVICES = jax.devices("cpu")


@pytest.fixture(scope="module", autouse=True)
def clock():
    looped = programs._looped

    def timed(*args):
        run = looped(*args)

        def counted(runs):
            run(runs)
            NOW[0] += 1e-3 + runs * 1e-4

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_looped", timed)
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("here") / "my-cluster.toml"
    lines = []
    found = ash.api.calibrate(path, effort=TINY, devices=DEVICES[:4], log=lines.append)
    return path, found, lines


def test_the_file_is_read_back_as_what_was_returned(measured):
    path, found, _ = measured
    assert ash.cluster(f"{path}:4") == found == ash.cluster(str(path))
    assert found.name == "my-cluster:4"


def test_a_search_is_done_on_it(measured):
    path, _, _ = measured
    step = ash.train_step(
        lambda w, x: ((x @ w) ** 2).mean(),
        optax.sgd(0.1),
        model=lambda key: jax.random.normal(key, (64, 32)),
    )
    batch = jax.ShapeDtypeStruct((16, 64), jnp.float32)
    plan = ash.search(step, batch, cluster=f"{path}:4", strategy="dp")
    assert plan.sizes["data"] == 4
    assert plan.predicted.step_s > 0


def test_every_figure_says_how_it_was_got(measured):
    _, found, _ = measured
    by = (
        r"measured by autoshard calibrate on 4 x cpu, \d{4}-\d\d-\d\d, jax "
        + re.escape(jax.__version__)
    )
    chip = found.chip
    [link] = chip.links
    for figure in (
        *chip.peak_flops_per_s.values(),
        chip.hbm_bytes_per_s,
        chip.matmul_efficiency,
        link.bytes_per_s,
        link.latency_s,
        link.launch_s,
    ):
        assert re.match(by, figure.source)
    assert "sysconf" in chip.hbm_bytes.source
    assert chip.chips_per_node.value == 4
    assert set(chip.peak_flops_per_s) == {"f64", "f32", "bf16", "f16", "f8", "i8"}


def test_rates_are_what_the_clock_says(measured):
    """A run takes 0.1 ms: a product of side 32, three passes over 16 KiB."""
    chip = measured[1].chip
    assert chip.peak_flops_per_s["f32"].value == pytest.approx(2 * 32**3 / 1e-4, 1e-3)
    assert chip.hbm_bytes_per_s.value == pytest.approx(3 * 2**14 / 1e-4, 1e-3)
    assert chip.hbm_efficiency.value == pytest.approx((2 / 3) ** 0.5, 1e-3)
    # The smaller product has an eighth of the FLOPs in the same time.
    assert chip.matmul_efficiency.value == pytest.approx((1 / 8) ** 0.5, 1e-3)


def test_progress_names_what_was_measured(measured):
    lines = "\n".join(measured[2])
    for word in ("f32 products", "triad", "all_reduce over 2", "permute over 4"):
        assert word in lines


def test_measured_shares_replace_those_of_the_cost_model(measured):
    _, found, _ = measured
    step = ash.train_step(
        lambda w, x: ((x @ w) ** 2).mean(),
        optax.sgd(0.1),
        model=lambda key: jax.random.normal(key, (512, 512)),
    )
    batch = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
    times = []
    for share in (0.5, 1.0):
        figure = found.chip.hbm_bytes.model_copy(update={"value": share})
        chip = found.chip.model_copy(
            update={"matmul_efficiency": figure, "hbm_efficiency": figure}
        )
        plan = ash.search(
            step, batch, cluster=Cluster(chip=chip, shape=(1,)), strategy="dp"
        )
        times.append(plan.predicted.step_s)
    assert times[0] == pytest.approx(2 * times[1])


def test_one_device_takes_its_links_over_and_says_so():
    found = calibrate(DEVICES[:1], effort=TINY)
    [link] = found.chip.links
    base = load_type("cpu").links[0]
    assert link.bytes_per_s.value == base.bytes_per_s.value
    assert link.bytes_per_s.source.startswith("not measured, one device only; as cpu:")
    assert link.launch_s is None


def test_a_dtype_that_does_not_run_is_left_out(monkeypatch):
    real = programs.matmul

    def matmul(devices, size, dtype):
        if dtype == "f8":
            # As JAX does on a chip that cannot multiply in a dtype.
            raise NotImplementedError("no such product")
        return real(devices, size, dtype)

    monkeypatch.setattr(programs, "matmul", matmul)
    lines = []
    found = calibrate(DEVICES[:1], effort=TINY, log=lines.append)
    assert "f8" not in found.chip.peak_flops_per_s
    assert "a f8 product of side 16 does not run here and is left out" in " ".join(
        lines
    )


# --- accelerators, whose devices are made up here ---


@dataclasses.dataclass(frozen=True)
class Pretended:
    platform: str
    device_kind: str


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("Tesla V100-SXM2-16GB", "v100-16g"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_the_kind_of_a_device_names_its_chip_type(kind, name):
    platform = "tpu" if "TPU" in kind else "gpu"
    assert describe._base(Pretended(platform, kind), None).name == name


@pytest.mark.parametrize(
    ("device", "base", "error", "words"),
    [
        (Pretended("gpu", "NVIDIA T4"), None, InputError, ["NVIDIA T4", "--base h100"]),
        (Pretended("gpu", "NVIDIA T4"), "v4", InputError, ["v4", "'tpu'", "'gpu'"]),
        (Pretended("gpu", "NVIDIA T4"), "t4", NameUnknownError, ["t4"]),
        (Pretended("tpu", "TPU7x"), None, InputError, ["two devices"]),
    ],
)
def test_no_chip_type_to_take_from(device, base, error, words):
    with pytest.raises(error) as caught:
        calibrate([device], base=base, effort=TINY)
    assert all(word in str(caught.value) for word in words)


def test_what_one_host_does_not_show_is_taken_over(monkeypatch):
    """On devices that pass for H100s; they are CPUs, and their figures are as well."""
    base = load_type("h100")
    monkeypatch.setattr(describe, "_base", lambda device, name: base)
    found = calibrate(DEVICES[:4], effort=TINY)
    assert found.shape == (1, 4)
    node, network = found.chip.links
    assert "fitted to 16 collectives" in node.bytes_per_s.source
    assert network.bytes_per_s.value == base.links[1].bytes_per_s.value
    assert network.efficiency.source.startswith("not measured, one host only; as h100")
    assert found.chip.hbm_bytes.source.startswith("as h100: ")


# --- wrong input, before anything is measured ---


@pytest.fixture
def nothing_measured(monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("measured")

    monkeypatch.setattr(ash.api, "measure", fail)


@pytest.mark.usefixtures("nothing_measured")
def test_a_file_that_exists_is_kept(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("mine")
    with pytest.raises(OutputError, match=r"exists.*--overwrite"):
        ash.calibrate(path)
    assert path.read_text() == "mine"


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize(
    ("name", "words"), [("no/such/mine.toml", "does not exist"), ("mine.txt", ".toml")]
)
def test_a_place_that_cannot_be_written(tmp_path, name, words):
    with pytest.raises(OutputError, match=re.escape(words)):
        ash.calibrate(tmp_path / name)


def test_no_device():
    with pytest.raises(InputError, match="no device"):
        calibrate([], effort=TINY)


def test_jax_finds_no_device(monkeypatch):
    def fail():
        raise RuntimeError("no backend")

    monkeypatch.setattr(jax, "local_devices", fail)
    with pytest.raises(InputError, match="finds no device here: no backend"):
        calibrate(effort=TINY)


def test_a_name_that_clusters_cannot_have():
    with pytest.raises(InputError, match="'my chip'"):
        calibrate(DEVICES[:1], name="my chip", effort=TINY)


def test_an_error_while_measuring_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_args):
        raise InputError("broken off")

    monkeypatch.setattr(programs, "stream", fail)
    path = tmp_path / "mine.toml"
    with pytest.raises(InputError, match="broken off"):
        ash.calibrate(path, devices=DEVICES[:2], effort=TINY)
    assert list(tmp_path.iterdir()) == []


# --- the command ---


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(ash.api, "QUICK", TINY)


def cli(*args):
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="autoshard")


@pytest.mark.usefixtures("tiny")
def test_the_command_writes_what_search_reads(tmp_path):
    path = tmp_path / "own.toml"
    done = cli("calibrate", "--devices", 2, "--quick", "-o", path, "--name", "desk")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert f"--cluster {path}:2" in done.stderr
    assert load_type(str(path)).name == "desk"
    args = ["--batch", 8, "--seq", 32, "--json"]
    found = cli("search", "llama3-tiny", "--cluster", f"{path}:2", *args)
    assert json.loads(found.stdout)["cluster"]["name"] == "desk:2"


@pytest.mark.usefixtures("tiny")
def test_without_a_file_the_command_prints_it(tmp_path):
    done = cli("calibrate", "--devices", 2, "--quick")
    path = tmp_path / "printed.toml"
    path.write_text(done.stdout)
    assert to_toml(load_type(str(path))) == done.stdout
    as_json = json.loads(cli("calibrate", "--devices", 2, "--quick", "--json").stdout)
    assert as_json["default_shape"] == [2]


def test_errors_of_the_command(tmp_path):
    existing = tmp_path / "mine.toml"
    existing.write_text("")
    done = cli("calibrate", "-o", existing)
    assert done.exit_code == 6
    assert done.stderr.startswith("error: cannot write")
    many = cli("calibrate", "--devices", 4096, "--quick")
    assert many.exit_code == 3
    assert "4096 virtual devices" in many.stderr
    assert cli("calibrate", "--devices", 0).exit_code == 2
