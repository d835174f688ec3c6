"""A training run given by its numbers: a model, a cluster, a layout and software.

What a plan decides for a decoder, as numbers: this is what a published row says of a
run and what the step model (`autoshard.cost.step`) predicts. Many runs are held as
arrays, so that one evaluation prices thousands of layouts, or thousands of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from autoshard.cost.decoder import Decoder
from autoshard.cost.network import Fabric
from autoshard.cost.software import SOFTWARE, Software
from autoshard.ir.errors import InputError
from autoshard.plan.cluster import Cluster

Vector = np.ndarray[Any, np.dtype[np.float64]]
Schedule = Literal["1f1b", "interleaved", "zb-h1", "zb-1p", "zb-2p"]


@dataclass(frozen=True, slots=True)
class Recompute:
    """Shares of a block's forward pass that the backward pass repeats.

    Attributes:
        qkv: Of the projections to queries, keys and values.
        out: Of attention's output projection.
        up: Of the MLP's products into its hidden width.
        down: Of the product out of it.
        attention: Of attention itself.
        traffic: Of point-by-point ops.
        collectives: Of the collectives in the forward pass.
        offloaded: Of these, what is kept in the host's memory.

    >>> Recompute.full().qkv
    1.0
    """

    qkv: float = 0.0
    out: float = 0.0
    up: float = 0.0
    down: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    collectives: float = 0.0
    offloaded: float = 0.0

    @classmethod
    def full(cls, replays_all: bool = True) -> Recompute:
        """Everything; without the last product where nobody needs its result."""
        last = 1.0 if replays_all else 0.0
        return cls(1.0, 1.0, 1.0, last, 1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is spread, as numbers.

    Attributes:
        data: Replicas of the data, those that shard state (FSDP, ZeRO) included.
        shard: Of these, over how many state is sharded; 1 where it is not.
        zero: What is sharded: nothing (0), optimizer state (1), gradients too (2),
            parameters too (3, FSDP).
        tensor: Ways of tensor parallelism.
        sequence: Whether the residual stream is sharded over them too.
        context: Ways that a sequence is cut.
        expert: Ways that experts are spread, within `data` and `tensor`.
        stage: Pipeline stages.
        virtual: Parts of a stage.
        schedule: Of the pipeline.
        microbatch: Sequences of one microbatch on one replica.
        microbatches: Of one step.
        recompute: What the backward pass repeats.
        capacity: Slots of an expert over tokens sent to it on average.
        frozen: Whether the base weights get no gradients (LoRA).

    Raises:
        InputError: A number is not positive, or they contradict each other.

    >>> Layout(data=8, microbatch=2).chips
    8
    """

    data: int = 1
    shard: int = 1
    zero: int = 0
    tensor: int = 1
    sequence: bool = False
    context: int = 1
    expert: int = 1
    stage: int = 1
    virtual: int = 1
    schedule: Schedule = "1f1b"
    microbatch: float = 1
    microbatches: float = 1
    recompute: Recompute = Recompute()
    capacity: float = 1.0
    frozen: bool = False

    def __post_init__(self) -> None:
        """Checks the numbers."""
        names = ("data", "shard", "tensor", "context", "expert", "stage", "virtual")
        for name in (*names, "microbatch", "microbatches", "capacity"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"a layout has {name} = {getattr(self, name)}; it must be positive"
                )
        if self.shard > self.data * self.context:
            raise InputError(
                f"a layout shards state {self.shard} ways and has only "
                f"{self.data * self.context} replicas"
            )
        if self.zero not in range(4):
            raise InputError(f"a layout has zero = {self.zero}; it is 0, 1, 2 or 3")

    @property
    def chips(self) -> int:
        """How many chips it takes."""
        return self.data * self.tensor * self.context * self.stage


