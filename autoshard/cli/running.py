"""`autoshard run`: trains with a plan, or with the best plan for a model."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoshard.cli import options
from autoshard.cli.output import Json, say, show, show_json
from autoshard.ir.errors import InputError, PlanMismatchError

if TYPE_CHECKING:
    from autoshard.plan.schema import Plan
    from autoshard.train import TrainResult


def run(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PLAN|MODEL",
            help="A plan file, or a model as 'autoshard search' takes it.",
        ),
    ],
    cluster: options.ClusterOfModel = None,
    strategy: options.StrategyOfModel = None,
    batch: options.BatchOfModel = None,
    seq: options.SeqOfModel = None,
    optimizer: options.OptimizerOfModel = None,
    learning_rate: options.LearningRateOfModel = None,
    dtype: options.DtypeOfModel = None,
    unrolled: options.UnrolledOfModel = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="A text to train on, one token a byte; the source code of Python's "
            "standard library when not given.",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=1, help="Steps of the whole run.")
    ] = 100,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="DIR", help="Where to save the state."),
    ] = None,
    checkpoint_every: Annotated[
        int,
        typer.Option(
            "--checkpoint-every", metavar="N", min=1, help="Steps between saves."
        ),
    ] = 50,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest state in --checkpoint."),
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Of the parameters and the data.")
    ] = 0,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="FILE", help="Write a JSON line per step."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train with a plan, or with the best plan for a model."""
    from autoshard import api
    from autoshard.plan.views import headline
    from autoshard.train import ByteCorpus, Trainer

    if resume and checkpoint is None:
        raise InputError(
            "--resume was given without --checkpoint DIR; say where the run to go on "
            "with was saved."
        )
    if metrics is not None:
        api.check_writable(metrics)
    for_model = {
        "--strategy": strategy,
        "--batch": batch,
        "--seq": seq,
        "--optimizer": optimizer,
        "--learning-rate": learning_rate,
        "--dtype": dtype,
        "--unrolled": unrolled or None,
    }
    if is_plan_file(target):
        plan, devices = _load(target, cluster, for_model)
        assert plan.program.model is not None
        resolved = api.resolve(plan.program.model)
    else:
        chips = api.cluster(cluster or options.DEFAULT_CLUSTER)
        devices = _devices(chips.name, chips.kind, chips.num_chips)
        ref = options.model_ref(
            target,
            batch=options.DEFAULT_BATCH if batch is None else batch,
            seq=options.DEFAULT_SEQ if seq is None else seq,
            optimizer=optimizer,
            learning_rate=learning_rate,
            dtype=dtype,
            unrolled=unrolled,
        )
        resolved = api.resolve(ref)
        plan = api.search(
            resolved.step,
            resolved.batch,
            cluster=chips,
            strategy=strategy or "auto",
            model_ref=ref,
            executable=True,
            log=say,
        )
    for note in resolved.notes:
        say(note)
    say(headline(plan))
    ref = resolved.ref
    corpus = ByteCorpus(data, seq=ref.seq, batch=ref.batch, seed=seed)
    step = api.parallelize(resolved.step, plan, devices)
    assert isinstance(step, api.ParallelStep)
    trainer = Trainer(
        step,
        corpus,
        steps=steps,
        seed=seed,
        checkpoint_dir=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        metrics_path=metrics,
        peak_flops_per_s=_peak_flops_per_s(plan),
    )
    result = trainer.run()
    _finish(result, as_json, checkpoint)


def is_plan_file(target: str) -> bool:
    """Whether the argument is a plan; a Hugging Face config and a name are a model.

    Raises:
        InputError: A .json file that cannot be read, or is neither.
    """
    if not target.endswith(".json"):
        return False
    wanted = (
        "a plan that `autoshard search ... -o FILE` wrote, or the config.json of a "
        "Hugging Face model, is required"
    )
    try:
        document = json.loads(Path(target).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{target} cannot be read: {error.strerror}; {wanted}."
        ) from error
    except ValueError as error:
        raise InputError(
            f"{target} is not valid JSON ({error}), it may be truncated; {wanted}."
        ) from error
    keys = document if isinstance(document, dict) else {}
    if "schema_version" in keys:
        return True
    if "model_type" in keys:
        return False
    raise InputError(
        f"{target} has neither 'schema_version' nor 'model_type', so it is no plan and "
        f"no model; {wanted}."
    )


