"""Time of propagation in programs that are not scanned, by number of equations.

A train step (forward, backward, AdamW) of a Llama with its layers written out is
traced, which finds the repeated blocks, too; that is not counted (the time of finding
blocks is shown by itself). Then dim classes are found and a layout is propagated:
tensor parallelism, sharded residual stream, batch over data, all state stored in parts.
Median of five, each size in a process of its own; processor time is shown, too, which
a busy machine lengthens less.

Bars: Llama 7B in at most 0.5 s; 1,000 layers in at most 5 s; time grows in proportion
to the equations (exponent of a fit over 8 to 512 layers at most 1.1).

The 7B is the model zoo's decoder in the published shape. The others are a Llama in
plain JAX, narrow, whose layer is a `jax.jit`: it is traced once and called often, as a
person would write it for so many layers. Every equation counts that a call stands for.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _record

BAR_7B_S, BAR_1000_S, BAR_EXPONENT = 0.5, 5.0, 1.1
RUNS = 5
SIZES = (8, 32, 128, 512)
MOST = 1000


def main() -> int:
    """Measures all sizes; 1 when a bar is missed."""
    if "--layers" in sys.argv or "--llama-7b" in sys.argv:
        return child()
    options, start = _record.arguments(__doc__ or ""), _record.begin()
    cases = [measured("--llama-7b")]
    cases += [measured("--layers", str(layers)) for layers in (*SIZES, MOST)]
    big, *sized, most = cases
    exponent = slope(
        [math.log(case["equations"]) for case in sized],
        [math.log(case["propagation_s"]) for case in sized],
    )
    _record.table(
        (
            "program", "equations", "propagation s", "us/equation", "cpu s",
            "classes s", "blocks s", "trace s", "peak GB", "of it GB",
        ),
        [
            (
                case["program"],
                case["equations"],
                f"{case['propagation_s']:.3f}",
                f"{case['propagation_s'] / case['equations'] * 1e6:.1f}",
                f"{case['propagation_cpu_s']:.3f}",
                f"{case['classes_s']:.3f}",
                f"{case['blocks_s']:.3f}",
                f"{case['trace_s']:.1f}",
                f"{case['peak_rss_bytes'] / 1e9:.2f}",
                f"{case['propagation_rss_bytes'] / 1e9:.2f}",
            )
            for case in cases
        ],
    )  # fmt: skip
    print(f"time grows with equations to the power {exponent:.2f}")
    passed = (
        big["propagation_s"] <= BAR_7B_S
        and most["propagation_s"] <= BAR_1000_S
        and exponent <= BAR_EXPONENT
    )
    _record.write(
        options.into,
        "propagation",
        what=(__doc__ or "").strip(),
        command="python benchmarks/bench_propagation.py",
        figures={
            "bar_llama_7b_s": BAR_7B_S,
            "bar_1000_layers_s": BAR_1000_S,
            "bar_exponent": BAR_EXPONENT,
            "runs_of_each": RUNS,
            "exponent": exponent,
            "cases": cases,
        },
        passed=passed,
        start=start,
    )
    return int(not passed)


def slope(x: list[float], y: list[float]) -> float:
    """Of the line of least squares."""
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


def measured(*which: str) -> dict[str, Any]:
    """One size, in a process of its own.

    Raises:
        RuntimeError: It failed; the message has what it said.
    """
    command = [sys.executable, str(Path(__file__).resolve()), *which]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(which)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- one size, in a process of its own -------------------------------------------


def child() -> int:
    """Measures one size and prints it as JSON."""
    parser = argparse.ArgumentParser()
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--layers", type=int)
    which.add_argument("--llama-7b", action="store_true")
    options = parser.parse_args()

    from autoshard.ir.program import LINK
    from autoshard.ir.ties import find_blocks
    from autoshard.ir.trace import trace
    from autoshard.plan.sharded import Layout
    from autoshard.propagate import find_classes, propagate

    step, batch = llama_7b() if options.llama_7b else narrow(options.layers)
    begin_s = time.perf_counter()
    traced = trace(step, [batch])
    trace_s = time.perf_counter() - begin_s
    traced_bytes = peak_bytes()
    hidden = ("heads", "kv_heads", "mlp", "vocab")
    layout = Layout(
        rules=(
            ("batch", ("data",)),
            *((name, ("tensor",)) for name in hidden),
            ("seq.residual", ("tensor",)),
        ),
        params=("data",),
        gradients=("data",),
        optimizer=("data",),
        sizes={"data": 8, "tensor": 8},
    )
    classes_s, layout_s, blocks_s, cpu_s = [], [], [], []
    for _ in range(RUNS):
        cpu_begin_s, begin_s = time.process_time(), time.perf_counter()
        classes = find_classes(traced)
        middle_s = time.perf_counter()
        propagate(traced, classes, layout)
        end_s = time.perf_counter()
        cpu_s.append(time.process_time() - cpu_begin_s)
        classes_s.append(middle_s - begin_s)
        layout_s.append(end_s - middle_s)
    peak = peak_bytes()
    for _ in range(RUNS):  # a part of tracing, shown by itself
        begin_s = time.perf_counter()
        blocks = find_blocks(traced.program)
        blocks_s.append(time.perf_counter() - begin_s)
    ops = traced.program.ops
    each_s = [a + b for a, b in zip(classes_s, layout_s, strict=True)]
    print(
        json.dumps(
            {
                "program": "llama-7b"
                if options.llama_7b
                else f"{options.layers} layers",
                "equations": sum(op.primitive != LINK for op in ops),
                "repeats": [[r.period, r.count] for r in blocks.repeats],
                "tied_fraction": blocks.tied_ops / len(ops),
                "trace_s": trace_s,
                "classes_s": statistics.median(classes_s),
                "blocks_s": statistics.median(blocks_s),
                "layout_s": statistics.median(layout_s),
                "propagation_s": statistics.median(each_s),
                "propagation_s_of_each": each_s,
                "propagation_cpu_s": statistics.median(cpu_s),
                "peak_rss_bytes": peak,
                "propagation_rss_bytes": peak - traced_bytes,
            }
        )
    )
    return 0


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tokens(batch: int, seq: int) -> dict[str, Any]:
    """Abstract inputs of a language model."""
    import jax
    import jax.numpy as jnp

    return {
        name: jax.ShapeDtypeStruct((batch, seq), jnp.int32)
        for name in ("tokens", "targets")
    }


def llama_7b() -> tuple[Any, Any]:
    """Llama 7B (Touvron et al. 2023, arXiv:2302.13971, table 2), layers written out."""
    import optax

    import autoshard as ash
    from autoshard.models import DecoderConfig, build, next_token_loss

    config = DecoderConfig(
        name="llama-7b",
        vocab=32000,
        layers=32,
        embed=4096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        mlp=11008,
        max_seq=2048,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        scan_layers=False,
    )
    step = ash.train_step(
        next_token_loss, optax.adamw(1e-3), model=lambda rngs: build(config, rngs)
    )
    return step, tokens(64, 2048)


def narrow(layers: int) -> tuple[Any, Any]:
    """A Llama of so many layers in plain JAX, 64 wide."""
    import jax
    import jax.numpy as jnp
    import optax

    import autoshard as ash

    embed, heads, size, mlp, vocab = 64, 8, 8, 128, 256

    def norm(scale: Any, x: Any) -> Any:
        mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean + 1e-6) * scale

    def turned(x: Any) -> Any:
        low, high = jnp.split(x, 2, axis=-1)
        rate = 1e-4 ** (jnp.arange(size // 2) / (size // 2))
        angle = (jnp.arange(x.shape[1])[:, None] * rate)[:, None]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    @jax.jit
    def layer(p: Any, x: Any) -> Any:
        h = norm(p["attention_norm"], x)
        q, k, v = (jnp.einsum("bse,ehd->bshd", h, p[name]) for name in "qkv")
        scores = jnp.einsum("bshd,bthd->bhst", turned(q), turned(k)) / size**0.5
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1)
        x = x + jnp.einsum("bhst,bthd,hde->bse", weights, v, p["o"])
        h = norm(p["mlp_norm"], x)
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    def loss(params: Any, batch: Any) -> Any:
        x = params["embedding"][batch["tokens"]]
        for p in params["layers"]:
            x = layer(p, x)
        logits = norm(params["final_norm"], x) @ params["head"]
        picked = jax.nn.one_hot(batch["targets"], vocab)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * picked, axis=-1))

    def init(key: Any) -> Any:
        del key  # values do not matter here
        one = {name: jnp.zeros((embed, heads, size)) for name in "qkv"}
        one |= {"o": jnp.zeros((heads, size, embed))}
        one |= {name: jnp.zeros((embed, mlp)) for name in ("gate", "up")}
        one |= {"down": jnp.zeros((mlp, embed))}
        one |= {name: jnp.ones(embed) for name in ("attention_norm", "mlp_norm")}
        return {
            "embedding": jnp.zeros((vocab, embed)),
            "layers": [dict(one) for _ in range(layers)],
            "final_norm": jnp.ones(embed),
            "head": jnp.zeros((embed, vocab)),
        }

    return ash.train_step(loss, optax.adamw(1e-3), model=init), tokens(64, 32)


if __name__ == "__main__":
    sys.exit(main())
