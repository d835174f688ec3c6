"""autoshard plans how a JAX program is spread over a cluster, and runs the plan.

import autoshard as ash

step = ash.train_step(loss_fn, optimizer, model=build)
plan = ash.search(step, batch, cluster="h100:64")
parallel = ash.parallelize(step, plan)
"""

from __future__ import annotations

import autoshard.report  # noqa: F401 - registers how a plan is printed
from autoshard.api import (
    calibrate,
    check_rules,
    cluster,
    load_plan,
    load_strategy,
    parallelize,
    register_rule,
    repair_plan,
    resolve,
    search,
    size,
    solver,
    train_step,
    validate,
    verify_plan,
    why_not,
)
from autoshard.ir.annotate import annotate
from autoshard.ir.errors import AutoshardError
from autoshard.ir.train_step import TrainState, TrainStep
from autoshard.ir.version import VERSION as __version__
from autoshard.lower import ParallelStep
from autoshard.plan.cluster import Cluster
from autoshard.plan.schema import ModelRef, Plan
from autoshard.plan.strategy import Strategy
from autoshard.report.plots import plot_losses, plot_memory
from autoshard.train import ByteCorpus, Trainer

__all__ = [
    "AutoshardError",
    "ByteCorpus",
    "Cluster",
    "ModelRef",
    "ParallelStep",
    "Plan",
    "Strategy",
    "TrainState",
    "TrainStep",
    "Trainer",
    "__version__",
    "annotate",
    "calibrate",
    "check_rules",
    "cluster",
    "load_plan",
    "load_strategy",
    "parallelize",
    "plot_losses",
    "plot_memory",
    "register_rule",
    "repair_plan",
    "resolve",
    "search",
    "size",
    "solver",
    "train_step",
    "validate",
    "verify_plan",
    "why_not",
]
