"""Tables of published runs made up for a test."""

from __future__ import annotations

import csv

# Llama-3-8B on a DGX H100 with every column that a full configuration needs.
RUN = {
    "source": "a paper",
    "source_date": "2024-05-01",
    "task": "pretrain",
    "model": "Llama-3-8B",
    "params_b": "8.03",
    "n_layers": "32",
    "d_model": "4096",
    "n_heads": "32",
    "n_kv_heads": "8",
    "head_dim": "128",
    "d_ff": "14336",
    "vocab": "128256",
    "n_experts": "",
    "top_k": "",
    "framework": "NeMo/Megatron-Core",
    "chip": "H100-SXM5-80GB",
    "n_chips": "64",
    "interconnect": "",
    "seq_len": "8192",
    "global_batch_seqs": "128",
    "micro_batch": "1",
    "grad_accum": "",
    "precision": "bf16",
    "dp": "32",
    "fsdp": "",
    "zero_stage": "1",
    "tp": "2",
    "sp": "1",
    "cp": "1",
    "pp": "1",
    "vpp": "1",
    "ep": "1",
    "schedule": "",
    "recompute": "none",
    "offload": "none",
    "step_time_s": "2.5",
    "tokens_per_s_per_device": "",
    "tflops_per_device": "",
    "flops_convention": "",
    "peak_mem_gib": "",
    "notes": "",
}


def published(**changes):
    """A row of a run, with some columns changed."""
    assert set(changes) <= set(RUN), set(changes) - set(RUN)
    return {**RUN, **{name: str(value) for name, value in changes.items()}}


def write(folder, *rows, name="runs"):
    """Writes a table of rows to a folder, and returns the folder."""
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(RUN))
        writer.writeheader()
        writer.writerows(rows)
    return folder
