"""Rows become runs, or are left out, each with its reason."""

from __future__ import annotations

import csv
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers.published import RUN, published, write
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.cost.run import Recompute, Runs
from autoshard.cost.step import predict
from autoshard.ir.errors import InputError
from autoshard.validation.rows import COLUMNS, read

PUBLISHED = Path(__file__).parents[2] / "benchmarks/published"


def used(folder, **changes):
    """The row of a run with some columns changed, which must be used."""
    rows, out = read(write(folder, published(**changes)))
    assert not out
    assert len(rows) == 1
    return rows[0]


def reason(folder, **changes):
    """Why such a row is left out; a good one beside it must be used."""
    rows, out = read(write(folder, published(), published(**changes), published()))
    assert [row.line for row in rows] == [2, 4]
    assert [(o.source, o.line) for o in out] == [("runs", 3)]
    return out[0].reason


# --- directories and tables ---


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a directory"):
        read(tmp_path / "nowhere")


def test_a_file_in_place_of_a_directory(tmp_path):
    write(tmp_path)
    with pytest.raises(InputError, match=r"runs\.csv is not a directory"):
        read(tmp_path / "runs.csv")


def test_a_directory_without_tables(tmp_path):
    (tmp_path / "README.md").write_text("none here")
    with pytest.raises(InputError, match="no table of published runs") as caught:
        read(tmp_path)
    assert all(name in str(caught.value) for name in COLUMNS)


def test_tables_with_other_columns_are_passed_over(tmp_path):
    (tmp_path / "bandwidth.csv").write_text("chip,busbw_GBps\nH100,480\n")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match="no table of published runs"):
        read(tmp_path)
    rows, out = read(write(tmp_path, published()))
    assert len(rows) == 1
    assert out == []


def test_a_table_without_rows(tmp_path):
    assert read(write(tmp_path)) == ([], [])


def test_a_table_that_cannot_be_read(tmp_path):
    (tmp_path / "runs.csv").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path)


def test_each_table_is_a_source(tmp_path):
    write(tmp_path, published(), name="b")
    write(tmp_path, published(), published(chip="abacus"), name="a")
    rows, out = read(tmp_path)
    assert [(row.source, row.line) for row in rows] == [("a", 2), ("b", 2)]
    assert [(o.source, o.line) for o in out] == [("a", 3)]


def test_short_lines_long_lines_and_bytes_that_are_no_text(tmp_path):
    write(tmp_path, published())
    with (tmp_path / "runs.csv").open("ab") as file:
        file.write(b"\n")
        file.write(b"a paper,2024\n")
        file.write(b"\xff\xfe," * 60 + b"\n")
    rows, out = read(tmp_path)
    assert len(rows) == 1
    assert len(out) == 2
    assert out[0].reason.startswith("not given: n_layers, d_model")


# --- what a row says ---


def test_a_row_as_it_is_written(tmp_path):
    row = used(tmp_path)
    layout, run = row.run.layout, row.run
    assert (row.source, row.line, row.model) == ("runs", 2, "Llama-3-8B")
    assert run.decoder.params == pytest.approx(8.03e9, rel=1e-3)
    assert (run.decoder.gated, run.decoder.tied) == (True, False)
    assert (layout.data, layout.tensor, layout.sequence) == (32, 2, True)
    assert (layout.zero, layout.shard) == (1, 32)
    # 128 sequences over 32 replicas, one at a time.
    assert (layout.microbatch, layout.microbatches) == (1, 4)
    assert run.tokens == 128 * 8192
    assert (run.software.name, run.dtype, row.chip) == ("megatron-core", "bf16", "h100")
    assert row.measured_s == 2.5
    assert (row.clean, row.doubt, row.out_of_memory) == (True, "", False)


@pytest.mark.parametrize(
    ("model", "sizes", "billions", "gated", "tied"),
    [
        ("GPT-3", (96, 12288, 96, 96, 128, 49152, 50257), 174.6, False, True),
        ("Llama-3.2-1B", (16, 2048, 32, 8, 64, 8192, 128256), 1.24, True, True),
        ("Llama-3-70B", (80, 8192, 64, 8, 128, 28672, 128256), 70.6, True, False),
    ],
)
def test_printed_parameters_tell_gates_and_tied_embeddings(
    tmp_path, model, sizes, billions, gated, tied
):
    names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff")
    columns = dict(zip((*names, "vocab"), sizes, strict=True))
    row = used(tmp_path, model=model, params_b=billions, **columns)
    assert (row.run.decoder.gated, row.run.decoder.tied) == (gated, tied)


