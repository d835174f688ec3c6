"""One training step of runs given by numbers: microbatches, stages, overlap, update.

    step = microbatches x slowest stage + bubble + exposed reduction + update

A stage of the pipeline repeats its layers forward and backward; what collectives do
not hide behind is part of a layer's time or a row of its own. Everything is an array
with one element per run, so many thousands are priced in one call.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from autoshard.cost.constants import Constants
from autoshard.cost.layer import (
    Layer,
    Transfers,
    collective_s,
    layer,
    placed,
    transfers,
)
from autoshard.cost.overlap import prefetched, trailing
from autoshard.cost.pipeline import bubble_share
from autoshard.cost.run import Runs, Vector

UPDATE_BYTES = 20
"""Bytes moved for each parameter that is updated: gradient, both moments of Adam in
float32 read and written, and the weight."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step, per run, by what they are spent on.

    The rows add up to `step_s`.

    Attributes:
        products: Matrix products, with what is recomputed of them.
        attention: Attention, likewise.
        traffic: Point-by-point ops, likewise.
        head: Output projection and loss.
        host: Waiting for the host to launch.
        collectives: Of tensor, expert and context parallelism, and gathers of sharded
            parameters, as far as they show.
        pipeline: Transfers between stages, as far as they show, and waiting for the
            slowest stage.
        bubble: Filling and draining of the pipeline.
        reduction: Sums of gradients over replicas, as far as they show.
        update: The optimizer, and accumulating gradients.
        fixed: What no other row has.
    """

    products: Vector
    attention: Vector
    traffic: Vector
    head: Vector
    host: Vector
    collectives: Vector
    pipeline: Vector
    bubble: Vector
    reduction: Vector
    update: Vector
    fixed: Vector

    @property
    def step_s(self) -> Vector:
        """Seconds of the step."""
        return sum((getattr(self, f.name) for f in fields(self)), np.zeros(1))


def predict(runs: Runs, constants: Constants | None = None) -> StepTime:
    """Predicts the step time of runs.

    Args:
        runs: What is run, where, how and by what.
        constants: Of the cost model, by default as fitted to published runs.

    Returns:
        Seconds per run, by what they are spent on.

    >>> from autoshard.cost.decoder import Decoder
    >>> from autoshard.cost.run import Layout, Run
    >>> from autoshard.plan.cluster import cluster
    >>> llama = Decoder(32, 4096, 32, 8, 128, 14336, 128256)
    >>> layout = Layout(data=8, shard=8, zero=3, microbatch=2)
    >>> time = predict(Runs.of([Run(llama, cluster("h100:8"), layout, 4096)]))
    >>> bool(0.5 < time.step_s[0] < 2.0)
    True
    """
    constants = constants or Constants.shipped()
    part = layer(runs, constants)
    moved = transfers(runs, constants, part)
    forward, backward = _passes(runs, constants, part, moved)
    counts = runs.microbatches
    layers = runs.layers / runs.stage
    head = part.head / runs.stage
    # The host runs ahead while the head's large kernels keep the chip busy.
    busy = layers * (forward.busy + backward.busy) + head
    host = np.maximum(3 * layers * _launch_s(runs, constants) - busy, 0.0)
    each = forward.busy + backward.busy + host / layers
    stage = _stages(runs, each, part.head)
    # Every stage's average share of the layers and of the head, and the rest, which is
    # waiting for the slowest.
    waiting = np.maximum(stage - layers * each - head, 0.0)
    waiting = np.where(runs.stage > 1, waiting, 0.0)
    sent = _sent(runs, constants, part)
    bubble = _bubble(runs, constants, stage, layers * each + head)
    back = layers * backward.busy + host * 2 / 3
    own = layers * part.params + runs.vocab * runs.embed / runs.tensor * np.where(
        runs.stage > 1, 1.0, np.where(runs.tied > 0, 1.0, 2.0)
    )
    # Experts are spread over replicas: fewer hold, sum and update each of them.
    experts = runs.moe_share * runs.expert_params / runs.expert / runs.tensor
    experts = np.where(runs.frozen > 0, 0.0, layers * experts)
    own = np.where(runs.frozen > 0, 0.0, own)
    reduction = _reduction(runs, constants, own, experts, back) + _sharded_replicas(
        runs, constants, part, back
    )
    return StepTime(
        products=counts * layers * (forward.products + backward.products),
        attention=counts * layers * (forward.attention + backward.attention),
        traffic=counts * layers * (forward.traffic + backward.traffic),
        head=counts * head,
        host=counts * host,
        collectives=counts * layers * (forward.exposed + backward.exposed),
        pipeline=counts * (waiting + sent),
        bubble=bubble,
        reduction=reduction,
        update=_update(runs, constants, part, own, experts),
        fixed=np.full(len(runs), constants["step.fixed_s"]),
    )


@dataclass(frozen=True, slots=True)
class _Pass:
    """Seconds of one pass of a layer, and what they are made of."""

    products: Vector
    attention: Vector
    traffic: Vector
    exposed: Vector

    @property
    def busy(self) -> Vector:
        return self.products + self.attention + self.traffic + self.exposed


def _launch_s(runs: Runs, constants: Constants) -> Vector:
    """Seconds of the host for one layer's forward pass; twice that for its backward."""
    share = np.select(
        [runs.where("launch", "all"), runs.where("launch", "half")],
        [1.0, constants["host.fused_share"]],
        0.0,
    )
    return share * constants["host.layer_s"]


