"""What a plan is compiled for: the devices of its own cluster, though none are here.

TPUs and GPUs are described to their compilers, which come with JAX's plugins for them;
a host is as many virtual CPU devices.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import jax
from jax.experimental import topologies

from autoshard.ir.errors import InputError, NameUnknownError
from autoshard.plan.chip import Figure, Model
from autoshard.plan.cluster import Cluster, cluster, names
from autoshard.plan.schema import Plan

Kind = Literal["tpu", "gpu", "host"]
KINDS: tuple[Kind, ...] = ("tpu", "gpu", "host")

_PLUGINS = {
    "tpu": ("libtpu",),
    "gpu": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"),
}
_SETTINGS = {
    # Neither a metadata server nor a TPU is asked what it is, and no lock is taken that
    # would let one process at a time compile.
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    "gpu": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
}
_OPTIONS: dict[Kind, dict[str, Any]] = {
    "tpu": {},
    "gpu": {
        "xla_gpu_autotune_level": "0",  # there is nothing to try things on
        "xla_gpu_enable_latency_hiding_scheduler": True,
    },
    "host": {
        # Machine code is not looked at; these leave HLO passes as they are.
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
}
_GPU_ESTIMATES = {
    "xla_gpu_collect_cost_model_stats": True,
    "xla_gpu_enable_analytical_sol_latency_estimator": True,
}
# Limits of CUDA that all chips of the table share.
_LIMITS = """threads_per_block_limit: 1024 threads_per_warp: 32
 threads_per_core_limit: 2048 shared_memory_per_block: 49152
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
 registers_per_core_limit: 65536 registers_per_block_limit: 65536"""
_MATRIX_UNITS_PER_CORE = 4
# Numbers of the element types in XLA's PrimitiveType, by the dtypes of a peak.
_TYPE_NUMBERS = {
    "i8": (2, 6),
    "f16": (10,),
    "f32": (11,),
    "f64": (12,),
    "bf16": (16,),
    "f8": (19, 20, 23, 24, 25, 28, 29),
}


class TpuFacts(Model):
    """What the TPU compiler must be told of a chip, and what its figures are in."""

    clock_hz: Figure
    chip_config_name: str | None = None


class GpuFacts(Model):
    """What XLA must be told of a GPU; names as in its `GpuDeviceInfoProto`.

    Attributes:
        estimates: Whether XLA can estimate times for it.
    """

    source: str
    description: str
    compute_capability: tuple[int, int]
    accelerated: bool = False
    estimates: bool = True
    core_count: int
    fpus_per_core: int
    clock_rate_ghz: float
    shared_memory_per_core: int
    shared_memory_per_block_optin: int
    l2_cache_size: int


@dataclass(frozen=True)
class Target:
    """A compiler, and the devices to compile for.

    Attributes:
        kind: Whose compiler.
        name: The cluster as people write it, such as `v5e:16x16`.
        cluster: The same with its figures; None for a host.
        num_chips: Devices of the program.
    """

    kind: Kind
    name: str
    cluster: Cluster | None
    num_chips: int

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler."""
        options = dict(_OPTIONS[self.kind])
        if self.kind == "gpu" and self.estimates:
            options |= _GPU_ESTIMATES
        return options

    @property
    def estimates(self) -> bool:
        """Whether the compiler says how long the program takes."""
        if self.kind != "gpu" or self.cluster is None:
            return self.kind == "tpu"
        return GpuFacts.model_validate(_fact("gpu", self.cluster)).estimates

    @property
    def clock_hz(self) -> float | None:
        """Clock of the cycles that the TPU compiler estimates in."""
        if self.kind != "tpu" or self.cluster is None:
            return None
        return _tpu(self.cluster).clock_hz.value

    def devices(self) -> list[Any]:
        """Devices to lower for; nothing can run on those of a TPU or GPU.

        Raises:
            InputError: The compiler is not installed, or does not know the topology,
                or this process has too few virtual devices.
        """
        if self.kind == "host":
            return _host_devices(self.num_chips)
        assert self.cluster is not None
        require_compiler(self.kind)
        for name, value in _SETTINGS[self.kind].items():
            os.environ.setdefault(name, value)
        found = _tpus(self.cluster) if self.kind == "tpu" else _gpus(self.cluster)
        if len(found) != self.num_chips:
            raise InputError(
                f"the compiler shows {self.name} as {len(found)} devices, and the plan "
                f"is for {self.num_chips}; verify it with --target host."
            )
        return found


def target_of(plan: Plan, kind: str | None = None) -> Target:
    """What to compile a plan for.

    Args:
        plan: The plan; its cluster is the topology.
        kind: `tpu`, `gpu` or `host`; by default what the plan's chips are.

    Raises:
        NameUnknownError: No such kind.
        InputError: The plan's chips are of another kind, or are not known here.

    >>> import autoshard as ash, jax.numpy as jnp
    >>> args = jnp.ones((16, 8)), jnp.ones((8, 4))
    >>> plan = ash.search(jnp.matmul, *args, cluster="v5e:2x4", strategy="dp")
    >>> target_of(plan).kind, target_of(plan, "host").kind
    ('tpu', 'host')
    """
    if kind not in (None, *KINDS):
        raise NameUnknownError(
            f"unknown target {kind!r}; known: {', '.join(KINDS)}. Left out, it is what "
            "the plan's chips are."
        )
    where = plan.cluster
    if kind == "host":
        return Target("host", f"host:{where.num_chips}", None, where.num_chips)
    chip = where.name.rpartition(":")[0]
    if chip not in names():
        raise InputError(
            f"the plan is for {where.name}, chips of a file of yours, which no "
            "compiler knows; verify it with --target host, or search it for one of "
            f"{', '.join(names())}."
        )
    chips = cluster(where.name)
    own: Kind = "host" if chips.kind == "cpu" else chips.kind
    if kind not in (None, own):
        raise InputError(
            f"--target {kind} was given, and the plan is for {where.name}, of kind "
            f"{own}; use --target {own if own == 'host' else f'{own} or host'}, or "
            "search it for other chips."
        )
    if own == "host":
        return Target("host", f"host:{where.num_chips}", None, where.num_chips)
    return Target(own, where.name, chips, where.num_chips)


