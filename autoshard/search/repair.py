"""More constraints for a plan, where the compiler moves what the plan does not."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from autoshard.ir.mesh import Spec
from autoshard.ir.train_step import TrainStep
from autoshard.plan.schema import Constraint, Plan
from autoshard.plan.sharded import Dims, Layout
from autoshard.propagate import propagate
from autoshard.propagate.project import spec_of
from autoshard.search.pins import constraints
from autoshard.search.reading import Sketch, classes_of, read


def constraints_at(
    fn: Any, args: tuple[Any, ...], plan: Plan, lines: Collection[str]
) -> tuple[Constraint, ...]:
    """Constraints that a plan lacks on what is computed on some lines.

    Every operand and result of an op on these lines is pinned to the spec that the plan
    gives it, where the plan has no constraint yet; so is what the search would pin and
    the plan does not.

    Args:
        fn: What the plan was searched for.
        args: Its abstract arguments, as given to the search.
        plan: The plan.
        lines: `file:line`, files named as they are imported.

    Returns:
        Those that are new, by address.

    Raises:
        InputError: The function cannot be traced with these arguments.

    >>> import jax.numpy as jnp, autoshard as ash
    >>> args = jnp.ones((8, 4)), jnp.ones((16, 8))
    >>> fn = lambda w, x: (x @ w).sum()
    >>> plan = ash.search(fn, *args, cluster="cpu:8", strategy="dp")
    >>> constraints_at(fn, args, plan, ())
    ()
    """
    strategy, sizes = plan.strategy, plan.sizes
    plain = fn
    if isinstance(fn, TrainStep):
        plain = fn.with_schedule(microbatches=1, remat="none")
        fn = fn.with_schedule(microbatches=plan.microbatches, remat=plan.remat)
    sketch = Sketch.of(plain, args, strategy)
    traced = read(fn, args, strategy)
    classes = classes_of(traced, strategy, sketch)
    sharded = propagate(traced, classes, Layout.of(strategy, sizes))
    wanted = {(c.address, c.slot): c.spec for c in constraints(sharded, sizes)}

    def active(dims: Dims) -> Spec:
        return Spec(tuple(tuple(a for a in d if sizes[a] > 1) for d in dims))

    program = traced.program
    # Partial sums have no spec of their own until they are reduced.
    partial = {i for d in sharded.delayed for i in (*d.roots, *d.carriers)}
    for op in program.ops:
        line = ":".join(op.source.split(" ")[0].split(":")[:2])
        if line not in lines or op.primitive == "link" or op.index in partial:
            continue
        rule, axes = classes.rules[op.index], sharded.factor_axes[op.index]
        for k, (value, dims) in enumerate(zip(op.inputs, rule.operands, strict=True)):
            if value >= 0 and program.values[value].shape:
                at = op.address, f"in{k}"
                wanted.setdefault(at, active(spec_of(dims, axes)))
        for k, value in enumerate(op.outputs):
            if program.values[value].shape:
                at = op.address, f"out{k}"
                wanted.setdefault(at, active(sharded.specs[value]))
    had = {(c.address, c.slot) for c in plan.constraints}
    return tuple(
        Constraint(address=address, slot=slot, spec=spec)
        for (address, slot), spec in sorted(wanted.items(), key=lambda item: item[0])
        if (address, slot) not in had
    )
