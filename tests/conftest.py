"""Eight virtual devices for every test, before anything touches a device."""

from __future__ import annotations

import os

# The devices of one process wait for one another; on busy machines for long, and XLA
# ends the process after 40 seconds of that.
_PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_PATIENT}".strip()

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
