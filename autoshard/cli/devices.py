"""Which devices a command uses: none for planning, those of the plan for a run."""

from __future__ import annotations

from typing import Any

from autoshard.ir.errors import InputError, PlanMismatchError
from autoshard.plan.chip import Kind


def plan_on_cpu() -> None:
    """Keeps JAX away from accelerators, which planning does not need.

    A GPU would otherwise be claimed, with most of its memory, by a command that
    computes nothing.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")


def devices_for(name: str, kind: Kind | None, num_chips: int) -> list[Any]:
    """The devices that a plan runs on; virtual ones where it is for CPUs.

    Args:
        name: The cluster, for messages.
        kind: What its chips are; None for chips of a file that is not at hand, where
            any device will do.
        num_chips: How many are needed.

    Returns:
        `num_chips` devices.

    Raises:
        PlanMismatchError: This machine has not as many devices of this kind.
        InputError: The process has its CPU devices already, and too few.
    """
    import jax

    if kind == "cpu":
        return _virtual_cpus(num_chips)
    try:
        found = jax.devices()
    except RuntimeError as error:
        raise PlanMismatchError(
            f"the plan is for {num_chips} chips ({name}), and JAX finds no device "
            f"here: {error}"
        ) from error
    platform = found[0].platform
    if len(found) < num_chips or kind not in (None, platform):
        kinds = ", ".join(sorted({str(d.device_kind) for d in found}))
        wanted = f"{num_chips} {kind or 'device'}{'s' if num_chips > 1 else ''}"
        raise PlanMismatchError(
            f"the plan is for {name} and needs {wanted}; this machine has "
            f"{len(found)} {platform} device{'s' if len(found) > 1 else ''} ({kinds}). "
            "Run it where the chips are, or search again for what is here: "
            "--cluster cpu:8 takes 8 virtual devices on any machine."
        )
    return found[:num_chips]


def _virtual_cpus(count: int) -> list[Any]:
    import jax

    jax.config.update("jax_platforms", "cpu")
    # Once JAX has started, the count is fixed and the update is refused; a caller may
    # have asked for enough devices before.
    refused = None
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        refused = error
    found = jax.devices("cpu")
    if len(found) < count:
        raise InputError(
            f"cpu:{count} needs {count} virtual devices, and this process was started "
            f"with {len(found)}. Unset XLA_FLAGS and start it again."
        ) from refused
    return found[:count]