def _passes(
    runs: Runs, constants: Constants, part: Layer, moved: Transfers
) -> tuple[_Pass, _Pass]:
    """The forward and the backward pass of a layer."""
    show = np.where(
        runs.torus,
        constants["gather.interference_tpu"],
        np.where(
            runs.where("gathers", "on demand"), 1.0, constants["gather.interference"]
        ),
    )

    def one(
        products: Vector, attention: Vector, traffic: Vector, collectives: Vector,
        gather: Vector,
    ) -> _Pass:  # fmt: skip
        work = products + attention + traffic + collectives
        # The next layer's parameters are gathered while this one computes.
        shown = prefetched(gather, work, show)
        return _Pass(products, attention, traffic, collectives + shown)

    around = moved.tensor + moved.expert
    forward = one(
        part.products,
        part.attention,
        part.traffic,
        around + moved.context,
        moved.gather,
    )
    again = (
        runs.again_qkv * part.qkv
        + runs.again_out * part.out
        + runs.again_up * part.up
        + runs.again_down * part.down
    )
    # Frozen weights need no gradients of their own.
    gradients = np.where(runs.frozen > 0, 1.0, 2.0)
    backward = one(
        gradients * part.products + again,
        (part.attention_back + runs.again_attention) * part.attention,
        (2.0 + runs.again_traffic) * part.traffic,
        (1.0 + runs.again_collectives) * around + 2.0 * moved.context,
        # Gathered once more, and the gradients scattered, where there are any.
        np.where(runs.zero == 3, gradients, 0.0) * moved.gather,
    )
    return forward, backward


def _stages(runs: Runs, each: Vector, head: Vector) -> Vector:
    """Seconds of the slowest stage for one microbatch, both passes."""
    even = np.floor(runs.layers / runs.stage) * runs.stage == runs.layers
    mean = (runs.layers * each + head) / runs.stage
    # Where layers do not divide, the embedding and the head are given a layer's place.
    rows = np.ceil((runs.layers + 2) / runs.stage)
    uneven = np.maximum(rows * each, (rows - 1) * each + head)
    by_layers = np.where(even, runs.layers / runs.stage * each + head, uneven)
    balanced = np.maximum(np.maximum(mean, head), each)
    split = np.where(runs.where("stages", "balanced"), balanced, by_layers)
    return np.where(runs.stage > 1, split, runs.layers * each + head)


def _bubble(runs: Runs, constants: Constants, stage: Vector, mean: Vector) -> Vector:
    """Seconds in which the slowest stage waits for the pipeline to fill and drain.

    Args:
        runs: What is run.
        constants: Of the cost model.
        stage: Seconds of the slowest stage for one microbatch.
        mean: Seconds of the average stage.
    """
    schedule = np.array([r.layout.schedule for r in runs.runs])
    zero_bubble = constants["pipeline.zero_bubble"]
    share = bubble_share(schedule, runs.stage, runs.microbatches, zero_bubble)
    waited = np.maximum(runs.stage * mean - stage, 0.0)
    return share * waited / runs.virtual


def _sent(runs: Runs, constants: Constants, part: Layer) -> Vector:
    """Seconds of transfers to and from the next stage that show, per microbatch."""
    whole = np.where(runs.sequence > 0, runs.tensor, 1.0)
    fabric = runs.fabric
    crossing = runs.chips > runs.node
    far = fabric.outer_bytes_per_s * fabric.outer_efficiency
    near = fabric.inner_bytes_per_s * fabric.inner_efficiency
    time = 4 * part.tokens * runs.embed / whole / np.where(crossing, far, near)
    shown = time * constants["network.point_to_point"] * runs.virtual
    return np.where(runs.stage > 1, shown, 0.0)


