"""Eight virtual devices for every test, before anything touches a device."""

from __future__ import annotations

import os

# The devices of one process wait for one another; on busy machines for long, and XLA
# ends the process after 40 seconds of that.
_PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
# Tiny programs run once take far longer to compile than to run: the passes over the
# compiled module (sharding, collectives, fusion) stay, LLVM's own are left out.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), _PATIENT, _QUICK]
).strip()

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
