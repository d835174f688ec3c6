"""What a case of the rule table is, and how it becomes a program."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from autoshard.ir import _jaxcompat
from autoshard.ir.program import Op, Program, build
from autoshard.rules.runs import runner

F32, I32, U32, BOOL, C64 = "float32", "int32", "uint32", "bool", "complex64"
BF16, F8, E8 = "bfloat16", "float8_e4m3fn", "float8_e8m0fnu"
KEY = "key"


class Arg(NamedTuple):
    """An operand: shape, dtype, and for indices the largest value plus one."""

    shape: tuple[int, ...]
    dtype: str = F32
    below: int = 4


class Case(NamedTuple):
    """A function, its arguments, the primitive to look at, and its rule's text.

    Attributes:
        primitive: Its name; the first op of that name counts.
        fn: The function.
        args: Its arguments.
        text: The rule, derived by hand.
        since: The first version of JAX in which the function gives the primitive.
        before: The first version in which it does so no longer.
    """

    primitive: str
    fn: Any
    args: tuple[Arg, ...]
    text: str
    since: tuple[int, ...] = ()
    before: tuple[int, ...] = (9999,)

    @property
    def runs_here(self) -> bool:
        """Whether the installed JAX gives the primitive."""
        return self.since <= jax.__version_info__ < self.before


def values(case: Case, seed: int = 0) -> list[Any]:
    """Concrete arguments, away from the edges of every function's domain."""
    rng = np.random.default_rng(seed)

    def one(arg: Arg) -> Any:
        if arg.dtype == KEY:
            key = jax.random.key(seed)
            return jax.random.split(key, arg.shape) if arg.shape else key
        if arg.dtype == BOOL:
            return jnp.asarray(rng.random(arg.shape) < 0.5)
        if arg.dtype in (I32, U32):
            return jnp.asarray(rng.integers(0, arg.below, arg.shape), arg.dtype)
        real = rng.uniform(0.1, 0.9, arg.shape)
        if arg.dtype == C64:
            return jnp.asarray(real + 1j * rng.uniform(0.1, 0.9, arg.shape), C64)
        return jnp.asarray(real, arg.dtype)

    return [one(arg) for arg in case.args]


@functools.cache
def program_of(case: Case) -> tuple[Program, Op]:
    """The built program and the first op of the case's primitive."""
    program = build(jax.make_jaxpr(case.fn)(*values(case)), [])
    found = [op for op in program.ops if op.primitive == case.primitive]
    assert found, f"{case.primitive}: only {[op.primitive for op in program.ops]}"
    return program, found[0]


@functools.cache
def operands_of(case: Case) -> list[Any] | None:
    """What the op is called with in the case; None if it does not run by itself."""
    program, op = program_of(case)
    run = runner(program, op)
    if run.whole_only or run.unchecked or program.regions[op.region].manual:
        return None
    args = values(case)
    return _operands(jax.make_jaxpr(case.fn)(*args), args, case.primitive)


def _operands(jaxpr: Any, args: list[Any], name: str) -> list[Any] | None:
    """Operands of the first equation of a primitive."""
    opened, consts = _jaxcompat.open_jaxpr(jaxpr)
    env = dict(zip((*opened.invars, *opened.constvars), (*args, *consts), strict=True))
    for eqn in opened.eqns:
        operands = [a.val if _jaxcompat.is_literal(a) else env[a] for a in eqn.invars]
        if eqn.primitive.name == name:
            return [x if hasattr(x, "dtype") else jnp.asarray(x) for x in operands]
        inner = _jaxcompat.CALL_JAXPR_PARAM.get(eqn.primitive.name)
        if inner:
            found = _operands(eqn.params[inner], operands, name)
            if found:
                return found
        results = _jaxcompat.eval_equation(eqn, operands)
        env.update(zip(eqn.outvars, results, strict=True))
    return None
