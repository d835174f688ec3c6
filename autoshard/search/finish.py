"""Spelling out a chosen candidate as a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from autoshard.cost import Pricer, estimate, model_flops
from autoshard.cost.pipeline import Pipeline
from autoshard.cost.work import analyse
from autoshard.ir.few import fingerprint
from autoshard.ir.mesh import Spec, arranged
from autoshard.ir.stretch import NotAlikeError, Stretch
from autoshard.ir.train_step import TrainStep
from autoshard.ir.version import VERSION
from autoshard.plan.cluster import Cluster
from autoshard.plan.schema import (
    Certificate,
    ClusterRef,
    MeshAxis,
    ModelRef,
    Plan,
    ProgramRef,
    TensorPlan,
)
from autoshard.plan.sharded import OUTPUT, Layout, ShardedProgram
from autoshard.plan.strategy import Strategy
from autoshard.propagate import propagate
from autoshard.search.candidates import Space
from autoshard.search.pins import constraints
from autoshard.search.reading import Sketch, cuts_traced
from autoshard.search.record import records
from autoshard.search.stretching import stretched


@dataclass(frozen=True)
class Draft:
    """A candidate priced as it is traced, which may be with few copies of its blocks.

    Attributes:
        plan: The plan of what is traced; what it predicts is of all of the step.
        stretch: How the step goes on; None where all of it is traced.
    """

    plan: Plan
    stretch: Stretch | None
    _of_whole: Callable[[str], Plan]

    def spelled_out(self) -> Plan:
        """The plan of the whole step."""
        if self.stretch is None:
            return self.plan
        try:
            return stretched(self.plan, self.stretch)
        except NotAlikeError as error:
            return self._of_whole(str(error))


def draft(
    space: Space,
    cluster: Cluster,
    strategy: Strategy,
    certificate: Certificate,
    model_ref: ModelRef | None = None,
) -> Draft:
    """Prices a candidate with its microbatches traced.

    Args:
        space: The program.
        cluster: Where it runs.
        strategy: Without holes.
        certificate: Of the search; its gap is completed here.
        model_ref: Recorded in the plan.
    """
    plain, schedule = space.sketch("none"), strategy.schedule
    assert plain is not None
    known = plain.traced.program.fingerprint
    if isinstance(space.fn, TrainStep):
        known = fingerprint(space.fn, space.args[-1], known)
    given = cluster, strategy, certificate, model_ref, plain, known
    sketch = space.traced_for(schedule)

    def of_whole(why: str) -> Plan:
        return _plan(space.traced_whole_for(schedule, why), *given)

    return Draft(_plan(sketch, *given), sketch.stretch, of_whole)


def _plan(
    sketch: Sketch,
    cluster: Cluster,
    strategy: Strategy,
    certificate: Certificate,
    model_ref: ModelRef | None,
    plain: Sketch,
    fingerprint_: str,
) -> Plan:
    """The plan for what is traced, be it few copies of the blocks or all."""
    schedule, sizes = strategy.schedule, _sizes(strategy)
    assert schedule.microbatches != "auto"
    assert strategy.order != "auto"
    assert schedule.offload != "auto"
    pipeline = _pipeline(strategy) if schedule.pipeline != "none" else None
    traced, classes, shallow = sketch.traced, sketch.classes, sketch.shallow
    layout = Layout.of(strategy, sizes)
    sharded = propagate(traced, classes, layout)
    how = schedule.context_kind, schedule.context_heads
    whole = Pricer(sharded, analyse(traced, classes)).with_context(*how)
    pricer = whole
    if shallow.traced is not traced:
        left = propagate(shallow.traced, shallow.classes, layout)
        pricer = Pricer(left, shallow.work).with_context(*how)
    flops = model_flops(plain.shallow.work, plain.shallow.classes)
    predicted = estimate(
        pricer,
        cluster,
        sizes,
        flops,
        whole,
        pipeline,
        schedule.microbatches // cuts_traced(schedule),
        strategy.order,
        schedule.offload,
    )
    bound = min(certificate.lower_bound_s, predicted.step_s)
    certificate = certificate.model_copy(
        update={
            "lower_bound_s": bound,
            "gap": predicted.step_s / bound - 1 if predicted.step_s else 0.0,
        }
    )
    return Plan(
        autoshard=VERSION,
        program=ProgramRef(
            fingerprint=fingerprint_,
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
            MeshAxis(axis=axis, size=sizes[axis])
            for axis in arranged(strategy.order)
            if axis in sizes
        ),
        strategy=strategy,
        tensors=tuple(_tensors(sharded)),
        outputs=tuple(_outputs(sharded)),
        constraints=constraints(sharded, sizes),
        notes=(*plain.remarks, *sharded.notes, *_notes(sharded, sizes)),
        predicted=predicted,
        certificate=certificate,
        **records(sharded),
    )


def _sizes(strategy: Strategy) -> dict[str, int]:
    return {a: n for a, n in strategy.mesh.items() if n != "auto"}


def _pipeline(strategy: Strategy) -> Pipeline:
    schedule = strategy.schedule
    assert schedule.virtual != "auto"
    return Pipeline(
        schedule.pipeline, schedule.virtual, schedule.vocab, schedule.blocks
    )


def _tensors(sharded: ShardedProgram) -> list[TensorPlan]:
    traced, names = sharded.traced, sharded.classes.names
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
                logical=tuple(
                    given or next(iter(names.get(cls, ())), None)
                    for given, cls in zip(
                        info.logical, sharded.classes.of_value[value], strict=True
                    )
                ),
                storage=Spec(sharded.specs[value]),
                # Optimizer state is only ever met where it is stored.
                compute=Spec(compute if uses else sharded.specs[value]),
            )
        )
    return found


def _outputs(sharded: ShardedProgram) -> list[Spec]:
    program = sharded.traced.program
    moved = {r.slot: r.target for r in sharded.reshards if r.op == OUTPUT}
    found = []
    pairs = zip(program.outputs, sharded.traced.out_source, strict=True)
    for k, (value, source) in enumerate(pairs):
        if source >= 0:
            found.append(Spec(sharded.specs[program.inputs[source]]))
        else:
            spec = sharded.specs[value] if value >= 0 else ()
            found.append(Spec(moved.get(f"out{k}", spec)))
    return found


def _notes(sharded: ShardedProgram, sizes: dict[str, int]) -> list[str]:
    """Trip counts that are not known, and dims that the partitioner pads."""
    program = sharded.traced.program
    notes = [region.note for region in program.regions if region.note]
    for size, axes in sorted(sharded.padded):
        ways = int(np.prod([sizes.get(a, 1) for a in axes]))
        if size % ways:
            whole = -(-size // ways) * ways
            notes.append(
                f"dims of size {size} over {'+'.join(axes)} ({ways} ways) are padded "
                f"to {whole}"
            )
    return list(dict.fromkeys(notes))