def test_deepseek_is_known_where_columns_do_not_say(tmp_path):
    row = used(
        tmp_path, model="DeepSeek-V3", params_b=671, n_layers=61, d_model=7168,
        n_heads=128, n_kv_heads=128, d_ff=2048, vocab=129280, n_experts=256, top_k=8,
        ep=8,
    )  # fmt: skip
    decoder = row.run.decoder
    assert decoder.dense_layers == 3
    assert decoder.params == pytest.approx(671e9, rel=0.005)


def test_sizes_that_are_not_printed(tmp_path):
    """Heads of an equal share of the width, and as many keys as queries."""
    row = used(tmp_path, n_kv_heads="", head_dim="", params_b="")
    assert row.run.decoder.head_dim == 4096 // 32
    assert row.run.decoder.kv_heads == 32


def test_a_batch_that_accumulation_does_not_make(tmp_path):
    """The batch decides: 256 over 32 replicas in 2 steps are 4 at a time."""
    layout = used(tmp_path, global_batch_seqs=256, grad_accum=2).run.layout
    assert (layout.microbatch, layout.microbatches) == (4, 2)
    layout = used(tmp_path, global_batch_seqs=16).run.layout
    assert layout.microbatch * layout.microbatches * 32 == 16


@pytest.mark.parametrize(
    ("columns", "zero", "shard"),
    [
        ({"zero_stage": ""}, 0, 1),
        ({"zero_stage": "0"}, 0, 1),
        ({"zero_stage": "2"}, 2, 32),
        ({"zero_stage": "1 over 8 ranks (hierarchical)"}, 1, 8),
        ({"zero_stage": "1 over 99 ranks"}, 1, 32),
        ({"zero_stage": "3 (FSDP)"}, 3, 32),
        ({"zero_stage": "3", "fsdp": "8"}, 3, 8),
        ({"zero_stage": "", "fsdp": "16"}, 3, 16),
        ({"zero_stage": "", "fsdp": "full"}, 3, 32),
        ({"zero_stage": "", "fsdp": "false"}, 0, 1),
        ({"zero_stage": "", "fsdp": "1"}, 0, 1),
    ],
)
def test_how_state_is_sharded(tmp_path, columns, zero, shard):
    layout = used(tmp_path, **columns).run.layout
    assert (layout.zero, layout.shard) == (zero, shard)


@pytest.mark.parametrize(
    ("words", "schedule"),
    [
        ("", "1f1b"),
        ("none", "1f1b"),
        ("1F1B", "1f1b"),
        ("1F1B (DeepSpeed pipeline)", "1f1b"),
        ("1F1B-I", "interleaved"),
        ("interleaved 1F1B", "interleaved"),
        ("ZB-H1", "zb-h1"),
        ("ZB-H2", "zb-2p"),
        ("ZB-1p", "zb-1p"),
        ("ZB-2p (all-reduce synchronization)", "zb-2p"),
    ],
)
def test_schedules(tmp_path, words, schedule):
    assert used(tmp_path, schedule=words).run.layout.schedule == schedule


@pytest.mark.parametrize(
    ("chip", "name"),
    [
        ("H100-SXM5-80GB", "h100"),
        ("H100-96GB-HBM2e (2.4TB/s, 500W)", "h100-96g"),
        ("A100-SXM4-80GB", "a100-80g"),
        ("A100-40GB", "a100-40g"),
        ("GB200 NVL72", "gb200"),
        ("B200", "b200"),
        ("H200", "h200"),
    ],
)
def test_chips(tmp_path, chip, name):
    assert used(tmp_path, chip=chip).chip == name


def test_chips_of_a_torus_and_slices(tmp_path):
    row = used(
        tmp_path, chip="TPU v5p", framework="MaxText", notes="2 slices of 32 chips"
    )
    assert row.run.slices == 2
    assert math.prod(row.run.cluster.shape) == 32
    assert row.run.layout.chips == 64


@pytest.mark.parametrize(
    ("text", "chip", "dtype"),
    [
        ("", "H100", "bf16"),
        ("bf16 (fp32 gradient accumulation)", "H100", "bf16"),
        ("bfloat16", "H100", "bf16"),
        ("fp16 mixed", "H100", "f16"),
        ("bf16", "V100-SXM2-32GB", "f16"),
        ("fp32", "H100", "f32"),
        ("mxfp8", "H100", "f8"),
        ("fp8 (float8 linear)", "H100", "f8"),
    ],
)
def test_precisions(tmp_path, text, chip, dtype):
    row = used(tmp_path, precision=text, chip=chip)
    assert row.run.dtype == dtype
    assert row.clean == (dtype in ("bf16", "f16"))


