"""The estimate of one plan, with every collective and the memory table spelled out."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from autoshard.cost.collectives import Meshes, Vector
from autoshard.cost.compute import product_dtype
from autoshard.cost.constants import Constants
from autoshard.cost.offload import Offload, host_bytes, host_room_bytes
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.price import MEMORY_HEADROOM, Pricer
from autoshard.cost.prices import Prices
from autoshard.cost.rates import Rates
from autoshard.cost.stages import STAGE, waiting
from autoshard.cost.work import Work
from autoshard.ir.mesh import AXES, arranged
from autoshard.ir.program import Program
from autoshard.ir.trace import Traced
from autoshard.plan.cluster import Cluster
from autoshard.plan.schema import Collective, Estimate, HostTable, MemoryTable
from autoshard.plan.sharded import OUTPUT, DimClasses
from autoshard.plan.strategy import OFFLOADABLE


def model_flops(work: Work, classes: DimClasses) -> float:
    """FLOPs of the matrix products of one call, counted on one device.

    Trace without rematerialisation, so that nothing is counted twice.
    """
    return sum(
        runs * flops
        for runs, flops, rule in zip(work.runs, work.flops, classes.rules, strict=True)
        if rule.op_kind == "matmul"
    )


def fastest_s(
    program: Program,
    classes: DimClasses,
    work: Work,
    cluster: Cluster,
    constants: Constants | None = None,
) -> float:
    """Seconds that no way of spreading a program over a cluster can stay below.

    All chips are busy with nothing but its matrix products, none of them twice, at the
    rate of the best shapes.
    """
    share = Rates.of(cluster, constants or Constants.shipped()).product_share
    total_s = 0.0
    for op, rule in zip(program.ops, classes.rules, strict=True):
        if rule.op_kind == "matmul":
            flops = work.runs[op.index] * work.flops[op.index]
            total_s += flops / cluster.peak_flops_per_s(product_dtype(program, op))
    return total_s / (share * cluster.num_chips)


def tokens_per_step(traced: Traced) -> int:
    """Batch positions of one step: batch times sequence where there are token ids."""
    best = 0
    for info in traced.inputs:
        if info.state == "data" and info.shape:
            size = info.shape[0]
            if len(info.logical) > 1 and info.logical[1] == "seq":
                size *= info.shape[1]
            best = max(best, size)
    return best


def matmul_dtype(program: Program, classes: DimClasses, work: Work) -> str:
    """The dtype in which most of the products' FLOPs are done."""
    share: dict[str, float] = defaultdict(float)
    for op, rule in zip(program.ops, classes.rules, strict=True):
        if rule.op_kind == "matmul":
            dtype = product_dtype(program, op)
            share[dtype] += work.runs[op.index] * work.flops[op.index]
    return max(share, key=lambda d: share[d]) if share else "float32"


