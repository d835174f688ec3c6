"""Train steps of programs that other people wrote, as they wrote them.

Each client is a published model of an installed package: nothing of it is copied or
changed here, only configured, given random weights and a loss, and put into a train
step. `full` is a size that was published; `small` has every kind of layer, in dims
that eight devices can divide. No weights are downloaded.

Tunix changes Flax's global settings when it is imported, so a process should hold
clients of one package only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clients.common import Case

EXTRA = "clients"
"""The optional dependencies of autoshard that bring all of these packages."""


@dataclass(frozen=True)
class Client:
    """One program.

    Attributes:
        name: Name in records, `library-model`.
        package: The distribution that it comes from.
        module: Module of this package that builds it.
        published: What the full size is called where it was published.
        form: `"train_step"` where `autoshard.train_step` makes the step of a loss,
            `"function"` where the step is a plain function `(*state, batch)`.
        cancels: Whether gradients of the small size are sums that nearly cancel, as
            those of batch norms are on a few images: a comparison within 1e-5 then
            needs float64 (`Case.in_float64`, with `jax_enable_x64` on).
    """

    name: str
    package: str
    module: str
    published: str
    form: str
    cancels: bool = False

    def _make(self, size: str, optimizer: Any) -> Case:
        module = importlib.import_module(f"clients.{self.module}")
        build: Callable[..., Case] = module.BUILDERS[self.name]
        return build(size, optimizer)

    def full(self, optimizer: Any = None) -> Case:
        """The published size, in bfloat16 where the model computes in it.

        Args:
            optimizer: An optax transformation; AdamW by default.
        """
        return self._make("full", optimizer)

    def small(self, optimizer: Any = None) -> Case:
        """A small size in float32 with every kind of layer.

        Args:
            optimizer: An optax transformation; by default an AdamW whose state also
                holds the gradients that it was last given.
        """
        return self._make("small", optimizer)

    def missing(self) -> str:
        """Why the client cannot be built here, or nothing."""
        try:
            metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return (
                f"{self.package} is not installed; pip install 'autoshard[{EXTRA}]' "
                "brings it"
            )
        return ""


_ALL = (
    Client("hf-gpt2", "transformers", "huggingface", "gpt2-xl", "train_step"),
    Client("hf-bert", "transformers", "huggingface", "bert-large", "train_step"),
    Client("hf-t5", "transformers", "huggingface", "t5-large", "train_step"),
    Client("hf-bart", "transformers", "huggingface", "bart-large", "train_step"),
    Client("hf-llama", "transformers", "huggingface", "llama-2-7b", "train_step"),
    Client("hf-mistral", "transformers", "huggingface", "mistral-7b-v0.1", "function"),
    Client("hf-gemma", "transformers", "huggingface", "gemma-7b", "train_step"),
    Client("hf-opt", "transformers", "huggingface", "opt-6.7b", "function"),
    Client("hf-vit", "transformers", "huggingface", "vit-large-patch16", "train_step"),
    Client("hf-resnet", "transformers", "huggingface", "resnet-50", "function", True),
    Client("tunix-llama3", "google-tunix", "tunix_models", "llama3.1-8b", "train_step"),
    Client("tunix-qwen2", "google-tunix", "tunix_models", "qwen2.5-7b", "train_step"),
    Client("tunix-qwen3", "google-tunix", "tunix_models", "qwen3-8b", "train_step"),
    Client("tunix-gemma", "google-tunix", "tunix_models", "gemma2-2b", "train_step"),
    Client("tunix-gemma3", "google-tunix", "tunix_models", "gemma3-4b", "train_step"),
    Client("nano-moe", "nano-moe-jax", "nano_moe_jax", "its defaults", "function"),
    Client("haiku-resnet50", "dm-haiku", "haiku_resnet", "resnet-50", "function", True),
)


def clients() -> dict[str, Client]:
    """All clients by name, whether or not their packages are installed.

    >>> clients()["hf-gpt2"].published
    'gpt2-xl'
    """
    return {client.name: client for client in _ALL}
