"""Parts of a plan as people read them: meshes, rules, specs, shapes, source lines."""

from __future__ import annotations

from typing import Any


def mesh_text(mesh: list[dict[str, Any]]) -> str:
    """`data=8 tensor=4`, without axes of one device."""
    big = [f"{a['axis']}={a['size']}" for a in mesh if a["size"] > 1]
    return " ".join(big) or "one device"


def rules_text(rules: list[dict[str, Any]]) -> str:
    """`batch -> data; heads -> tensor`."""
    given = [f"{r['logical']} -> {'+'.join(r['axes'])}" for r in rules if r["axes"]]
    none = [r["logical"] for r in rules if not r["axes"]]
    if none:
        given.append(f"not sharded: {', '.join(none)}")
    return "; ".join(given) or "none"


def spec_text(dims: list[list[str]]) -> str:
    """`[fsdp, -, tensor]`."""
    return f"[{', '.join('+'.join(dim) or '-' for dim in dims)}]"


def shape_text(shape: list[int]) -> str:
    """`4096 x 14336`."""
    return " x ".join(map(str, shape)) or "scalar"


def source_text(source: str) -> str:
    """A source line with the last two parts of its path, which is enough to find it.

    >>> source_text("/home/me/project/model/layers.py:9:4 (mlp)")
    'model/layers.py:9:4 (mlp)'
    """
    path, _, rest = source.partition(":")
    return "/".join(path.split("/")[-2:]) + (f":{rest}" if rest else "")


def some_text(values: list[str], most: int = 3) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(values[:most]) + more