def _load(
    path: str, cluster: str | None, for_model: dict[str, Any]
) -> tuple[Plan, list[Any]]:
    from autoshard import api

    given = [name for name, value in for_model.items() if value is not None]
    if given:
        raise InputError(
            f"{', '.join(given)} cannot be given with the plan {path}, which fixes "
            "them; search again with these options, or run the model by its name."
        )
    plan = load_named(
        path, "run it there, with autoshard.parallelize(train_step, plan)"
    )
    where = plan.cluster
    if cluster is not None:
        chips = api.cluster(cluster)
        if (chips.name, chips.fingerprint) != (where.name, where.fingerprint):
            raise PlanMismatchError(
                f"--cluster {cluster} was given, and the plan {path} is for "
                f"{where.name} (fingerprint {where.fingerprint}, not "
                f"{chips.fingerprint}); leave --cluster out, or search again with it."
            )
        kind = chips.kind
    else:
        chip_type = where.name.rpartition(":")[0]
        known = chip_type in api.cluster_names()
        kind = api.cluster(where.name).kind if known else None
    return plan, _devices(where.name, kind, where.num_chips)


def load_named(path: str, otherwise: str) -> Plan:
    """A plan that says how its program is built.

    Args:
        path: Of the plan.
        otherwise: What to do with a plan that does not say it.

    Raises:
        InputError: The file cannot be read, or does not say it.
    """
    from autoshard import api

    plan = api.load_plan(path)
    if plan.program.model is None:
        raise InputError(
            f"the plan {path} was made from Python and does not say how its program is "
            f"built; {otherwise}."
        )
    return plan


def _devices(name: str, kind: Any, num_chips: int) -> list[Any]:
    from autoshard.cli.devices import devices_for

    return devices_for(name, kind, num_chips)


def _peak_flops_per_s(plan: Plan) -> float | None:
    """Peak of all chips together, as the plan reckons its utilisation with."""
    p = plan.predicted
    return p.model_flops / (p.mfu * p.step_s) if p.mfu and p.step_s else None


def _finish(result: TrainResult, as_json: bool, checkpoint: str | None) -> None:
    losses = result.losses
    summary = {
        "first_step": result.first_step,
        "last_step": result.last_step,
        "first_loss": _finite(losses[0]) if losses else None,
        "last_loss": _finite(losses[-1]) if losses else None,
        "tokens_per_s": result.tokens_per_s,
        "mfu": result.mfu,
        "stopped_by_signal": result.stopped_by_signal,
        "checkpoint": checkpoint,
    }
    if as_json:
        show_json(summary)
    else:
        show(_summary_text(summary))
    if result.stopped_by_signal is None:
        return
    if checkpoint is None:
        advice = "nothing was kept; --checkpoint DIR would have saved the state"
    else:
        again = ["autoshard", *(a for a in sys.argv[1:] if a != "--resume"), "--resume"]
        advice = f"go on with: {shlex.join(again)}"
    say(advice)
    raise typer.Exit(128 + result.stopped_by_signal)


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _summary_text(summary: dict[str, Any]) -> str:
    from autoshard.report.units import count_text, percent_text

    s = summary
    if s["first_loss"] is None:
        return f"nothing to do: the run is at step {s['last_step']} already"
    parts = [
        f"steps {s['first_step'] + 1} to {s['last_step']}: loss "
        f"{s['first_loss']:.4f} -> {s['last_loss']:.4f}"
    ]
    if s["tokens_per_s"] is not None:
        parts.append(f"{count_text(s['tokens_per_s'])} tokens/s")
    if s["mfu"] is not None:
        parts.append(f"MFU {percent_text(s['mfu'])}")
    return ", ".join(parts)
