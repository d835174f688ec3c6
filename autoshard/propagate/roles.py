"""Names for dim classes that nobody named, from their role in the program.

A program without annotations still tells what its dims are: the dim that token ids look
up is the vocabulary; what a lookup returns per token (or, without a lookup, the width
that most parameters share) is the residual stream, `embed`; and any other width of a
product with activations is hidden inside a block, `mlp`: sharding it column-wise where
it is made and row-wise where it is contracted is Megatron's tensor parallelism (Shoeybi
et al. 2019, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp

from autoshard.ir.program import Op, Program
from autoshard.ir.trace import Traced
from autoshard.plan.sharded import LAYERS
from autoshard.rules import FactorRule


def names_by_role(
    traced: Traced,
    rules: tuple[FactorRule, ...],
    of_value: Sequence[tuple[int, ...]],
    of_factor: Sequence[tuple[int, ...]],
    named: dict[int, tuple[str, ...]],
) -> dict[int, tuple[str, str]]:
    """Roles of the unnamed classes that parameters have.

    Args:
        traced: The program.
        rules: Factor rule per op.
        of_value: Class per dim per value.
        of_factor: Class per factor per op.
        named: Names that annotations and data inputs gave.

    Returns:
        Name and reason per class, only for classes that `named` does not hold.
    """
    program = traced.program
    leaves: Counter[int] = Counter()
    for value, info in zip(program.inputs, traced.inputs, strict=True):
        if info.state == "params":
            shape = program.values[value].shape
            leaves.update(
                {c for c, n in zip(of_value[value], shape, strict=True) if n > 1}
            )
    free = {c for c in leaves if c not in named}
    batch = {c for c, names in named.items() if "batch" in names}
    found: dict[int, str] = {}
    where: dict[int, str] = {}
    hidden: dict[int, str] = {}
    for op, rule, classes in zip(program.ops, rules, of_factor, strict=True):
        if rule.op_kind == "gather" and _by_token(program, op, of_value, batch):
            for d, dim in enumerate(rule.operands[0]):
                cls = of_value[op.inputs[0]][d] if op.inputs[0] >= 0 else -1
                if dim and cls in free and found.get(cls) != "vocab":
                    kind = rule.kinds[dim[0]]
                    found[cls] = "vocab" if kind == "reduce" else "embed"
                    where[cls] = f"role: looked up by token at {op.source}"
        if rule.op_kind == "matmul" and not batch.isdisjoint(classes):
            for cls, kind in zip(classes, rule.kinds, strict=True):
                # The window of a convolution is no width: every device needs it whole.
                if cls in free and cls not in hidden and kind in ("pass", "reduce"):
                    hidden[cls] = f"role: width of the product at {op.source}"
    if "embed" not in found.values() and not any(
        "embed" in names for names in named.values()
    ):
        shared = [c for c in free if c not in found and leaves[c] > 1]
        if shared:
            widest = max(shared, key=lambda c: (leaves[c], -c))
            found[widest] = "embed"
            where[widest] = f"role: the width that {leaves[widest]} parameters share"
    data = {
        c
        for value, info in zip(program.inputs, traced.inputs, strict=True)
        if info.state == "data"
        for c in of_value[value]
    }
    for cls in data | set(found):
        hidden.pop(cls, None)
    stream = {c for c, names in named.items() if {"embed", LAYERS} & set(names)}
    for value, info in zip(program.inputs, traced.inputs, strict=True):
        if info.state == "params":
            # Of heads x head_dim only the first: one axis shards one dim. Where the
            # user named the first, none is left.
            inner = [c for c in of_value[value] if c in hidden]
            told = any(c in named and c not in stream for c in of_value[value])
            for cls in inner[0 if told else 1 :]:
                hidden.pop(cls, None)
    found.update(dict.fromkeys(hidden, "mlp"))
    return {cls: (name, where.get(cls) or hidden[cls]) for cls, name in found.items()}


def _by_token(
    program: Program, op: Op, of_value: Sequence[tuple[int, ...]], batch: set[int]
) -> bool:
    """Whether a gather looks rows up by integers that come with the batch."""
    table, index = op.inputs[:2]
    if table < 0 or index < 0:
        return False
    inexact = jnp.issubdtype(program.values[table].dtype, jnp.inexact)
    return inexact and bool(batch & set(of_value[index]))