def estimate(
    pricer: Pricer,
    cluster: Cluster,
    sizes: dict[str, int],
    flops: float,
    whole: Pricer | None = None,
    pipeline: Pipeline | None = None,
    microbatches: int = 1,
    order: tuple[str, ...] = (),
    offload: Offload = (),
) -> Estimate:
    """Prices one plan in full.

    Args:
        pricer: The program as it will run, remat included, and microbatches too where
            there is one stage.
        cluster: Where it runs.
        sizes: Size per mesh axis.
        flops: Model FLOPs of one step, see `model_flops`.
        whole: Of the program with all copies of its blocks, if `pricer` is of one
            without most of them: its collectives are the ones spelled out.
        pipeline: How stages take turns, where there are several.
        microbatches: Of a step, where the program is traced without them.
        order: Of the axes, as in `Strategy`.
        offload: What is kept in the host's memory.

    Returns:
        The estimate. Of a pipeline times and memory are those of the slowest stage and
        of the fullest one, and collectives those of the slowest.
    """
    row = np.array([[sizes.get(axis, 1) for axis in AXES]], dtype=np.int64)
    orders = np.array([[AXES.index(axis) for axis in arranged(order)]])
    meshes, cuts = Meshes(cluster, row, orders), np.full(1, float(microbatches))
    active = frozenset(axis for axis, n in sizes.items() if n > 1)
    whole, pricer = (whole or pricer).on(active), pricer.on(active)
    counted_s = None
    if pipeline:
        (prices,) = pricer.price_stages(
            cluster, row, cuts, [pipeline], orders=orders, offload=offload
        )
        memory, hosts = _fullest(pricer, prices, meshes, cuts)
    else:
        prices = pricer.price(cluster, row, cuts, orders=orders, offload=offload)
        held = {kind: pricer.liveness.held(kind, meshes, cuts) for kind in offload}
        _, memory = pricer.liveness.memory(meshes, cuts, held=held)
        hosts = host_bytes(held)
        if Rates.counted(cluster):
            counted = pricer.timing.compute_s(meshes, cuts, Rates.compiler(cluster))
            counted_s = float(sum(part[0] for part in counted))
    step_s = float(prices.step_s[0])
    dtype = matmul_dtype(pricer.program, pricer.sharded.classes, pricer.work)
    peak = cluster.peak_flops_per_s(dtype) * cluster.num_chips
    held = {kind: round(float(size[0])) for kind, size in memory.items()}
    total = sum(held.values())
    return Estimate(
        step_s=step_s,
        matmul_s=float(prices.matmul_s[0]),
        memory_bound_s=float(prices.other_s[0]),
        collective_s=float(prices.collective_s[0]),
        bubble_s=float(np.sum(prices.bubble_s)),
        transfer_s=float(np.sum(prices.sent_s)),
        host_s=float(np.sum(prices.host_s)),
        hidden_s=float(prices.hidden_s[0]),
        counted_compute_s=counted_s,
        model_flops=flops,
        mfu=flops / (step_s * peak) if step_s else 0.0,
        tokens_per_s=(
            tokens_per_step(pricer.sharded.traced) / step_s if step_s else 0.0
        ),
        memory=MemoryTable(
            params=held.get("params", 0),
            gradients=held.get("gradients", 0),
            optimizer=held.get("optimizer", 0),
            activations=held.get("activations", 0),
            other=held.get("other", 0) + held.get("data", 0),
            total=total,
            capacity=round(cluster.hbm_bytes * MEMORY_HEADROOM),
            host=_on_host(hosts, cluster) if offload else None,
        ),
        collectives=tuple(_collectives(whole, meshes, cuts, prices)),
    )


def _fullest(
    pricer: Pricer, prices: Prices, meshes: Meshes, cuts: Vector
) -> tuple[dict[str, Vector], dict[str, Vector]]:
    """Memory of the stage that needs the most of a chip, and of the host, by kind."""
    assert prices.cut is not None
    tables, hosts = [], []
    held = {k: pricer.liveness.held(k, meshes, cuts) for k in prices.offload}
    for stage in prices.cut.stages:
        if stage.exists[0]:
            how, counts = prices.cut.pipeline, meshes.product(STAGE)
            later = waiting(how, stage.at, counts, cuts)
            chips = (meshes, cuts, stage.share, later, held)
            peak, table = pricer.liveness.memory(*chips)
            tables.append((float(peak[0]), table))
            host = host_bytes(held, stage.share, later)
            hosts.append((float(sum(v[0] for v in host.values())), host))
    return max(tables, key=_first)[1], max(hosts, key=_first)[1]


def _first(pair: tuple[float, dict[str, Vector]]) -> float:
    return pair[0]


def _on_host(held: dict[str, Vector], cluster: Cluster) -> HostTable:
    sizes = {
        kind: round(float(held[kind][0])) if kind in held else 0 for kind in OFFLOADABLE
    }
    return HostTable(
        **sizes, total=sum(sizes.values()), capacity=round(host_room_bytes(cluster))
    )


