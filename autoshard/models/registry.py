"""Published decoder shapes by name, and tiny ones of the same families for tests.

>>> get("llama3-70b").kv_heads
8
"""

from difflib import get_close_matches
from typing import Any

from autoshard.models.config import DecoderConfig, Experts, RopeScaling


def _gpt(
    name: str, *, layers: int, embed: int, heads: int, **other: Any
) -> DecoderConfig:
    """A GPT-2/GPT-3 block stack: head_dim = embed / heads and mlp = 4 embed."""
    shape: dict[str, Any] = {
        "vocab": 50257,
        "kv_heads": heads,
        "head_dim": embed // heads,
        "mlp": 4 * embed,
        "max_seq": 1024,
    }
    return DecoderConfig(
        name=name,
        layers=layers,
        embed=embed,
        heads=heads,
        norm="layer",
        positions="learned",
        activation="gelu",
        use_bias=True,
        tied_head=True,
        **(shape | other),
    )


def _llama3(
    name: str, *, layers: int, embed: int, heads: int, **other: Any
) -> DecoderConfig:
    shape: dict[str, Any] = {
        "vocab": 128256,
        "kv_heads": 8,
        "head_dim": embed // heads,
        "max_seq": 8192,
        "rope_theta": 500_000.0,
    }
    return DecoderConfig(
        name=name, layers=layers, embed=embed, heads=heads, **(shape | other)
    )


def _mixtral(name: str, *, group: int, **other: Any) -> DecoderConfig:
    """Eight experts in every block, of which a token goes to two."""
    experts = Experts(count=8, top_k=2, group=group)
    return DecoderConfig(name=name, experts=experts, rope_theta=1e6, **other)


# The tiny models differ from their families in sizes only. Heads come in multiples of
# eight so that they still divide over an eight-wide mesh axis.
_TINY: dict[str, Any] = {
    "vocab": 256,
    "kv_heads": 8,
    "head_dim": 8,
    "max_seq": 256,
    "dtype": "float32",
}

_ALL = (
    # Radford et al. 2019, table 2, with the sizes of the released checkpoints.
    _gpt("gpt2-124m", layers=12, embed=768, heads=12),
    _gpt("gpt2-1.5b", layers=48, embed=1600, heads=25),
    # Brown et al. 2020, arXiv:2005.14165, table 2.1. Every layer is dense here; the
    # paper alternates dense with locally banded attention, which has the same weights.
    _gpt("gpt3-175b", layers=96, embed=12288, heads=96, max_seq=2048),
    # Grattafiori et al. 2024, arXiv:2407.21783, table 3. The 8B and 70B are Llama 3;
    # the 405B exists only as Llama 3.1, whose context is stretched to 128 Ki tokens.
    _llama3("llama3-8b", layers=32, embed=4096, heads=32, mlp=14336),
    _llama3("llama3-70b", layers=80, embed=8192, heads=64, mlp=28672),
    _llama3(
        "llama3-405b",
        layers=126,
        embed=16384,
        heads=128,
        mlp=53248,
        max_seq=131072,
        rope_scaling=RopeScaling(factor=8.0, original_max_seq=8192),
    ),
    # Jiang et al. 2024, arXiv:2401.04088, table 1; the base of the positions is that of
    # the released checkpoints. Slots, groups and penalty are those of `Experts`.
    _mixtral(
        "mixtral-8x7b",
        group=512,
        vocab=32000,
        layers=32,
        embed=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14336,
        max_seq=32768,
    ),
    _gpt("gpt2-tiny", layers=4, embed=64, heads=8, **_TINY),
    _gpt("gpt3-tiny", layers=4, embed=128, heads=8, **(_TINY | {"head_dim": 16})),
    _llama3("llama3-tiny", layers=4, embed=128, heads=16, mlp=320, **_TINY),
    _mixtral("mixtral-tiny", group=16, layers=4, embed=128, heads=16, mlp=160, **_TINY),
)

PRESETS: dict[str, DecoderConfig] = {config.name: config for config in _ALL}


def names() -> tuple[str, ...]:
    """Every preset's name, sorted.

    >>> "gpt3-175b" in names()
    True
    """
    return tuple(sorted(PRESETS))


def get(name: str) -> DecoderConfig:
    """The preset called ``name``.

    Raises:
        KeyError: there is none; the message names the closest one and lists all.

    >>> get("llama3-8b").layers
    32
    """
    if name in PRESETS:
        return PRESETS[name]
    close = get_close_matches(name.lower(), names(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise KeyError(f"no model is named {name!r}.{hint} Known: " + ", ".join(names()))
