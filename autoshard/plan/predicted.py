"""What the cost model predicts of a plan, and how good the search says it is."""

from __future__ import annotations

from autoshard.plan.base import Record

Axes = tuple[str, ...]


class Collective(Record):
    """A planned collective.

    Attributes:
        kind: `all_gather`, `all_reduce`, `reduce_scatter`, `all_to_all` or `permute`.
        axes: Mesh axes it runs over.
        bytes_: Bytes of the larger of input and output on one device, one run.
        count: Runs per step.
        time_s: Predicted seconds per step, all runs.
        source: The user's source line.
        address: Address of the op that needs it.
        value: What is communicated: a parameter's path, or the op's name.
    """

    kind: str
    axes: Axes
    bytes_: int
    count: int
    time_s: float
    source: str
    address: str
    value: str


class HostTable(Record):
    """Predicted bytes per device in the host's memory, by what they hold.

    Of activations all that are kept at once, those of waiting microbatches included.
    """

    params: int
    optimizer: int
    activations: int
    total: int
    capacity: int


class MemoryTable(Record):
    """Predicted bytes per device at the peak of the step, by what they hold.

    `host` is what is in the host's memory beside that, None where nothing is.
    """

    params: int
    gradients: int
    optimizer: int
    activations: int
    other: int
    total: int
    capacity: int
    host: HostTable | None = None


class Estimate(Record):
    """What the cost model predicts for one step.

    Attributes:
        step_s: Seconds per step.
        matmul_s: Of these, in matrix products.
        memory_bound_s: In everything else a chip computes.
        collective_s: In collectives, as far as computation does not hide them.
        bubble_s: In which the slowest stage of a pipeline waits for the others.
        transfer_s: In transfers between stages, as far as they show.
        host_s: In transfers to and from the host, as far as they show.
        hidden_s: In collectives beside computation; no part of `step_s`.
        counted_compute_s: In all that is not a collective, at the rates by which the
            chip's own compiler estimates it; no part of `step_s`, None where these are
            not known.
        model_flops: FLOPs of forward and backward, recomputation not counted.
        mfu: `model_flops / (step_s * chips * peak)`.
        tokens_per_s: Batch positions per second, when the batch holds token ids.
        memory: Bytes at the peak.
        collectives: Every planned collective.
    """

    step_s: float
    matmul_s: float
    memory_bound_s: float
    collective_s: float
    bubble_s: float = 0.0
    transfer_s: float = 0.0
    host_s: float = 0.0
    hidden_s: float = 0.0
    counted_compute_s: float | None = None
    model_flops: float
    mfu: float
    tokens_per_s: float
    memory: MemoryTable
    collectives: tuple[Collective, ...]


class Certificate(Record):
    """How good the plan is, within the space and the cost model that were used.

    Candidates with accumulation are ranked by a price scaled from the program without
    it; only the plan that is written is traced and priced with its accumulation.

    Attributes:
        lower_bound_s: No candidate of the space is predicted faster.
        gap: `step_s / lower_bound_s - 1`.
        enumerated: Candidates priced.
        indivisible: Candidates left out because a dim does not divide.
        infeasible: Candidates that do not fit in memory.
        alike: Candidates left out because another one is the same plan: they differ
            only along axes of one device.
        pruned: Candidates not priced, as a bound on their time shows that they are not
            the best.
        left: Structures (rules, storage, remat) that a time limit or an interruption
            left unpriced.
        complete: Whether every candidate of the space was priced or ruled out.
    """

    lower_bound_s: float
    gap: float
    enumerated: int
    indivisible: int
    infeasible: int
    alike: int = 0
    pruned: int = 0
    left: int = 0
    complete: bool