def _reduction(
    runs: Runs, constants: Constants, own: Vector, experts: Vector, back: Vector
) -> Vector:
    """Exposed seconds of summing gradients over replicas that hold whole parameters."""
    # Slices of TPUs are summed over another network; see `_sharded_replicas`.
    replicas = np.maximum(runs.data * runs.context / runs.slices, 1.0)
    alike = np.maximum(replicas / runs.expert, 1.0)
    everyone = placed(runs, replicas, runs.tensor)
    some = placed(runs, alike, runs.tensor * runs.expert)
    launches = np.where(
        runs.where("reduction", "overlapped by layer"),
        # Buckets of all-reduced gradients hold about two layers.
        constants["data.ops_per_layer"]
        * runs.layers
        * np.where(runs.zero > 0, 1.0, 0.5),
        1.0,
    )

    def time(kind: str, each: Vector | float) -> Vector:
        def among(count: Vector, group: tuple[Vector, Vector]) -> Vector:
            bytes_ = count * each
            return collective_s(runs, constants, kind, bytes_, *group, launches)

        return among(own - experts, everyone) + np.where(
            experts > 0, among(experts, some), 0.0
        )

    scatter = time("reduce_scatter", runs.gradient_bytes)
    # All replicas sum by a ring; sharded ones gather what they updated, in 16 bits.
    both = np.where(runs.zero > 0, scatter + time("all_gather", 2.0), 2.0 * scatter)
    hidden = constants["data.hidden"] * back
    shown = trailing(both, hidden, constants["data.exposed"])
    bucketed = trailing(both, hidden, constants["data.exposed_buckets"])
    by_layer = np.where(runs.zero > 0, both, shown)
    torus = trailing(both, hidden, constants["gather.interference_tpu"])
    exposed = np.select(
        [
            runs.torus,
            runs.where("reduction", "at the end"),
            runs.where("reduction", "overlapped by layer"),
            runs.where("reduction", "overlapped in buckets"),
        ],
        [torus, both, by_layer, bucketed],
        shown,
    )
    one_by_one = runs.where("update", "broadcast") & (runs.shard > runs.node)
    sent = np.where(one_by_one, constants["data.broadcast_s"] * runs.shard, 0.0)
    whole = (runs.zero < 3) & (replicas > 1)
    return np.where(whole, exposed + sent, 0.0)


def _sharded_replicas(
    runs: Runs, constants: Constants, part: Layer, back: Vector
) -> Vector:
    """The same where parameters are sharded in groups: sums between the groups."""
    groups = runs.data * runs.context / runs.shard / runs.slices
    groups = np.maximum(groups, 1.0)
    inside, outside = placed(runs, groups, runs.tensor * runs.shard)
    trained = np.where(runs.frozen > 0, 0.0, runs.layers)
    held = trained / runs.stage * part.params / runs.shard
    between = 2.0 * collective_s(
        runs, constants, "reduce_scatter", 4.0 * held, inside, outside
    )
    least = np.where(
        runs.torus, constants["gather.interference_tpu"], constants["data.exposed"]
    )
    shown = np.where((runs.zero == 3) & (groups > 1), least * between, 0.0)
    # Slices of a TPU sum over the data-center network, 2 bytes both ways.
    rate = runs.fabric.outer_bytes_per_s * constants["network.dcn"]
    slices = 4.0 * trained * runs.layer_params / runs.shard / runs.tensor / rate
    late = np.maximum(slices - 0.5 * back, 0.0) + 0.1 * slices
    return shown + np.where(runs.torus & (runs.slices > 1), late, 0.0)


def _update(
    runs: Runs, constants: Constants, part: Layer, own: Vector, experts: Vector
) -> Vector:
    """Seconds of the optimizer, and of adding up microbatches' gradients."""
    passes = np.where(
        runs.where("optimizer", "eager"),
        constants["optimizer.eager"],
        constants["optimizer.fused"],
    )
    ways = np.where(runs.zero > 0, runs.shard, 1.0)
    updated = (own - experts) / ways + experts / np.maximum(ways / runs.expert, 1.0)
    update = passes * UPDATE_BYTES * updated / runs.hbm
    # A float32 sum: read, and written, and the gradient read where it is not fused.
    added = np.where(runs.where("fusion", "eager"), 12.0, 8.0)
    added = np.where((runs.gradient_bytes == 4) & ~runs.torus, added, 0.0)
    added = np.where(runs.where("fusion", "compiler"), 0.0, added)
    local = runs.layers * part.params / runs.stage
    local = local + runs.vocab * runs.embed / runs.tensor
    times = np.where(runs.microbatches > 1, runs.microbatches, 0.0)
    added = np.where(runs.frozen > 0, 0.0, added)
    return update + times * added * local / runs.hbm
