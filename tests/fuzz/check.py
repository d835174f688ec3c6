"""The properties every random program must have, held against XLA.

Many programs share one compilation: it is what takes the time.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import jax
import numpy as np
from fuzz.build import Built, build, strategy_of
from fuzz.describe import Case, floating, from_json, nodes_of, to_json
from fuzz.laws import again, any_order
from fuzz.ops_names import asks, unconstrained, without_constraints
from jax.extend import core
from jax.sharding import NamedSharding

import autoshard as ash
from autoshard.ir.errors import InfeasibleError
from autoshard.ir.interpret import evaluate
from autoshard.ir.trace import trace
from autoshard.plan.schema import Plan
from autoshard.plan.sharded import ShardedProgram
from autoshard.propagate import propagate

RELATIVE = 1e-5
ABSOLUTE = 2e-6
"""Rounding of inputs near one that cancel: no result is asked for less than this."""

DOUBLES = 1e-3
"""How near, in units of what is allowed in single precision, doubles must come."""

FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    # Else devices begin the collectives of several programs in orders of their own,
    # and wait for each other for ever.
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
}
"""Compiles in a fifth of the time; the partitioner does not read them."""


@dataclass
class Ready:
    """A case with its plan, ready to be compiled."""

    case: Case
    built: Built
    plan: Plan
    parallel: Any
    dropped: tuple[str, ...]
    sharded: ShardedProgram


@dataclass
class Verdict:
    """What was found about one case; no failures is a pass.

    Attributes:
        case: The case.
        failures: What is wrong, in words.
        worst: The largest difference, in units of what is allowed.
        noisy: The results differ by rounding alone: they agree in double precision.
        defect: A known defect of XLA, for which nothing here is to blame.
        dropped: What was no longer asked for because a dim did not divide.
        moves: Collectives of the plan.
        pins: Pinned values whose sharding XLA was asked for.
    """

    case: Case
    failures: list[str] = field(default_factory=list)
    worst: float = 0.0
    noisy: bool = False
    defect: str = ""
    dropped: tuple[str, ...] = ()
    moves: int = 0
    pins: int = 0

    @property
    def wrong(self) -> bool:
        """Whether autoshard is to blame."""
        return bool(self.failures) and not self.noisy and not self.defect

    @property
    def kind(self) -> str:
        """What kind of failure it is, without numbers and names; empty if none."""
        if not self.wrong:
            return ""
        first = self.failures[0]
        found = next((words for words in KINDS if words in first), "")
        return found or re.sub(r"[0-9]+", "#", first)[:60]


KINDS = ("differs by", " lies as ", "when that is fixed", "in another order")
"""Words that tell one kind of failure from another."""

DEFECTS = {
    "fft_thunk.cc": "the CPU's FFT refuses the layout that a collective asks of it",
}
"""What XLA says, and what is wrong there."""


@contextlib.contextmanager
def _traced_once() -> Iterator[None]:
    """Search and lowering trace the same function; it takes most of their time."""
    known: dict[Any, Any] = {}

    def once(fn: Any, args: Any, **options: Any) -> Any:
        function, pieces = getattr(fn, "loss_fn", fn), getattr(fn, "microbatches", 0)
        key = (function, pieces, len(args), repr(options))
        if key not in known:
            known[key] = trace(fn, args, **options)
        return known[key]

    with (
        mock.patch("autoshard.search.reading.trace", once),
        mock.patch("autoshard.lower.step.trace", once),
    ):
        yield


def prepare(case: Case) -> Ready:
    """Plans a case.

    Where a dim does not divide, which search refuses, less and less is asked for.
    """
    built = build(case)
    cluster = ash.cluster(f"cpu:{case.chips}")
    kept, dropped = case, []
    seen: list[ShardedProgram] = []

    def recorded(*args: Any) -> ShardedProgram:
        seen.append(propagate(*args))
        return seen[-1]

    with (
        _traced_once(),
        mock.patch("autoshard.search.finish.propagate", recorded),
    ):
        while True:
            try:
                plan = ash.search(
                    built.fn, *built.given, cluster=cluster, strategy=strategy_of(kept)
                )
                break
            except InfeasibleError:
                kept = _with_less(kept, dropped)
                if kept is None:
                    raise
                built = build(kept)
        parallel = ash.parallelize(built.fn, plan, *built.given)
    return Ready(case, built, plan, parallel, tuple(dropped), seen[-1])


def _with_less(case: Case, dropped: list[str]) -> Case | None:
    """The case with fewer wishes: storage first, then rules, then constraints."""
    full = [name for name, axes in case.rules.items() if axes]
    if any(case.storage.values()):
        dropped.append("storage")
        return replace(case, storage={})
    if full:
        gone = full[len(full) // 2 :]
        dropped += gone
        return replace(case, rules={**case.rules, **{name: [] for name in gone}})
    if asks(case.body):
        dropped.append("constraints")
        return replace(case, body=without_constraints(case.body))
    return None


def check(
    cases: Sequence[Case],
    *,
    together: int = 12,
    options: Mapping[str, Any] = FAST,
) -> list[Verdict]:
    """Holds cases to every property, as many of them together as may be compiled.

    Args:
        cases: Any cases.
        together: How many share one compilation.
        options: How XLA compiles them.

    Returns:
        One verdict per case, in no order.
    """
    verdicts: list[Verdict] = []
    groups: dict[Any, list[Ready]] = defaultdict(list)
    for case in cases:
        try:
            ready = prepare(case)
        except Exception as error:
            verdicts.append(Verdict(case, [_words(error)]))
            continue
        # What XLA may refuse does not hold up the others.
        risky = any(node.op == "fft" for node in nodes_of(case.body))
        groups[tuple(case.mesh.items()), risky].append(ready)
    for ready in groups.values():
        for start in range(0, len(ready), together):
            verdicts += _bisected(ready[start : start + together], options)
    return verdicts


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def _bisected(ready: list[Ready], options: Mapping[str, Any]) -> list[Verdict]:
    """Runs cases together; where that fails, those that make it fail are alone."""
    try:
        return run_together(ready, options=options)
    except Exception as error:
        if len(ready) > 1:
            half = len(ready) // 2
            return _bisected(ready[:half], options) + _bisected(ready[half:], options)
        if "negative padding" in str(error):  # only where XLA was asked to be quick
            return run_together(ready, options={})
        verdict = Verdict(ready[0].case, [_words(error)])
        verdict.defect = next((d for w, d in DEFECTS.items() if w in str(error)), "")
        return [verdict]


def run_together(
    ready: Sequence[Ready],
    *,
    options: Mapping[str, Any] = FAST,
    excuse: bool = True,
) -> list[Verdict]:
    """Compiles cases with one device count together, runs and compares them."""
    args = [r.built.args for r in ready]
    shapes = jax.tree.map(jax.typeof, args)
    sharded = jax.jit(
        lambda given: [
            r.parallel.jitted(*a) for r, a in zip(ready, given, strict=True)
        ],
        in_shardings=([r.parallel.in_shardings for r in ready],),
        out_shardings=[r.parallel.out_shardings for r in ready],
        keep_unused=True,  # else they are not reported
    )
    plain = jax.jit(
        lambda given: [_plain(r, a) for r, a in zip(ready, given, strict=True)]
    )
    with _watched(ready) as seen:
        compiled = sharded.lower(shapes).compile(compiler_options=dict(options))
    reference = plain.lower(shapes).compile(compiler_options=dict(options))
    got = compiled(args)
    want = reference(args)
    verdicts = [
        Verdict(
            r.case,
            _lawless(r),
            dropped=r.dropped,
            moves=len(r.plan.predicted.collectives),
        )
        for r in ready
    ]
    for k, (verdict, r) in enumerate(zip(verdicts, ready, strict=True)):
        _compare(verdict, got[k], want[k])
        _check_shapes(verdict, r, compiled.input_shardings[0][0][k], got[k])
        _check_pins(verdict, r, seen[k])
    for k, verdict in enumerate(verdicts):
        if excuse and verdict.worst > 1:
            _excuse_rounding(verdict)
            if not verdict.noisy:
                _excuse_simplifier(verdict, ready[k], want[k])
    return verdicts


def _plain(ready: Ready, args: Any) -> Any:
    """The function as it was traced, as to trace it again would take as long."""
    if asks(ready.case.body):
        with unconstrained():
            return ready.built.fn(*args)
    traced = ready.sharded.traced
    results = core.jaxpr_as_fun(traced.jaxpr)(*jax.tree.leaves(args))
    return jax.tree.unflatten(traced.out_tree, results)


def _lawless(ready: Ready) -> list[str]:
    rng = random.Random(ready.case.seed)
    return [*again(ready.sharded), *any_order(ready.sharded, rng)]


def _difference(got: Any, want: Any) -> tuple[float, float]:
    """The largest difference of two arrays, and the largest that is rounding."""
    if jax.dtypes.issubdtype(want.dtype, jax.dtypes.prng_key):
        got, want = jax.random.key_data(got), jax.random.key_data(want)
    a, b = np.asarray(got), np.asarray(want)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    if not a.size:
        return 0.0, 1.0
    if not floating(a):
        return float((a != b).any()), 0.5
    # A loop that squares what it carries overflows, in one as in the other.
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    size = float(np.abs(b[np.isfinite(b)]).max(initial=0))
    return float(np.abs(a[~same] - b[~same]).max(initial=0)), (
        RELATIVE * size + ABSOLUTE
    )


def _compare(verdict: Verdict, got: Any, want: Any) -> None:
    for k, (a, b) in enumerate(
        zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    ):
        difference, allowed = _difference(a, b)
        ratio = difference / allowed
        verdict.worst = max(verdict.worst, ratio)
        if not ratio <= 1:
            verdict.failures.append(
                f"result {k} {b.dtype}{list(b.shape)} differs by {difference:.3g}, "
                f"{ratio:.3g} times what is allowed"
            )


def _excuse_rounding(verdict: Verdict) -> None:
    """Results that agree in double precision differed by rounding alone."""
    text = to_json(verdict.case).replace('"float32"', '"float64"')
    with jax.enable_x64(True):
        [wide] = run_together([prepare(from_json(text))], excuse=False)
    verdict.noisy = wide.worst < DOUBLES


def _excuse_simplifier(verdict: Verdict, ready: Ready, want: Any) -> None:
    """A program that is right without XLA's algebraic simplifier is partitioned right.

    It merges a slice of a slice whose start lies out of range, and forgets that the
    inner start is clamped.
    """
    args = ready.built.args
    options = {**FAST, "xla_disable_hlo_passes": "algsimp"}
    lowered = ready.parallel.jitted.lower(*jax.tree.map(jax.typeof, args))
    got = lowered.compile(compiler_options=options)(*args)
    probe = Verdict(ready.case)
    _compare(probe, got, want)
    if not probe.failures:
        verdict.defect = "the algebraic simplifier forgets that a slice is clamped"


def local_shape(
    shape: Sequence[int], dims: Sequence[Sequence[str]], sizes: dict[str, int]
) -> tuple[int, ...]:
    """What one device holds of an array of this shape under a spec."""
    parts = [math.prod(sizes[a] for a in dim) for dim in dims]
    return tuple(-(-n // p) for n, p in zip(shape, parts, strict=True))


def _check_shapes(verdict: Verdict, ready: Ready, inputs: Any, got: Any) -> None:
    """Local shapes of arguments and results as the plan says, device by device."""
    plan = ready.plan
    for tensor, sharding in zip(plan.tensors, jax.tree.leaves(inputs), strict=True):
        wanted = local_shape(tensor.shape, tensor.storage.dims, plan.sizes)
        found = sharding.shard_shape(tensor.shape)
        if found != wanted:
            verdict.failures.append(
                f"argument {tensor.path} lies as {found}, planned {wanted}"
            )
    for k, (leaf, spec) in enumerate(
        zip(jax.tree.leaves(got), plan.outputs, strict=True)
    ):
        wanted = local_shape(leaf.shape, spec.dims, plan.sizes)
        shapes = {shard.data.shape for shard in leaf.addressable_shards}
        if shapes != {wanted}:
            verdict.failures.append(f"result {k} lies as {shapes}, planned {wanted}")


Seen = dict[tuple[str, str], list[tuple[Any, int]]]
"""By address and slot, the shardings XLA chose, and the rank of the value."""


@contextlib.contextmanager
def _watched(ready: Sequence[Ready]) -> Iterator[list[Seen]]:
    """Asks XLA, while it compiles, how every pinned value lies."""
    seen: list[Seen] = [defaultdict(list) for _ in ready]
    number = {id(r.sharded.traced.jaxpr): k for k, r in enumerate(ready)}

    def watched(jaxpr: Any, args: Any, place: Any, **options: Any) -> Any:
        found = seen[number[id(jaxpr)]]
        plan = ready[number[id(jaxpr)]].plan
        pinned = {(c.address, c.slot) for c in plan.constraints}

        def place_and_ask(address: str, slot: str, value: Any) -> Any:
            value = place(address, slot, value)
            # XLA lays out what has no elements as it likes.
            array = isinstance(value, jax.Array)
            if array and value.size and (address, slot) in pinned:
                here, rank = found[address, slot], value.ndim
                jax.debug.inspect_array_sharding(
                    value, callback=lambda sharding: here.append((sharding, rank))
                )
            return value

        return evaluate(jaxpr, args, place_and_ask, **options)

    with mock.patch("autoshard.lower.step.evaluate", watched):
        yield seen


def _check_pins(verdict: Verdict, ready: Ready, seen: Seen) -> None:
    for pin in ready.plan.constraints:
        planned = NamedSharding(ready.parallel.mesh, pin.spec.to_partition_spec())
        for found, rank in seen.get((pin.address, pin.slot), ()):
            verdict.pins += 1
            if not found.is_equivalent_to(planned, rank):
                verdict.failures.append(
                    f"{pin.address} {pin.slot} lies as {found}, planned {pin.spec}"
                )