@pytest.mark.parametrize(
    ("words", "bits"),
    [
        ("8x HDR 200Gb/s IB per node", 8 * 200e9 / 8),
        ("RDMA 400 Gb/s per GPU (Grand Teton)", 400e9),
        ("800 Gbps inter-node", 800e9 / 8),
        ("4x ~100Gb/s", 4 * 100e9 / 8),
    ],
)
def test_a_network_that_the_row_states(tmp_path, words, bits):
    row = used(tmp_path, interconnect=words)
    assert row.run.cluster.links[-1].bytes_per_s.value == pytest.approx(bits / 8)


@pytest.mark.parametrize("words", ["", "InfiniBand", "0 Gb/s per GPU", "0x 0 Gb"])
def test_a_network_that_the_row_does_not_state(tmp_path, words):
    # NVIDIA DGX H100 datasheet: a card of 400 Gb/s for each chip.
    link = used(tmp_path, interconnect=words).run.cluster.links[-1]
    assert link.bytes_per_s.value == 50e9


# --- what was measured ---


def test_a_time_as_printed_before_all_others(tmp_path):
    row = used(tmp_path, tokens_per_s_per_device=1, tflops_per_device=1)
    assert row.measured_s == 2.5


def test_a_time_from_tokens_a_second(tmp_path):
    row = used(tmp_path, step_time_s="", tokens_per_s_per_device=5000)
    assert row.measured_s == pytest.approx(128 * 8192 / (5000 * 64))


def test_a_time_from_flops_a_second(tmp_path):
    """Six FLOPs a parameter met, and the whole square of attention."""
    row = used(tmp_path, step_time_s="", tflops_per_device=400)
    met = 32 * (4096 * 128 * 2 * (32 + 8) + 3 * 4096 * 14336) + 128256 * 4096
    attention = 3 * 2 * 2 * 32 * 4096 * 8192
    flops = (6 * met + attention) * 128 * 8192
    assert row.measured_s == pytest.approx(flops / (400e12 * 64))


def test_a_time_from_flops_that_count_recomputation(tmp_path):
    """Narayanan et al. 2021, table 1: GPT-18B of 40 layers of 6144, at 135 TFLOP/s."""
    row = used(
        tmp_path, model="GPT-18B", params_b=18.4, n_layers=40, d_model=6144, n_heads=48,
        n_kv_heads=48, d_ff=24576, vocab=51200, chip="A100-80GB-SXM", n_chips=256, tp=8,
        dp=32, seq_len=2048, global_batch_seqs=1024, micro_batch=8, step_time_s="",
        tflops_per_device=135, flops_convention="96BslH^2 INCLUDES full recompute",
        framework="Megatron-LM", source_date="2021-04", precision="fp16 mixed",
    )  # fmt: skip
    # Products of a layer four times: forward, again, and twice backward.
    layer = 24 * 6144**2 + 4 * 2048 * 6144
    flops = 1024 * 2048 * (4 * 40 * layer + 6 * 51200 * 6144)
    assert row.measured_s == pytest.approx(flops / (135e12 * 256))
    # What the paper's formula makes of it, as the collection prints it.
    assert row.measured_s == pytest.approx(9.399, rel=1e-3)


def test_memory_alone(tmp_path):
    row = used(tmp_path, step_time_s="", peak_mem_gib=67)
    assert row.measured_s is None
    assert row.memory_bytes == 67 * 1024**3


def test_out_of_memory(tmp_path):
    row = used(tmp_path, step_time_s="", notes="OOM")
    assert row.out_of_memory
    assert row.measured_s is row.memory_bytes is None
    assert row.doubt == "ran out of memory"


@pytest.mark.parametrize("words", ["crash or OOM", "crashed or OOM (the chart)"])
def test_failed_but_perhaps_not_for_memory(tmp_path, words):
    why = reason(tmp_path, step_time_s="", notes=words)
    assert why == "failed, and whether for want of memory is not said"


@pytest.mark.parametrize(
    ("columns", "doubt"),
    [
        ({"notes": "quality=ok"}, ""),
        ({"notes": "quality=slow_outlier; CHECK"}, "marked slow_outlier"),
        (
            {"notes": "quality=ok", "pp": 2, "dp": 16},
            "tensor parallelism in a pipeline, bound by launches",
        ),
        ({"notes": "its authors speak of +-40% noise"}, "its source warns of noise"),
        ({"precision": "fp8"}, "eight bits"),
    ],
)
def test_rows_that_say_little_of_the_model(tmp_path, columns, doubt):
    row = used(tmp_path, **columns)
    assert row.doubt == doubt
    assert row.clean == (not doubt)


# --- groups ---


