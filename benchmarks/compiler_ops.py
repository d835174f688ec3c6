"""What the TPU compiler estimates for single ops: the figures of its view of a chip.

Products of many shapes, and kernels that read and write, are compiled alone for one
device of each generation; recorded are the cycles that the compiler notes, in
`compiler_ops.csv`. From them follow the rates of `autoshard/cost/compiler.toml`: the
median share of peak of products that are bound by arithmetic (no dim below 2048), the
share of memory bandwidth of a fused loop over float32 (seven passes) and of a copy to
another layout, and what the small windows of a kernel of one op cost.
Bar: the shipped rates are those of this table, within 3 %.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import _record

CLUSTERS = ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4")
ROWS = (256, 1024, 4096, 16384)
DEPTHS = (512, 2048, 8192)
COLUMNS = (1024, 4096)
LARGE = 2048
BAR = 0.03
SIDE = 8192


def ops() -> Iterator[tuple[str, Callable[..., Any], list[Any], float]]:
    """Name, function, abstract arguments and FLOPs of every op."""
    import jax
    import jax.numpy as jnp

    def of(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    for dtype in (jnp.bfloat16, jnp.float32):
        for m in ROWS:
            for k in DEPTHS:
                for n in COLUMNS:
                    if dtype == jnp.float32 and (m, n) != (4096, 4096):
                        continue
                    args = [of(m, k, dtype=dtype), of(k, n, dtype=dtype)]
                    name = f"product {jnp.dtype(dtype).name} {m}x{k}x{n}"
                    yield name, jnp.matmul, args, 2.0 * m * k * n
    whole, half = of(SIDE, SIDE), of(SIDE, SIDE, dtype=jnp.bfloat16)

    def adam(p: Any, m: Any, v: Any, g: Any) -> Any:
        return p - m / (jnp.sqrt(v) + 1e-8), 0.9 * m + g, 0.9 * v + g * g

    yield "loop float32", adam, [whole] * 4, 0.0
    yield "loop bfloat16", lambda x: x * 2 + 1, [half], 0.0
    yield "sum float32", lambda x: (x * x).sum(), [whole], 0.0
    yield "copy float32", jnp.transpose, [whole], 0.0
    yield "copy bfloat16", jnp.transpose, [half], 0.0
    yield "single zeros float32", lambda x: jnp.full((SIDE, SIDE), x), [of()], 0.0
    yield "single exp float32", jnp.exp, [whole], 0.0
    yield "single convert", lambda x: x.astype(jnp.bfloat16), [whole], 0.0


def measure(spec: str) -> list[dict[str, Any]]:
    """Every op on one device of a cluster."""
    import jax

    from autoshard.plan.cluster import cluster
    from autoshard.verify.clocks import tpu_time
    from autoshard.verify.module import Module
    from autoshard.verify.targets import Target

    chips = cluster(spec)
    target = Target("tpu", spec, chips, chips.num_chips)
    place = jax.sharding.SingleDeviceSharding(target.devices()[0])
    assert target.clock_hz is not None
    found = []
    for name, function, args, flops in ops():
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in args]
        text = jax.jit(function).lower(*placed).compile().as_text()
        results = jax.tree.leaves(jax.eval_shape(function, *args))
        moved = sum(a.size * a.dtype.itemsize for a in (*args, *results))
        time_s = tpu_time(Module(text), target.clock_hz).compute_s
        found.append(
            {
                "generation": chips.chip.generation,
                "op": name,
                "cycles": round(time_s * target.clock_hz),
                "time_us": round(1e6 * time_s, 3),
                "bytes": moved,
                "share_of_peak": round(
                    flops / chips.peak_flops_per_s("bfloat16") / time_s, 4
                ),
                "share_of_bandwidth": round(moved / chips.hbm_bytes_per_s / time_s, 4),
            }
        )
    return found


def rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Rates that follow from the rows of one generation."""
    by_name = {row["op"]: row for row in rows}
    large = [
        row["share_of_peak"]
        for name, row in by_name.items()
        if name.startswith("product bfloat16")
        and min(map(int, name.split()[-1].split("x"))) >= LARGE
    ]
    return {
        "product_share": statistics.median(large),
        "memory_share": by_name["loop float32"]["share_of_bandwidth"],
        "copy_share": by_name["copy float32"]["share_of_bandwidth"],
    }


def main() -> int:
    """Compiles every op; 1 when a shipped rate is not that of the table."""
    arguments, start = _record.arguments(__doc__ or ""), _record.begin()
    import jax

    from autoshard.cost.rates import Rates
    from autoshard.plan.cluster import cluster

    jax.config.update("jax_platforms", "cpu")
    table, found, lines = [], {}, []
    for spec in CLUSTERS:
        rows = measure(spec)
        table += rows
        chips = cluster(spec)
        shipped = Rates.compiler(chips)
        kept = {
            "product_share": shipped.product_share,
            "memory_share": shipped.hbm_bytes_per_s / chips.hbm_bytes_per_s,
            "copy_share": shipped.copy_bytes_per_s / chips.hbm_bytes_per_s,
        }
        found[spec] = {"table": rates(rows), "shipped": kept}
        lines += [
            (spec, name, f"{value:.3f}", f"{kept[name]:.3f}")
            for name, value in rates(rows).items()
        ]
        print(lines[-3:], file=sys.stderr, flush=True)
    arguments.into.mkdir(parents=True, exist_ok=True)
    with (arguments.into / "compiler_ops.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    _record.table(("cluster", "rate", "table", "shipped"), lines)
    worst = max(
        abs(one["shipped"][name] / one["table"][name] - 1)
        for one in found.values()
        for name in one["table"]
    )
    _record.write(
        arguments.into,
        "compiler_ops",
        what=(__doc__ or "").strip(),
        command="python benchmarks/compiler_ops.py",
        figures={"bar": BAR, "worst_difference": worst, "by_cluster": found},
        passed=worst <= BAR,
        start=start,
    )
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
