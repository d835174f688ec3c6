"""The time of a step that a plan spreads against one that was spread by hand.

By hand is what a Flax user would write without autoshard: `nnx.split`, `nnx.merge`,
`jax.value_and_grad` and optax in one function, under `jax.jit` with the plan's own
input and output shardings and a donated state. Under dp and megatron-tp nothing else
is needed. Under fsdp the partitioner, left alone, moves the activations and not the
weights, which is slower, so there the person writes what is usual for FSDP:
`with_sharding_constraint` on the residual stream around each layer, and on the
weights of the layer, to gather them where they are used. Models, optimizer, initial
state, batch, mesh and devices are the same on both sides.

Steps are taken in blocks, planned, hand, hand, planned, so that a slow drift of the
machine falls on both alike. Bar: the median over the cases of the ratio of the median
step times is at most 1.02.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import _record
import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from autoshard import api, models

BAR = 1.02
MODELS = ("llama3-tiny", "gpt2-tiny")
MESHES = {
    "dp": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "megatron-tp": {"data": 2, "tensor": 4},
}
BATCH, SEQ, LEARNING_RATE = 16, 128, 1e-3
BLOCK_STEPS, ROUNDS = 4, 6  # a round is two blocks of each kind
COMPILES = 2  # of each kind, also in the order planned, hand, hand, planned
SAME = 1e-4  # relative; how far apart the losses may be after the first block


class HandState(NamedTuple):
    """The fields of `autoshard.TrainState`, in the same order."""

    step: Any
    params: Any
    opt_state: Any
    rest: Any


class Side(NamedTuple):
    """One of the two contestants, compiled."""

    run: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    compiled: Any


def config_of(name: str) -> models.DecoderConfig:
    """A model of the zoo in float32, its layers in a loop."""
    return dataclasses.replace(
        models.get(name), dtype="float32", param_dtype="float32", scan_layers=True
    )


class HandFsdp(models.Decoder):
    """The decoder with the constraints that a person writes for FSDP."""

    def __init__(
        self, config: models.DecoderConfig, mesh: Mesh, *, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, rngs=rngs)
        self.mesh = mesh

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Gathers the weights outside of the layers, too."""
        for name in ("embedding", "positions", "head"):
            weight = getattr(self, name)
            if weight is not None:
                weight[...] = self._whole(weight[...])
        return super().__call__(tokens)

    def _whole(self, weight: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(
            weight, NamedSharding(self.mesh, PartitionSpec())
        )

    def _by_batch(self, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, PartitionSpec("fsdp"))
        )

    def _run_blocks(self, x: jax.Array, rotation: Any) -> jax.Array:
        graph, stacked = nnx.split(self.blocks)

        def step(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            block = nnx.merge(graph, jax.tree.map(self._whole, layer))
            return self._by_batch(block(x, rotation)), None

        return jax.lax.scan(step, self._by_batch(x), stacked)[0]


def search(name: str, strategy: str) -> tuple[api.TrainStep, api.Plan]:
    """The step, and its plan with this benchmark's mesh and no accumulation."""
    policy = api.load_strategy(strategy)
    schedule = {"microbatches": 1, "remat": "none"}
    policy = policy.model_copy(
        update={
            "mesh": {**policy.mesh, **MESHES[strategy]},
            "schedule": policy.schedule.model_copy(update=schedule),
        }
    )
    config = config_of(name)
    step = api.train_step(
        models.next_token_loss,
        optax.adamw(LEARNING_RATE),
        model=lambda rngs: models.build(config, rngs),
    )
    batch = api.token_batch(BATCH, SEQ)
    return step, api.search(step, batch, cluster="cpu:8", strategy=policy)


def planned(step: api.TrainStep, plan: api.Plan) -> tuple[Any, Any, float]:
    """`parallelize` and compile: the step, what was compiled, and how long it took."""
    start_s = time.perf_counter()
    parallel = api.parallelize(step, plan)
    compiled = parallel.jitted.lower(
        parallel.abstract_state, parallel.abstract_batch
    ).compile()
    return parallel, compiled, time.perf_counter() - start_s


def by_hand(
    name: str, strategy: str, mesh: Mesh, shardings: tuple[Any, Any, Any]
) -> tuple[Any, Any, Any, float]:
    """The same step written by hand: jitted, its state, compiled, and how long.

    Args:
        name: The model.
        strategy: The strategy, of which fsdp needs constraints.
        mesh: Devices by axis.
        shardings: Of the leaves of the state, of the batch, and of the metrics.
    """
    optimizer, config = optax.adamw(LEARNING_RATE), config_of(name)

    def build() -> models.Decoder:
        if strategy == "fsdp":
            return HandFsdp(config, mesh, rngs=nnx.Rngs(0))
        return models.Decoder(config, rngs=nnx.Rngs(0))

    state_leaves, of_batch, of_metrics = shardings
    start_s = time.perf_counter()
    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(build)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    state = HandState(
        jax.ShapeDtypeStruct((), np.int32),
        params,
        jax.eval_shape(optimizer.init, params),
        rest,
    )

    def step(state: HandState, batch: Any) -> tuple[HandState, dict[str, Any]]:
        def loss_fn(params: Any) -> tuple[Any, Any]:
            module = nnx.merge(graph, params, state.rest)
            loss = models.next_token_loss(module, batch)
            return loss, nnx.split(module, nnx.Param, ...)[2]

        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return HandState(state.step + 1, params, opt_state, rest), metrics

    of_state = jax.tree.unflatten(jax.tree.structure(state), state_leaves)
    jitted = jax.jit(
        step,
        in_shardings=(of_state, of_batch),
        out_shardings=(of_state, of_metrics),
        donate_argnums=0,
    )
    compiled = jitted.lower(state, api.token_batch(BATCH, SEQ)).compile()
    return jitted, state, compiled, time.perf_counter() - start_s


def prepare(name: str, strategy: str) -> tuple[Side, Side, Any, dict[str, Any]]:
    """Both sides, a batch on the devices, and how long each side took to compile."""
    step, plan = search(name, strategy)
    parallel, _, _ = planned(step, plan)  # for its mesh and shardings
    mesh = parallel.mesh
    shardings = (
        jax.tree.leaves(parallel.state_shardings),
        parallel.batch_shardings,
        parallel.out_shardings[1],
    )
    times: dict[str, list[float]] = {"planned": [], "hand": []}
    sides: dict[str, Any] = {}
    for k in range(2 * COMPILES):
        kind = ("planned", "hand", "hand", "planned")[k % 4]
        jax.clear_caches()  # or the second compilation would be found in memory
        if kind == "planned":
            *sides[kind], seconds = planned(step, plan)
        else:
            *sides[kind], seconds = by_hand(name, strategy, mesh, shardings)
        times[kind].append(seconds)
    parallel, parallel_compiled = sides["planned"]
    jitted, like, hand_compiled = sides["hand"]
    state = parallel.init(0)
    leaves = jax.tree.leaves(state)
    for mine, theirs in zip(leaves, jax.tree.leaves(like), strict=True):
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            raise RuntimeError(
                f"{name}: the two states differ: {mine.shape} {mine.dtype} in the plan "
                f"and {theirs.shape} {theirs.dtype} by hand"
            )
    # Both donate their state, so neither may hold the other's arrays.
    copies = [jax.device_put(np.array(x), x.sharding) for x in leaves]
    hand_state = jax.tree.unflatten(jax.tree.structure(like), copies)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (BATCH, SEQ + 1)).astype(np.int32)
    batch = jax.device_put(
        {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, parallel.batch_shardings
    )
    compile_s = {kind: statistics.median(found) for kind, found in times.items()}
    return (
        Side(parallel, state, parallel_compiled),
        Side(jitted, hand_state, hand_compiled),
        batch,
        compile_s,
    )


def block(side: Side, batch: Any, durations_s: list[float]) -> tuple[Side, float]:
    """Takes some steps, each waited for and timed; the new state and the last loss."""
    run, state, compiled = side
    metrics = None
    for _ in range(BLOCK_STEPS):
        start_s = time.perf_counter()
        state, metrics = run(state, batch)
        jax.block_until_ready((state, metrics))
        durations_s.append(time.perf_counter() - start_s)
    assert metrics is not None
    return Side(run, state, compiled), float(metrics["loss"])


def collectives(compiled: Any) -> dict[str, int]:
    """How many collectives of each kind are in a compiled program."""
    text = compiled.as_text()
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    kinds += ("reduce-scatter",)
    found = {kind: text.count(f" {kind}(") for kind in kinds}
    return {kind: count for kind, count in found.items() if count}


def measure(name: str, strategy: str) -> dict[str, Any]:
    """One case."""
    ours, hand, batch, compile_s = prepare(name, strategy)
    # Compared here and not at the end: rounding grows with the steps on one batch.
    ours, loss = block(ours, batch, [])
    hand, hand_loss = block(hand, batch, [])
    if not abs(loss - hand_loss) <= SAME * abs(hand_loss):
        raise RuntimeError(
            f"{name} under {strategy}: after the same {BLOCK_STEPS} steps the loss is "
            f"{loss} by the plan and {hand_loss} by hand, so these are not the same "
            "program"
        )
    ours_s: list[float] = []
    hand_s: list[float] = []
    by_round = []
    gc.collect()
    gc.disable()  # a collection would fall on whichever side is running
    try:
        for _ in range(ROUNDS):
            ours_round_s: list[float] = []
            hand_round_s: list[float] = []
            ours, _ = block(ours, batch, ours_round_s)
            hand, _ = block(hand, batch, hand_round_s)
            hand, _ = block(hand, batch, hand_round_s)
            ours, _ = block(ours, batch, ours_round_s)
            by_round.append(
                statistics.median(ours_round_s) / statistics.median(hand_round_s)
            )
            ours_s += ours_round_s
            hand_s += hand_round_s
    finally:
        gc.enable()
    planned_s, by_hand_s = statistics.median(ours_s), statistics.median(hand_s)
    return {
        "model": name,
        "strategy": strategy,
        "mesh": MESHES[strategy],
        "timed_steps_of_each": len(ours_s),
        "planned_step_s": planned_s,
        "hand_step_s": by_hand_s,
        "ratio": planned_s / by_hand_s,
        "ratio_by_round": by_round,
        "planned_compile_s": compile_s["planned"],
        "hand_compile_s": compile_s["hand"],
        "planned_collectives": collectives(ours.compiled),
        "hand_collectives": collectives(hand.compiled),
        "loss_after_warm_up": {"planned": loss, "hand": hand_loss},
    }


def main() -> int:
    """Measures every case; 1 when the bar is missed."""
    options, start = _record.arguments(__doc__ or ""), _record.begin()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    cases = []
    for name in MODELS:
        for strategy in MESHES:
            cases.append(measure(name, strategy))
            print(f"{name} {strategy}: {cases[-1]['ratio']:.3f}", file=sys.stderr)
    overall = statistics.median(case["ratio"] for case in cases)
    compile_ratio = statistics.median(
        case["planned_compile_s"] / case["hand_compile_s"] for case in cases
    )
    headers = ("model", "strategy", "planned ms", "by hand ms", "ratio", "rounds")
    headers += ("compile s", "by hand s")
    _record.table(
        headers,
        [
            (
                case["model"],
                case["strategy"],
                f"{case['planned_step_s'] * 1e3:.1f}",
                f"{case['hand_step_s'] * 1e3:.1f}",
                f"{case['ratio']:.3f}",
                f"{min(case['ratio_by_round']):.2f}-{max(case['ratio_by_round']):.2f}",
                f"{case['planned_compile_s']:.2f}",
                f"{case['hand_compile_s']:.2f}",
            )
            for case in cases
        ],
    )
    print(f"overall: {overall:.3f} (bar {BAR}); compilation: {compile_ratio:.2f}")
    _record.write(
        options.into,
        "overhead",
        what=(__doc__ or "").strip(),
        command="python benchmarks/bench_overhead.py",
        figures={
            "bar": BAR,
            "median_ratio": overall,
            "median_compile_ratio": compile_ratio,
            "batch": BATCH,
            "seq": SEQ,
            "dtype": "float32",
            "optimizer": f"adamw, learning rate {LEARNING_RATE}",
            "devices": "8 virtual CPU devices of one process",
            "cases": cases,
        },
        passed=overall <= BAR,
        start=start,
    )
    return int(overall > BAR)


if __name__ == "__main__":
    sys.exit(main())