def _collectives(
    pricer: Pricer, meshes: Meshes, cuts: Vector, prices: Prices
) -> list[Collective]:
    segments = pricer.work.segments
    share = prices.slowest_share
    program, traced = pricer.program, pricer.sharded.traced
    paths = dict(zip(program.inputs, (i.path for i in traced.inputs), strict=True))
    names = _descendants(pricer, paths)
    found = []
    for index, reshard in enumerate(pricer.moved.moves):
        op = program.ops[reshard.op] if reshard.op != OUTPUT else None
        place = segments.of_op[op.index] if op else segments.of_value[reshard.value]
        part = float(share[place, 0]) if share is not None else 1.0
        for step, time, size, runs in pricer.moved.collective(index, meshes, cuts):
            axes = tuple(a for a in step.axes if meshes.product(frozenset([a]))[0] > 1)
            if not axes or step.kind == "slice" or not part * runs[0]:
                continue
            value = names.get(reshard.value)
            if value is None and op is not None:
                value = f"{op.primitive} {reshard.slot}"
            if op is None:
                source = traced.out_source[int(reshard.slot[3:])]
                value = traced.inputs[source].path
            found.append(
                Collective(
                    kind=step.kind,
                    axes=axes,
                    bytes_=round(float(size[0])),
                    count=_runs(part * float(runs[0])),
                    time_s=part * float(time[0]),
                    source=op.source if op else "end of the step",
                    address=op.address if op else "output",
                    value=value or "",
                )
            )
    found += _of_attention(pricer, meshes, cuts, share)
    for exchange in pricer.sharded.exchanges:
        op = program.ops[exchange.op]
        time, size, runs = pricer.moved.exchange(exchange, meshes, cuts)
        part = float(share[segments.of_op[op.index], 0]) if share is not None else 1.0
        axes = tuple(a for a in exchange.axes if meshes.product(frozenset([a]))[0] > 1)
        if axes:
            found.append(
                Collective(
                    kind=exchange.kind,
                    axes=axes,
                    bytes_=round(float(size[0])),
                    count=_runs(part * float(runs[0])),
                    time_s=part * float(time[0]),
                    source=op.source,
                    address=op.address,
                    value=f"{op.primitive} {exchange.slot}",
                )
            )
    return sorted(found, key=lambda c: (-c.time_s, c.address, c.kind))


def _runs(count: float) -> int:
    """A whole number of runs: a stage may have a part of what there is once."""
    return max(1, round(count)) if count > 0 else 0


def _of_attention(
    pricer: Pricer, meshes: Meshes, cuts: Vector, share: Vector | None
) -> list[Collective]:
    """What attention sends where its keys and values stay in parts."""
    found = []
    for each in pricer.timing.sent(meshes, cuts):
        op = pricer.program.ops[each.op]
        place = pricer.work.segments.of_op[op.index]
        part = float(share[place, 0]) if share is not None else 1.0
        if part * each.runs[0]:
            found.append(
                Collective(
                    kind=each.kind,
                    axes=("context",),
                    bytes_=round(float(each.bytes_[0])),
                    count=_runs(part * float(each.runs[0])),
                    time_s=part * float(each.time_s[0]),
                    source=op.source,
                    address=op.address,
                    value=each.value,
                )
            )
    return found


def _descendants(pricer: Pricer, paths: dict[int, str]) -> dict[int, str]:
    """Names of values that descend from state point by point, for reports."""
    names = dict(paths)
    for op in pricer.program.ops:
        if op.primitive == "autoshard_annotate" and op.params["role"] == "gradient":
            names[op.outputs[0]] = f"gradient of {op.params['path']}"
            continue
        single = [v for v in op.inputs if v >= 0]
        if (
            len(single) == 1
            and single[0] in names
            and op.primitive
            in ("link", "convert_element_type", "copy", "transpose", "split")
        ):
            names.update(dict.fromkeys(op.outputs, names[single[0]]))
    for op in reversed(pricer.program.ops):
        name = names.get(op.outputs[0]) if op.outputs else None
        chain = (
            "autoshard_annotate", "link", "convert_element_type", "transpose",
            "concatenate",
        )  # fmt: skip
        if name and name.startswith("gradient of ") and op.primitive in chain:
            for v in op.inputs:
                if v >= 0:
                    names.setdefault(v, name)
    return names
