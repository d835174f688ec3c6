"""A loss as a program with one op per equation, and running some of its equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from autoshard.ir import _jaxcompat
from autoshard.ir.fold import Folded
from autoshard.ir.ties import find_blocks
from autoshard.ir.trace import Traced
from autoshard.ir.train_step import path_string
from autoshard.ir.values import Op, Program, Region, Value

_jaxcompat.hide_from_source_lines(__file__)


def by_equation(
    closed: Any, args: tuple[Any, Any, Any]
) -> tuple[Traced, dict[int, Any]]:
    """The loss with each of its equations as one op; its constants, by value."""
    opened, consts = _jaxcompat.open_jaxpr(closed)
    values: list[Value] = []
    env: dict[Any, int] = {}

    def new(var: Any, producer: int) -> int:
        env[var] = index = len(values)
        dtype = getattr(var.aval, "dtype", None)
        shape = _jaxcompat.shape_of(var.aval)
        values.append(Value(index, tuple(shape), dtype, producer, 0))  # type: ignore[arg-type]
        return index

    inputs = [new(var, -1) for var in opened.invars]
    held = {new(var, -1): x for var, x in zip(opened.constvars, consts, strict=True)}
    ops = []
    for index, eqn in enumerate(opened.eqns):
        operands = [-1 if _jaxcompat.is_literal(a) else env[a] for a in eqn.invars]
        results = [new(var, index) for var in eqn.outvars]
        scope, name = _jaxcompat.name_stack(eqn), eqn.primitive.name
        ops.append(
            Op(
                *(index, name, eqn.params, tuple(operands), tuple(results), 0, ""),
                scope=scope,
                equation=eqn,
            )
        )
    paths = [
        f"{head}/{path_string(path)}"
        for head, arg in zip(("params", "rest", "batch"), args, strict=True)
        for path, _ in jax.tree_util.tree_flatten_with_path(arg)[0]
    ]
    outputs = [-1 if _jaxcompat.is_literal(a) else env[a] for a in opened.outvars]
    program = Program(
        values=tuple(values),
        ops=tuple(ops),
        regions=(Region(-1, 1),),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        input_paths=tuple(paths),
        fingerprint="",
    )
    traced = Traced(
        program=program,
        jaxpr=closed,
        inputs=(None,) * len(inputs),  # type: ignore[arg-type]
        out_tree=None,
        out_source=(-1,) * len(outputs),
        args=args,
        blocks=find_blocks(program),
    )
    return traced, held


def runner(
    folded: Folded, consts: dict[int, Any], closed: Any, rest_tree: Any
) -> Callable[..., Any]:
    """What runs the equations that are kept."""
    program = folded.traced.program
    place = {v: k for k, v in enumerate(folded.values)}
    held = {place[v]: x for v, x in consts.items() if v in place}
    opened, _ = _jaxcompat.open_jaxpr(closed)
    ends = opened.outvars

    def run(params: Any, rest: Any, batch: Any) -> tuple[Any, Any]:
        leaves = jax.tree.leaves((params, rest, batch))
        env = dict(zip(program.inputs, leaves, strict=True)) | held
        for op in program.ops:
            eqn = op.equation
            operands = [
                atom.val if v < 0 else env[v]
                for atom, v in zip(eqn.invars, op.inputs, strict=True)
            ]
            results = _jaxcompat.eval_equation(eqn, operands)
            env.update(zip(op.outputs, results, strict=True))
        results = [
            atom.val if v < 0 else env[v]
            for atom, v in zip(ends, program.outputs, strict=True)
        ]
        return results[0], jax.tree.unflatten(rest_tree, results[1:])

    return run
