"""A layout: which mesh axes shard which logical axes and which state."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoshard.plan.schema import Strategy

RESIDUAL = ".residual"


@dataclass(frozen=True, slots=True)
class Layout:
    """The part of a filled strategy that propagation reads.

    Attributes:
        rules: `(logical axis, mesh axes)` in order of priority.
        params: Axes that shard parameters in memory beyond their compute spec.
        gradients: The same for gradients.
        optimizer: The same for optimizer state.
        sizes: Size per mesh axis, or empty while they are not known: then storage is
            placed as if everything divided.
    """

    rules: tuple[tuple[str, tuple[str, ...]], ...]
    params: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    optimizer: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)

    def size(self, axes: tuple[str, ...]) -> int:
        """Product of the axes' sizes, where known."""
        product = 1
        for axis in axes:
            product *= self.sizes.get(axis, 1)
        return product

    @staticmethod
    def of(strategy: Strategy, sizes: dict[str, int] | None = None) -> Layout:
        """The layout of a strategy without holes."""
        storage = strategy.storage
        rules = []
        for rule in strategy.rules:
            assert rule.axes != "auto", rule
            rules.append((rule.logical, tuple(rule.axes)))
        assert "auto" not in (storage.params, storage.gradients, storage.optimizer)
        return Layout(
            rules=tuple(rules),
            params=tuple(storage.params),
            gradients=tuple(storage.gradients),
            optimizer=tuple(storage.optimizer),
            sizes=sizes or {},
        )