def require_compiler(kind: Kind) -> None:
    """Looks whether a compiler is installed, without loading it.

    Raises:
        InputError: It is not; the message names the extra that brings it.

    >>> require_compiler("host")
    """
    modules = _PLUGINS.get(kind, ())
    if modules and not any(_installed(module) for module in modules):
        raise InputError(
            f"--target {kind} needs the compiler for {kind.upper()}s, which is not "
            f"installed here: pip install 'autoshard[{kind}]'. It needs no "
            f"{kind.upper()} to run. --target host compiles with what is installed."
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it is in
        return False


@functools.cache
def _facts() -> dict[str, dict[str, Any]]:
    file = resources.files("autoshard.verify") / "targets.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _tpu(chips: Cluster) -> TpuFacts:
    return TpuFacts.model_validate(_fact("tpu", chips))


def _fact(kind: str, chips: Cluster) -> dict[str, Any]:
    known = _facts()[kind]
    if chips.type_name not in known:
        why = ""
        if chips.type_name.startswith("tpu7"):
            why = "JAX shows a chip of it as two devices, a plan counts it as one; "
        raise InputError(
            f"the {kind.upper()} compiler cannot be asked about {chips.name}: {why}"
            f"there are {', '.join(known)}. Verify the plan with --target host."
        )
    return known[chips.type_name]


def _tpus(chips: Cluster) -> list[Any]:
    facts = _tpu(chips)
    more = {}
    if facts.chip_config_name is not None:
        more["chip_config_name"] = facts.chip_config_name
    return _described(chips, platform="tpu", topology_name=chips.name, **more)


def _gpus(chips: Cluster) -> list[Any]:
    text = target_config(chips)
    slices_hosts_gpus = f"1x{chips.nodes}x{chips.chips_per_node}"
    return _described(
        chips,
        topology_name=chips.name,
        platform="cuda",
        target_config=text,
        topology=slices_hosts_gpus,
    )


def _described(chips: Cluster, **description: Any) -> list[Any]:
    try:
        return list(topologies.get_topology_desc(**description).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"the installed {description['platform']} compiler (jax {jax.__version__}) "
            f"has no topology {chips.name}: {first}"
        ) from error


def target_config(chips: Cluster) -> str:
    """The text that describes a GPU to XLA, a `GpuTargetConfigProto`.

    Args:
        chips: Of a type that `targets.toml` knows.

    Raises:
        InputError: It does not.

    >>> "core_count: 132" in target_config(cluster("h100:8"))
    True
    """
    facts = GpuFacts.model_validate(_fact("gpu", chips))
    major, minor = facts.compute_capability
    feature = "ACCELERATED_FEATURES" if facts.accelerated else "NONE"
    # That of the generation, not of the product; a zero is left out of a text proto.
    capability = f"major: {major} minor: {minor} feature_extension: {feature}"
    rates = []
    for dtype, peak in chips.chip.peak_flops_per_s.items():
        units = facts.core_count * _MATRIX_UNITS_PER_CORE * 2  # 2: multiply and add
        ops = _power_of_two(peak.value / (units * facts.clock_rate_ghz * 1e9))
        clock_ghz = peak.value / (units * ops) / 1e9
        rates += [
            f"rate_infos {{ key: {number} value {{ clock_rate_ghz: {clock_ghz:.6f} "
            f"units_per_core: {_MATRIX_UNITS_PER_CORE} ops_per_clock: {ops} }} }}"
            for number in _TYPE_NUMBERS[dtype]
        ]
    return f"""gpu_device_info {{
 {_LIMITS}
 core_count: {facts.core_count} fpus_per_core: {facts.fpus_per_core}
 shared_memory_per_core: {facts.shared_memory_per_core}
 shared_memory_per_block_optin: {facts.shared_memory_per_block_optin}
 l2_cache_size: {facts.l2_cache_size} clock_rate_ghz: {facts.clock_rate_ghz}
 memory_bandwidth: {chips.hbm_bytes_per_s:.0f} device_memory_size: {chips.hbm_bytes}
 cuda_compute_capability {{ {capability} }}
 matrix_unit_description {{ {" ".join(rates)} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{facts.description}"
"""


def _power_of_two(number: float) -> int:
    """The nearest power of two that is not below three quarters of a number."""
    power = 1
    while power < 0.75 * number:
        power *= 2
    return power


def _host_devices(count: int) -> list[Any]:
    # Refused once JAX has started; then there may be enough devices all the same.
    refused = None
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        refused = error
    found = jax.devices("cpu")
    if len(found) < count:
        raise InputError(
            f"--target host needs {count} virtual devices, and this process has "
            f"{len(found)}. Set jax_num_cpu_devices before JAX is used, or use the "
            "command line: autoshard verify plan.json --target host."
        ) from refused
    return found[:count]


_TOO_BIG = re.compile(r"RESOURCE_EXHAUSTED|Ran out of memory", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a compiler refused a program because it does not fit.

    >>> is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm"))
    True
    """
    return _TOO_BIG.search(str(error)) is not None
