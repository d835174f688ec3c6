"""Factor rules by op family; importing this package registers them all."""

from __future__ import annotations

from autoshard.rules import (
    collective,
    contraction,
    effects,
    elementwise,
    indexing,
    linalg,
    random,
    reduction,
    shape,
    window,
)
from autoshard.rules.core import FactorRule

# The function takes the name of its module; the module is reached by `from ... import`.
from autoshard.rules.foreign import foreign, register_rule, registered, rule_name
from autoshard.rules.registry import (
    covered,
    register,
    replicated,
    rule_of,
    rules_of,
)

__all__ = [
    "FactorRule",
    "collective",
    "contraction",
    "covered",
    "effects",
    "elementwise",
    "foreign",
    "indexing",
    "linalg",
    "random",
    "reduction",
    "register",
    "register_rule",
    "registered",
    "replicated",
    "rule_name",
    "rule_of",
    "rules_of",
    "shape",
    "window",
]