def test_plans_for_one_model_and_batch_on_one_cluster(tmp_path):
    plans = [
        published(),
        published(tp=1, dp=64, zero_stage=3, recompute="full"),
        published(tp=4, pp=2, dp=8, micro_batch=2),
    ]
    others = [
        published(n_chips=128, dp=64),
        published(seq_len=4096),
        published(global_batch_seqs=256),
        published(chip="H200"),
        published(model="Llama-3.1-8B"),
    ]
    rows, _ = read(write(tmp_path, *plans, *others))
    assert len({row.group for row in rows[: len(plans)]}) == 1
    assert len({row.group for row in rows}) == 1 + len(others)
    write(tmp_path, *plans, name="elsewhere")
    rows, _ = read(tmp_path)
    assert len({row.group for row in rows}) == 2 + len(others)


# --- wrong input ---

NUMBERS = (
    *("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab"),
    *("n_chips", "seq_len", "global_batch_seqs", "micro_batch", "grad_accum"),
    *("tp", "cp", "pp", "vpp", "ep", "params_b", "step_time_s", "peak_mem_gib"),
)
NEEDED = (
    *("n_layers", "d_model", "n_heads", "d_ff", "seq_len", "global_batch_seqs"),
    *("n_chips", "micro_batch", "dp"),
)


@pytest.mark.parametrize("name", NEEDED)
def test_half_filled(tmp_path, name):
    assert reason(tmp_path, **{name: ""}) == f"not given: {name}"


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["many", "12 or so", "3,5", "0x20"])
def test_text_in_a_column_of_numbers(tmp_path, name, text):
    assert reason(tmp_path, **{name: text}) == f"{name} is {text!r}, not a number"


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["-1", "nan", "inf", "-inf", "-0.5"])
def test_numbers_that_are_not_positive(tmp_path, name, text):
    assert (
        reason(tmp_path, **{name: text}) == f"{name} is {text!r}; it must be positive"
    )


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["1e300", "1e-300"])
def test_numbers_that_no_run_has(tmp_path, name, text):
    assert reason(tmp_path, **{name: text}) == f"{name} is {text!r}, which no run has"


@pytest.mark.parametrize("name", NUMBERS[:9])
def test_counts_are_whole(tmp_path, name):
    assert reason(tmp_path, **{name: "1.5"}) == f"{name} is 1.5, not whole"


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"n_chips": 65}, "65 chips are no multiple of tp 2 x pp 1 x cp 1"),
        ({"n_chips": 0}, "0 chips are no multiple of tp 2 x pp 1 x cp 1"),
        ({"pp": 3, "cp": 5}, "64 chips are no multiple of tp 2 x pp 3 x cp 5"),
        ({"seq_len": 0}, "seq_len must be positive"),
        ({"n_layers": 0}, "n_layers, d_model and n_heads must be positive"),
        ({"d_ff": 0}, "a decoder has mlp = 0; it must be positive"),
        ({"micro_batch": 0}, "global_batch_seqs and micro_batch must be positive"),
        ({"vocab": "", "framework": "NeMo"}, "not given: vocab"),
        ({"chip": "abacus"}, "chip 'abacus' is not in the catalogue"),
        ({"chip": ""}, "chip '' is not in the catalogue"),
        ({"framework": "by hand"}, "software 'by hand' is not known"),
        ({"framework": ""}, "software '' is not known"),
        ({"precision": "ternary"}, "precision 'ternary' is not known"),
        ({"precision": "nvfp4"}, "four bits"),
        ({"precision": "fp8", "chip": "A100-80GB"}, "a100-80g has no peak for f8"),
        ({"recompute": "a bit"}, "recomputation 'a bit' is not known"),
        ({"zero_stage": "4"}, "zero_stage '4' is not known"),
        ({"zero_stage": "some"}, "zero_stage 'some' is not known"),
        ({"zero_stage": "²"}, "zero_stage '²' is not known"),
        ({"fsdp": "often"}, "fsdp is 'often', not a number"),
        (
            {"params_b": 70},
            "the sizes given make 8.03 billion parameters, not 70",
        ),
        (
            {"n_experts": 8, "top_k": 9, "params_b": ""},
            "a decoder of 8 experts has top_k = 9; it must be from 1 to the number of "
            "experts",
        ),
        (
            {"offload": "optimizer states"},
            "optimizer or parameters are kept in the host's memory",
        ),
        ({"step_time_s": ""}, "neither time nor memory is given"),
        ({"step_time_s": "0"}, "neither time nor memory is given"),
        (
            {"notes": "plan not recorded"},
            "the plan was found by a search and is not recorded",
        ),
        (
            {"chip": "TPU v5p", "framework": "MaxText", "notes": "3 slices"},
            "64 chips are not in 3 equal slices",
        ),
    ],
)
def test_rows_that_are_left_out(tmp_path, columns, why):
    assert reason(tmp_path, **columns) == why


