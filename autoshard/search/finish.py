"""Spelling out a chosen candidate as a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from autoshard.cost import Pricer, estimate, model_flops
from autoshard.cost.work import analyse
from autoshard.ir.mesh import AXES, Spec
from autoshard.ir.trace import Traced, trace
from autoshard.ir.train_step import TrainStep
from autoshard.ir.version import VERSION
from autoshard.plan.cluster import Cluster
from autoshard.plan.schema import (
    Certificate,
    ClusterRef,
    Constraint,
    MeshAxis,
    ModelRef,
    Plan,
    ProgramRef,
    Strategy,
    TensorPlan,
)
from autoshard.plan.sharded import OUTPUT, Dims, Layout, ShardedProgram
from autoshard.propagate import find_classes, propagate


def finish(
    fn: Any,
    args: tuple[Any, ...],
    cluster: Cluster,
    strategy: Strategy,
    certificate: Certificate,
    model_ref: ModelRef | None,
    plain: Any,
) -> Plan:
    """Traces the step as the strategy wants it, and writes the plan down.

    Args:
        fn: A `TrainStep` or a plain function.
        args: Abstract arguments.
        cluster: Where it runs.
        strategy: Without holes.
        certificate: Of the search; its gap is completed here.
        model_ref: Recorded in the plan.
        plain: Sketch of the step without microbatches and remat, for model FLOPs.

    Returns:
        The plan.
    """
    assert strategy.schedule.microbatches != "auto"
    if isinstance(fn, TrainStep):
        fn = fn.with_schedule(
            microbatches=strategy.schedule.microbatches, remat=strategy.schedule.remat
        )
    traced = _named_like(trace(fn, args), plain)
    classes = find_classes(traced)
    sizes = {a: n for a, n in strategy.mesh.items() if n != "auto"}
    sharded = propagate(traced, classes, Layout.of(strategy, sizes))
    pricer = Pricer(sharded, analyse(traced, classes))
    predicted = estimate(pricer, cluster, sizes, model_flops(plain.work, plain.classes))
    bound = min(certificate.lower_bound_s, predicted.step_s)
    certificate = certificate.model_copy(
        update={"lower_bound_s": bound, "gap": predicted.step_s / bound - 1}
    )
    return Plan(
        autoshard=VERSION,
        program=ProgramRef(
            fingerprint=plain.traced.program.fingerprint,
            jax=jax.__version__,
            model=model_ref,
            ops=len(traced.program.ops),
            params=sum(
                int(np.prod(i.shape, dtype=np.int64))
                for i in traced.inputs
                if i.state == "params"
            ),
        ),
        cluster=ClusterRef(
            name=cluster.name,
            fingerprint=cluster.fingerprint,
            num_chips=cluster.num_chips,
        ),
        axes=tuple(
            MeshAxis(axis=axis, size=sizes[axis]) for axis in AXES if axis in sizes
        ),
        strategy=strategy,
        tensors=tuple(_tensors(sharded)),
        outputs=tuple(_outputs(sharded)),
        constraints=tuple(_constraints(sharded, sizes)),
        notes=sharded.notes,
        predicted=predicted,
        certificate=certificate,
    )


def _named_like(traced: Traced, plain: Any) -> Traced:
    """Gives the inputs the names they have in the plain program.

    A role is found by structure, and accumulation changes the structure: the names of
    the program that was searched hold for the one that runs.
    """
    names = {}
    for value, info in zip(
        plain.traced.program.inputs, plain.traced.inputs, strict=True
    ):
        names[info.path] = tuple(
            given or next(iter(plain.classes.names.get(cls, ())), None)
            for given, cls in zip(
                info.logical, plain.classes.of_value[value], strict=True
            )
        )
    params = [i for i in traced.inputs if i.state == "params"]
    for info in traced.inputs:
        # A moment of a parameter has the parameter's names.
        for param in params if info.state == "optimizer" else ():
            tail = param.path.removeprefix("params/")
            if info.path.endswith(f"/{tail}") and info.shape == param.shape:
                names[info.path] = names[param.path]
    inputs = tuple(replace(i, logical=names[i.path]) for i in traced.inputs)
    return replace(traced, inputs=inputs)


def _tensors(sharded: ShardedProgram) -> list[TensorPlan]:
    traced = sharded.traced
    found = []
    for value, info, compute in zip(
        traced.program.inputs, traced.inputs, sharded.compute, strict=True
    ):
        uses = info.state in ("params", "data")
        found.append(
            TensorPlan(
                path=info.path,
                shape=info.shape,
                dtype=info.dtype,
                state=info.state,
                logical=info.logical,
                storage=Spec(sharded.specs[value]),
                # Optimizer state is only ever met where it is stored.
                compute=Spec(compute if uses else sharded.specs[value]),
            )
        )
    return found


def _outputs(sharded: ShardedProgram) -> list[Spec]:
    program = sharded.traced.program
    found = []
    for value, source in zip(program.outputs, sharded.traced.out_source, strict=True):
        if source >= 0:
            found.append(Spec(sharded.specs[program.inputs[source]]))
        else:
            found.append(Spec(sharded.specs[value] if value >= 0 else ()))
    return found


def _constraints(sharded: ShardedProgram, sizes: dict[str, int]) -> list[Constraint]:
    """One per place where data moves, and one per annotation; no more.

    Between them the partitioner has nothing left to choose: the ops in between run
    with the specs of their neighbours.
    """
    ops = sharded.traced.program.ops
    pinned: dict[tuple[str, str], Dims] = {}
    for reshard in sharded.reshards:
        if reshard.op == OUTPUT:
            continue  # the results' own shardings say it
        address = ops[reshard.op].address
        pinned[address, reshard.slot] = reshard.target
        kind = sharded.classes.rules[reshard.op].op_kind
        if kind in ("gather", "scatter") and reshard.unreduced:
            # Shown only the final spec, the partitioner moves the table or the
            # updates instead of the partial sums.
            pinned[address, reshard.slot.replace("out", "sum")] = reshard.source
    for index, slot in sharded.pins:
        side = ops[index].inputs if slot.startswith("in") else ops[index].outputs
        value = side[int(slot.removeprefix("in").removeprefix("out"))]
        pinned.setdefault((ops[index].address, slot), sharded.specs[value])

    def active(dims: Dims) -> Spec:
        return Spec(tuple(tuple(a for a in d if sizes.get(a, 1) > 1) for d in dims))

    return [
        Constraint(address=address, slot=slot, spec=active(dims))
        for (address, slot), dims in sorted(pinned.items())
    ]
