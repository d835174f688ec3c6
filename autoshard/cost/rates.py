"""Rates at which a chip runs kernels, or at which its compiler says that it does."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from pydantic import BaseModel, ConfigDict, Field

from autoshard.cost.constants import Constants
from autoshard.cost.kernels import HBM_EFFICIENCY, share_of_peak
from autoshard.ir.errors import InputError
from autoshard.plan.cluster import Cluster

EXPOSED = 1.0
"""Share of the lesser of a product's arithmetic and traffic that is added to the
greater in the TPU compiler's estimates. A product alone hides it; one inside a program,
whose values come from and go to stacks over layers and share the chip's own memory with
what is fetched ahead, comes closer to the sum. Chosen in view of the blocks of
llama3-8b and gpt2-1.5b that benchmarks/compiler_blocks.py compares (libtpu 0.0.42), so
these are no test of it."""
SCRATCH_BYTES = 4.0
"""A float32 value per element that is written narrower or reduced: kernels of 16-bit
elements are estimated at 8 bytes for each that is read and written, those of float32 at
8 too (benchmarks/compiler_ops.py)."""
WINDOW_S = 1.21e-6
"""Seconds to start the transfer of one window, the same for all generations: what a
kernel of one op, whose windows are small, takes beyond its bytes."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a chip reaches.

    Attributes:
        product_share: Share of peak that large products reach.
        half_dim: As in `kernels.busy_share`.
        hbm_bytes_per_s: Bytes/s of memory that kernels reach.
        copy_bytes_per_s: The same for copies from one layout to another.
        exposed: Share of a product's memory traffic, or of its arithmetic where that
            is less, that the other does not hide.
        scratch_bytes: Traffic per element that a kernel computes in float32 and writes
            narrower, or reduces.
        window_s: Seconds that a kernel of one op takes more per window of its result.
        window_elements: Elements of such a window.
    """

    product_share: float
    half_dim: float
    hbm_bytes_per_s: float
    copy_bytes_per_s: float
    exposed: float = 0.0
    scratch_bytes: float = 0.0
    window_s: float = 0.0
    window_elements: float = 1.0

    @classmethod
    def of(cls, cluster: Cluster, constants: Constants) -> Rates:
        """As measured on the chip, else as fitted to published runs.

        >>> from autoshard.plan.cluster import cluster
        >>> Rates.of(cluster("v5e:2x4"), Constants.priors()).product_share
        0.9
        """
        chip = cluster.chip
        measured = chip.hbm_efficiency
        share = share_of_peak(chip.generation or "other", cluster.kind, constants)
        half_dim = constants["matmul.half_dim"]
        if chip.matmul_efficiency:  # measured on average shapes
            share, half_dim = chip.matmul_efficiency.value, 0.0
        memory = measured.value if measured else HBM_EFFICIENCY
        hbm = cluster.hbm_bytes_per_s * memory
        return cls(share, half_dim, hbm, copy_bytes_per_s=hbm)

    @staticmethod
    def counted(cluster: Cluster) -> bool:
        """Whether it is known how a compiler counts for a cluster's chips.

        >>> from autoshard.plan.cluster import cluster
        >>> Rates.counted(cluster("v5e:2x4")), Rates.counted(cluster("h100:8"))
        (True, False)
        """
        return cluster.kind == "tpu" and cluster.chip.generation in _compiler()

    @classmethod
    def compiler(cls, cluster: Cluster) -> Rates:
        """As the TPU compiler counts in its estimates.

        Raises:
            InputError: It is not known how it counts for these chips.

        >>> from autoshard.plan.cluster import cluster
        >>> Rates.compiler(cluster("v5e:2x4")).product_share > 0.95
        True
        """
        if not cls.counted(cluster):
            raise InputError(
                f"it is not known how a compiler estimates cycles of {cluster.name}; "
                f"known: {', '.join(_compiler())}."
            )
        found = _compiler()[cluster.chip.generation or ""]
        return cls(
            product_share=found.product_share,
            half_dim=0.0,
            hbm_bytes_per_s=cluster.hbm_bytes_per_s * found.memory_share,
            copy_bytes_per_s=cluster.hbm_bytes_per_s * found.copy_share,
            exposed=EXPOSED,
            scratch_bytes=SCRATCH_BYTES,
            window_s=WINDOW_S,
            window_elements=found.window_elements,
        )


class _View(BaseModel):
    """How the compiler counts for one generation; see compiler.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    product_share: float = Field(gt=0, le=1)
    memory_share: float = Field(gt=0, le=1)
    copy_share: float = Field(gt=0, le=1)
    window_elements: int = Field(gt=0)


@cache
def _compiler() -> dict[str, _View]:
    text = resources.files("autoshard.cost").joinpath("compiler.toml")
    data = tomllib.loads(text.read_text(encoding="utf-8"))
    return {name: _View.model_validate(entry) for name, entry in data.items()}
