"""Commands that list what autoshard ships."""

from __future__ import annotations

import dataclasses

from rich.table import Table
from rich.text import Text

from autoshard.cli.output import Json, show, show_json


def models(as_json: Json = False) -> None:
    """List the models of the zoo."""
    from autoshard import models as zoo
    from autoshard.report.table import new_table
    from autoshard.report.units import params_text

    configs = sorted(zoo.PRESETS.values(), key=zoo.num_params)
    if as_json:
        show_json(
            [{**dataclasses.asdict(c), "params": zoo.num_params(c)} for c in configs]
        )
        return
    table = new_table("model")
    numbers = (
        "params",
        "layers",
        "embed",
        "heads",
        "kv heads",
        "mlp",
        "vocab",
        "max seq",
    )
    _numbers(table, *numbers)
    for c in configs:
        sizes = (c.layers, c.embed, c.heads, c.kv_heads, c.mlp, c.vocab, c.max_seq)
        table.add_row(c.name, params_text(zoo.num_params(c)), *map(str, sizes))
    show(table)


def clusters(as_json: Json = False) -> None:
    """List the chips that clusters are made of; --json adds each figure's source."""
    from autoshard.plan import chip
    from autoshard.report.table import new_table
    from autoshard.report.units import bytes_text, count_text

    types = [chip.load_type(name) for name in chip.names()]
    if as_json:
        show_json([t.model_dump(mode="json", exclude_none=True) for t in types])
        return
    table = new_table("type", "kind")
    _numbers(table, "a node", "peak", "memory", "bandwidth")
    table.add_column("links, one way per chip", overflow="fold")
    for t in types:
        # The first of these that the chip has: a V100 has no bf16.
        peaks = {str(d): figure.value for d, figure in t.peak_flops_per_s.items()}
        dtype = next(d for d in ("bf16", "f16", "f32") if d in peaks)
        peak = count_text(peaks[dtype], "FLOP/s")
        links = []
        for link in t.links:
            each = " a link" if link.level == "ici" else ""
            links.append(
                f"{link.level} {count_text(link.bytes_per_s.value, 'B/s')}{each}"
            )
        table.add_row(
            t.name,
            t.kind,
            f"{t.chips_per_node.value:.0f}",
            f"{peak} {dtype}",
            bytes_text(t.hbm_bytes.value),
            count_text(t.hbm_bytes_per_s.value, "B/s"),
            Text("\n".join(links)),
        )
    show(table)


def strategies(as_json: Json = False) -> None:
    """List the strategies that are shipped."""
    from autoshard.plan.files import load_strategy, strategy_names
    from autoshard.report.table import new_table

    loaded = [load_strategy(name) for name in strategy_names()]
    if as_json:
        show_json([s.model_dump(mode="json") for s in loaded])
        return
    table = new_table("strategy", "axes", "about", "published")
    for s in loaded:
        table.add_row(
            s.name,
            Text(" ".join(s.mesh)),
            Text(s.about),
            Text("\n".join(s.cite) or "-"),
        )
    show(table)


def _numbers(table: Table, *columns: str) -> None:
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