@dataclass(frozen=True, slots=True)
class Run:
    """A model trained in a layout on a cluster by software.

    Attributes:
        decoder: The model.
        cluster: Where; its slices are joined over the data-center network.
        layout: How.
        seq: Positions of a sequence.
        software: What runs it.
        dtype: Of the products: "bf16", "f16", "f8", "f32".
        slices: TPU slices that the replicas are spread over.

    >>> from autoshard.plan.cluster import cluster
    >>> llama = Decoder(32, 4096, 32, 8, 128, 14336, 128256)
    >>> Run(llama, cluster("h100:8"), Layout(data=8, microbatch=1), 8192).tokens
    65536
    """

    decoder: Decoder
    cluster: Cluster
    layout: Layout
    seq: int
    software: Software = SOFTWARE["xla"]
    dtype: str = "bf16"
    slices: int = 1

    @property
    def tokens(self) -> float:
        """Positions of one step."""
        layout = self.layout
        return layout.data * layout.microbatch * layout.microbatches * self.seq


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs as arrays, an element each.

    Attributes:
        runs: What they were made of.
        size: float64[run] by name: the numbers of decoders and layouts.
        peak: FLOP/s of a chip in the run's dtype.
        peak_16: The same in 16 bits, in which attention is done.
        hbm: Bytes/s of a chip's memory.
        power: Share of the full part's power.
        torus: Whether the cluster is a torus of TPUs.
        dims: Dims of the torus; 1 elsewhere.
        node: Chips on one node's links.
        fabric: The network.
        generation: Of the chips.
    """

    runs: tuple[Run, ...]
    size: dict[str, Vector]
    peak: Vector
    peak_16: Vector
    hbm: Vector
    power: Vector
    torus: np.ndarray[Any, np.dtype[np.bool_]]
    dims: Vector
    node: Vector
    fabric: Fabric
    generation: np.ndarray[Any, Any]

    def __getattr__(self, name: str) -> Vector:
        """A number of all runs by its name in `Decoder`, `Layout` or `Recompute`."""
        try:
            return self.size[name]
        except KeyError:
            raise AttributeError(name) from None

    def __len__(self) -> int:
        return len(self.runs)

    def where(self, field: str, *values: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Runs whose software has one of some values of a field."""
        return np.array([getattr(r.software, field) in values for r in self.runs])

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Runs:
        """Gathers the numbers of runs.

        Raises:
            InputError: A chip has no peak for a run's dtype.
        """
        runs = tuple(runs)
        size: dict[str, Vector] = {}

        def take(name: str, values: list[Any]) -> None:
            size[name] = np.array([float(v) for v in values])

        numbers = [f.name for f in fields(Decoder)]
        numbers += ["attention_matmul_params", "matrices", "plain_params", "moe_share"]
        numbers += ["expert_params", "layer_params", "vocab_params", "params"]
        for name in numbers:
            take(name, [getattr(r.decoder, name) for r in runs])
        for f in fields(Layout):
            if f.name not in ("recompute", "schedule"):
                take(f.name, [getattr(r.layout, f.name) for r in runs])
        for f in fields(Recompute):
            values = [getattr(r.layout.recompute, f.name) for r in runs]
            take(f"again_{f.name}", values)
        take("seq", [r.seq for r in runs])
        take("slices", [r.slices for r in runs])
        stored = ("gradient_bytes", "param_bytes", "optimizer_bytes")
        for name in (*stored, "bucket_bytes", "flattens", "preallocates"):
            take(name, [getattr(r.software, name) for r in runs])
        take("chips", [r.layout.chips for r in runs])
        chips = [r.cluster.chip for r in runs]
        fabrics = [Fabric.of(r.cluster) for r in runs]
        names = [f.name for f in fields(Fabric) if f.name != "kind"]
        kind = "gpu"  # the torus is told apart by `torus`
        fabric = Fabric(
            kind, **{n: np.array([getattr(f, n) for f in fabrics]) for n in names}
        )
        return cls(
            runs=runs,
            size=size,
            peak=np.array([r.cluster.peak_flops_per_s(r.dtype) for r in runs]),
            peak_16=np.array([_peak_16(r) for r in runs]),
            hbm=np.array([c.hbm_bytes_per_s.value for c in chips]),
            power=np.array(
                [c.power_share.value if c.power_share else 1 for c in chips]
            ),
            torus=np.array([c.kind == "tpu" for c in chips]),
            dims=np.array([float(c.links[0].torus_dims or 1) for c in chips]),
            node=np.array([c.chips_per_node.value for c in chips]),
            fabric=fabric,
            generation=np.array([c.generation or "other" for c in chips]),
        )


def _peak_16(run: Run) -> float:
    if run.dtype in ("f8", "i8"):
        return run.cluster.peak_flops_per_s("bf16")
    return run.cluster.peak_flops_per_s(run.dtype)