def test_a_torus_that_does_not_exist(tmp_path):
    why = reason(tmp_path, chip="TPU v5e", framework="MaxText", n_chips=6, tp=1, dp=6)
    assert "v5e" in why


@pytest.mark.parametrize(
    ("columns", "whole"),
    [
        ({"framework": "by hand"}, True),
        ({"framework": "by hand", "step_time_s": ""}, False),
        (
            {"framework": "?", "step_time_s": "", "tokens_per_s_per_device": "9"},
            True,
        ),
        ({"framework": "?", "step_time_s": "", "tflops_per_device": "9"}, True),
        ({"n_layers": ""}, False),
        ({"step_time_s": "fast"}, False),
    ],
)
def test_whether_all_was_given_of_a_row_left_out(tmp_path, columns, whole):
    _, out = read(write(tmp_path, published(**columns)))
    assert [o.whole for o in out] == [whole]


words = st.one_of(
    st.sampled_from(sorted({value for value in RUN.values() if value})),
    st.sampled_from(
        [
            *("0", "-1", "1e400", "nan", "1e17", "1e-17", "3", "7", "²", "٣", "1_0"),
            *("custom: context offload", "zb", "0 slices", "5 slices", "moe h"),
            *("capacity_factor 1.2.3", "capacity_factor 0.0", "quality=", "OOM"),
            *("0 Gb/s per GPU", "0 x 0 Gb", "1 over 0 ranks", "full", "fp8", "fp32"),
            *("TPU v5p", "V100", "Omni-Path", "lora", "deepseek-v3", "alpa"),
        ]
    ),
    st.integers(0, 200).map(str),
    st.floats().map(str),
    st.text("ab1.-,;x²é\"'\n ", max_size=8),
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(RUN)), words, max_size=6))
def test_any_row_is_predicted_or_left_out(changes):
    with tempfile.TemporaryDirectory() as folder:
        rows, out = read(write(Path(folder), published(), published(**changes)))
    assert len(rows) + len(out) == 2
    assert rows[0].line == 2
    assert all(o.reason for o in out)
    with np.errstate(all="ignore"):
        took = predict(Runs.of([row.run for row in rows])).step_s
    assert np.isfinite(took).all()
    assert (took > 0).all()


# --- the collection ---


def test_each_row_of_the_collection_is_used_or_left_out():
    rows, out = read(PUBLISHED)
    lines = {}
    for path in PUBLISHED.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            table = list(csv.reader(file))
        if set(COLUMNS) <= set(table[0]):
            lines |= {(path.stem, n): table[n - 1] for n in range(2, len(table) + 1)}
    found = [(r.source, r.line) for r in (*rows, *out)]
    assert sorted(found) == sorted(lines)


def test_printed_times_and_batches_of_the_collection_are_kept():
    """Of each row that is used, against its own line."""
    rows, _ = read(PUBLISHED)
    tables = {}
    for row in rows:
        if row.source not in tables:
            path = PUBLISHED / f"{row.source}.csv"
            with path.open(newline="", encoding="utf-8") as file:
                tables[row.source] = list(csv.DictReader(file))
        line = tables[row.source][row.line - 2]
        batch = float(line["global_batch_seqs"]) * int(line["seq_len"])
        assert row.run.tokens == pytest.approx(batch, rel=0.02)
        assert row.run.layout.chips == int(line["n_chips"])
        if line["step_time_s"] and not row.out_of_memory:
            assert row.measured_s == float(line["step_time_s"])
            rate = float(line["tokens_per_s_per_device"] or "nan")
            if not np.isnan(rate) and "CHECK" not in line["notes"]:
                again = batch / (rate * int(line["n_chips"]))
                assert again == pytest.approx(row.measured_s, rel=0.05)


def test_nothing_is_recomputed_where_nothing_is_said(tmp_path):
    assert used(tmp_path, recompute="").run.layout.recompute == Recompute()


def test_a_vocabulary_that_no_row_prints_is_said_to_be_assumed():
    rows, _ = read(PUBLISHED)
    told = {(row.source, row.assumed) for row in rows if row.assumed}
    assert {source for source, _ in told} == {"zero_bubble"}
    assert all("50304" in what for _, what in told)
    own = [row for row in rows if row.source == "zero_bubble"]
    assert {row.run.decoder.vocab for row in own} == {50304}
    assert all(row.assumed for row in own)
