"""Lowering: the traced step, constrained as the plan says, under one `jax.jit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from autoshard.ir.errors import InputError, PlanMismatchError
from autoshard.ir.few import fingerprint
from autoshard.ir.interpret import evaluate
from autoshard.ir.mesh import ALIASES, Spec
from autoshard.ir.trace import Traced, abstract, trace
from autoshard.ir.train_step import TrainState, TrainStep
from autoshard.lower.check import check_fingerprint, check_tensors
from autoshard.lower.pins import Pins
from autoshard.lower.special import special_ops
from autoshard.plan.devices import row_major
from autoshard.plan.schema import Plan


def build_mesh(plan: Plan, devices: Sequence[Any] | None = None) -> Mesh:
    """The plan's mesh over real devices, every axis left to the partitioner (Auto).

    Devices are laid out as the plan is priced: row-major in the order of its axes.

    Raises:
        PlanMismatchError: There are fewer devices than the plan needs.
    """
    available = list(jax.devices() if devices is None else devices)
    needed = plan.cluster.num_chips
    if len(available) < needed:
        kinds = sorted({str(d.device_kind) for d in available})
        raise PlanMismatchError(
            f"the plan is for {needed} chips ({plan.cluster.name}), but there are "
            f"{len(available)} devices here ({', '.join(kinds)}). Search again for "
            f"what is here; on a CPU, --cluster cpu:8 runs on 8 virtual devices."
        )
    laid_out = np.empty(needed, dtype=object)
    laid_out[:] = row_major(available)[:needed]
    return Mesh(
        laid_out.reshape([axis.size for axis in plan.axes]),
        tuple(axis.axis for axis in plan.axes),
        axis_types=(AxisType.Auto,) * len(plan.axes),
    )


def _sharding(mesh: Mesh, spec: Spec) -> NamedSharding:
    return NamedSharding(mesh, spec.to_partition_spec())


def _active(spec: Spec, plan: Plan) -> Spec:
    sizes = plan.sizes
    return Spec(tuple(tuple(a for a in d if sizes[a] > 1) for d in spec.dims))


class _Lowered:
    """What both kinds of lowered function share."""

    def __init__(
        self, fn: Callable[..., Any], plan: Plan, devices: Sequence[Any] | None
    ) -> None:
        if plan.not_executable:
            raise InputError(
                f"this plan has {', '.join(plan.not_executable)}: it is priced, but "
                "autoshard cannot run that yet. Search again with --executable "
                "(executable=True) for the best plan that it can run."
            )
        self.plan = plan
        self.mesh = build_mesh(plan, devices)
        self._fn = fn

    def _compile(self, traced: Traced, donate: tuple[int, ...]) -> None:
        plan, mesh = self.plan, self.mesh
        missing = {(c.address, c.slot) for c in plan.constraints} - _slots(traced)
        if missing:
            address, slot = min(missing)
            raise PlanMismatchError(
                f"the plan pins {len(missing)} values that this program does not have, "
                f"the first at {address} ({slot}); the program was edited since. "
                "Search again."
            )

        def run(*args: Any) -> Any:
            results = evaluate(
                traced.jaxpr,
                jax.tree.leaves(args),
                Pins(plan, mesh),
                mesh=mesh,
                rename={**ALIASES, **plan.strategy.aliases},
                foreign=special_ops(plan, mesh),
            )
            return jax.tree.unflatten(traced.out_tree, results)

        inputs = [_sharding(mesh, _active(t.storage, plan)) for t in plan.tensors]
        outputs = [_sharding(mesh, _active(s, plan)) for s in plan.outputs]
        self.in_shardings = jax.tree.unflatten(jax.tree.structure(traced.args), inputs)
        self.out_shardings = jax.tree.unflatten(traced.out_tree, outputs)
        self.args = traced.args
        run.__name__ = "autoshard_step"
        self.jitted = jax.jit(
            run,
            in_shardings=self.in_shardings,
            out_shardings=self.out_shardings,
            donate_argnums=donate,
        )


def _traced(fn: Callable[..., Any], args: Sequence[Any], plan: Plan) -> Traced:
    """Traces as the search did, with what the strategy says of names."""
    strategy = plan.strategy
    return trace(fn, args, aliases=strategy.aliases, logical=strategy.names)


def _slots(traced: Traced) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for op in traced.program.ops:
        for k in range(len(op.inputs)):
            found |= {(op.address, f"in{k}"), (op.address, f"had{k}")}
        for k in range(len(op.outputs)):
            found |= {(op.address, f"{s}{k}") for s in ("out", "sum", "each")}
    return found


class ParallelStep(_Lowered):
    """A `TrainStep` as a plan spreads it: `(state, batch) -> (state, metrics)`.

    Made by `parallelize`. The state that is passed in is donated.

    Attributes:
        plan: The plan.
        mesh: Devices by axis.
        state_shardings: `NamedSharding` per leaf of the state.
        batch_shardings: The same for the batch.
        jitted: The `jax.jit` function, for `.lower(...)` and inspection.
    """

    def __init__(
        self, step: TrainStep, plan: Plan, devices: Sequence[Any] | None = None
    ) -> None:
        batch = batch_of(plan)
        check_tensors(step, plan, batch)
        plain = _traced(step.with_schedule(microbatches=1, remat="none"), [batch], plan)
        own = fingerprint(step, batch, plain.program.fingerprint)
        check_fingerprint(own, plan)
        super().__init__(step, plan, devices)
        self.step = step.with_schedule(microbatches=plan.microbatches, remat=plan.remat)
        same = plan.microbatches == 1 and plan.remat == "none"
        traced = plain if same else _traced(self.step, [batch], plan)
        self._compile(traced, donate=(0,))
        self.state_shardings, self.batch_shardings = self.in_shardings

    @property
    def abstract_state(self) -> TrainState:
        """The state as `jax.ShapeDtypeStruct`s with their shardings."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.args[0],
            self.state_shardings,
        )

    @property
    def abstract_batch(self) -> Any:
        """The batch as `jax.ShapeDtypeStruct`s with their shardings."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.args[1],
            self.batch_shardings,
        )

    def init(self, seed: int = 0) -> TrainState:
        """A fresh state, made where it lies; no device ever holds all of it."""
        make = jax.jit(lambda: self.step.init(seed), out_shardings=self.state_shardings)
        return make()

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """Runs one step."""
        return self.jitted(state, batch)


class ParallelFunction(_Lowered):
    """A plain function as a plan spreads it; called like the function."""

    def __init__(
        self,
        fn: Callable[..., Any],
        plan: Plan,
        args: Sequence[Any],
        devices: Sequence[Any] | None = None,
    ) -> None:
        traced = _traced(fn, args, plan)
        check_fingerprint(traced.program.fingerprint, plan)
        super().__init__(fn, plan, devices)
        self._compile(traced, donate=())

    def __call__(self, *args: Any) -> Any:
        """Calls the function."""
        return self.jitted(*args)


def batch_of(plan: Plan) -> Any:
    """The abstract batch a plan was made for, as the nested dict its paths spell."""
    tree: dict[str, Any] = {}
    for tensor in plan.tensors:
        if tensor.state != "data":
            continue
        leaf = jax.ShapeDtypeStruct(tensor.shape, _dtype_of(tensor.dtype))
        parts = tensor.path.split("/")[1:]
        if not parts:
            return leaf
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = leaf
    return tree


def _dtype_of(name: str) -> Any:
    """The element type a plan names; that of typed PRNG keys is JAX's own."""
    if name.startswith("key<"):
        for implementation in ("threefry2x32", "rbg", "unsafe_rbg"):
            dtype = jax.eval_shape(
                partial(jax.random.key, 0, impl=implementation)
            ).dtype
            if str(dtype) == name:
                return dtype
        raise PlanMismatchError(
            f"the plan's batch holds PRNG keys of type {name!r}, which this JAX does "
            "not know; search again with jax.random.key of a built-in implementation."
        )
    return np.dtype(name)


def parallelize(
    fn: Callable[..., Any],
    plan: Plan,
    *abstract_args: Any,
    devices: Sequence[Any] | None = None,
) -> ParallelStep | ParallelFunction:
    """Spreads a step over devices as a plan says.

    Args:
        fn: The `TrainStep`, or the plain function, that the plan was made for.
        plan: From `search` or a file.
        *abstract_args: For a plain function, the arguments given to `search`.
        devices: Devices to use, by default `jax.devices()`.

    Returns:
        A callable with the same signature, jitted. For a `TrainStep` it also makes
        the state (`.init(seed)`) and knows all shardings.

    Raises:
        PlanMismatchError: The plan is for another program or more devices.
        InputError: A plain function came without its arguments.
    """
    if isinstance(fn, TrainStep):
        return ParallelStep(fn, plan, devices)
    if not abstract_args:
        raise InputError(
            "parallelize of a plain function needs the abstract arguments it was "
            "searched with: parallelize(fn, plan, *abstract_args)."
        )
    return ParallelFunction(fn, plan, [abstract(a) for a in abstract_args], devices)
