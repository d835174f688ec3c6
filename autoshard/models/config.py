"""The shape of a decoder-only language model, as one frozen value.

Every size that a planner needs (weights, activations, FLOPs) follows from the fields
here, so nothing about a model has to be read back out of arrays.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Norm = Literal["rms", "layer"]
Positions = Literal["rope", "learned"]
Activation = Literal["swiglu", "gelu"]
FloatType = Literal["float32", "bfloat16", "float16"]

_SIZES = (
    "vocab",
    "layers",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "max_seq",
)
_FLAGS = ("use_bias", "tied_head", "scan_layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1 stretching of rotary frequencies to a longer context.

    Rotations whose wavelength exceeds ``original_max_seq / low_freq_factor`` tokens
    are slowed by ``factor``, those below ``original_max_seq / high_freq_factor`` are
    left alone, and those between are blended. Source: arXiv:2407.21783, section 3.4.2,
    with the constants published beside the Llama 3.1 weights.

    Raises:
        ValueError: a field is out of range.

    >>> RopeScaling(factor=8.0, original_max_seq=8192).high_freq_factor
    4.0
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq: int

    def __post_init__(self) -> None:
        if self.factor < 1.0:
            raise ValueError(
                f"RopeScaling: factor={self.factor!r} would shorten the context; it "
                "must be at least 1 (Llama 3.1 uses 8)"
            )
        if not 0.0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"RopeScaling: low_freq_factor={self.low_freq_factor!r} must be "
                f"positive and below high_freq_factor={self.high_freq_factor!r}; the "
                "blend between them divides by their difference"
            )
        _check_positive_int("RopeScaling", "original_max_seq", self.original_max_seq)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts in place of each block's feed-forward part.

    Every token goes to the ``top_k`` experts that its router rates highest, and their
    results are added, weighted by its softmax over these. A sequence is cut into
    groups of tokens, and an expert has the same number of slots for each group
    (GShard, arXiv:2006.16668, section 2.2): tokens beyond them are dropped, so shapes
    do not depend on the data. What the router does is kept even by a penalty that is
    added to the loss (Switch Transformer, arXiv:2101.03961, equation 4).

    Attributes:
        count: experts of a block.
        top_k: experts that a token goes to.
        capacity: slots of an expert over the tokens that it gets on average.
        group: tokens of a group; a shorter sequence is one group, a longer one must
            divide into groups.
        balance: weight of the penalty of one block.

    Raises:
        ValueError: a field is out of range, or two fields disagree.

    >>> Experts(count=8, top_k=2).slots(512)
    160
    """

    count: int
    top_k: int
    capacity: float = 1.25
    group: int = 512
    balance: float = 0.01

    def __post_init__(self) -> None:
        for field in ("count", "top_k", "group"):
            _check_positive_int("Experts", field, getattr(self, field))
        if self.top_k > self.count:
            raise ValueError(
                f"Experts: top_k={self.top_k} exceeds count={self.count}; a token goes "
                "to each expert at most once"
            )
        if self.capacity <= 0:
            raise ValueError(
                f"Experts: capacity={self.capacity!r} must be positive; with 1 there "
                "are just as many slots as tokens to place"
            )
        if self.balance < 0:
            raise ValueError(
                f"Experts: balance={self.balance!r} must not be negative; 0 leaves the "
                "penalty out"
            )

    def slots(self, tokens: int) -> int:
        """Tokens that an expert takes from a group of ``tokens``."""
        return math.ceil(tokens * self.top_k * self.capacity / self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes and choices of one decoder-only transformer.

    Attributes:
        name: what reports call the model.
        vocab: rows of the token table; tokens are ``0 .. vocab - 1``.
        layers: number of blocks.
        embed: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads; divides ``heads`` (fewer is grouped-query
            attention, arXiv:2305.13245).
        head_dim: width of one head; ``heads * head_dim`` need not equal ``embed``.
        mlp: hidden width of the feed-forward part; of one expert, where there are
            experts.
        max_seq: longest sequence, in tokens.
        norm: ``"rms"`` (arXiv:1910.07467) or ``"layer"`` (arXiv:1607.06450).
        positions: ``"rope"`` (arXiv:2104.09864) or a ``"learned"`` table.
        rope_theta: rotary base; unused with learned positions.
        rope_scaling: Llama 3.1 context stretching, or ``None``.
        activation: ``"swiglu"`` (arXiv:2002.05202) or tanh-approximated ``"gelu"``.
        experts: what every block has in place of one feed-forward part, or ``None``.
        use_bias: give every linear map and every layer norm a bias.
        tied_head: reuse the token table as the output head.
        norm_eps: added to the variance inside the norms.
        scan_layers: stack the blocks' parameters and scan over them, so that the
            program does not grow with depth.
        dtype: type activations are computed in; logits and softmax are float32.
        param_dtype: type parameters are held in.

    Raises:
        ValueError: a field is out of range, or two fields disagree.

    >>> from dataclasses import replace
    >>> tiny = DecoderConfig(name="t", vocab=256, layers=2, embed=64, heads=8,
    ...                      kv_heads=4, head_dim=8, mlp=128, max_seq=64)
    >>> tiny.group, replace(tiny, kv_heads=8).group
    (2, 1)
    """

    name: str
    vocab: int
    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    max_seq: int
    norm: Norm = "rms"
    positions: Positions = "rope"
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    activation: Activation = "swiglu"
    experts: Experts | None = None
    use_bias: bool = False
    tied_head: bool = False
    norm_eps: float = 1e-5
    scan_layers: bool = True
    dtype: FloatType = "bfloat16"
    param_dtype: FloatType = "float32"

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads

    def __post_init__(self) -> None:
        where = f"DecoderConfig {self.name!r}"
        for field in _SIZES:
            _check_positive_int(where, field, getattr(self, field))
        for field in _FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(
                    f"{where}: {field}={getattr(self, field)!r} must be True or False"
                )
        _check_choice(where, "norm", self.norm, get_args(Norm))
        _check_choice(where, "positions", self.positions, get_args(Positions))
        _check_choice(where, "activation", self.activation, get_args(Activation))
        _check_choice(where, "dtype", self.dtype, get_args(FloatType))
        _check_choice(where, "param_dtype", self.param_dtype, get_args(FloatType))
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{where}: heads={self.heads} is not a multiple of "
                f"kv_heads={self.kv_heads}; every key head serves the same number of "
                "query heads, so choose a kv_heads that divides heads"
            )
        if self.norm_eps <= 0:
            raise ValueError(
                f"{where}: norm_eps={self.norm_eps!r} must be positive; with 0 a "
                "constant activation divides by zero"
            )
        if self.experts is not None and self.use_bias:
            raise ValueError(
                f"{where}: use_bias=True and experts={self.experts!r}; experts have no "
                "biases, so leave one of the two out"
            )
        if self.positions == "rope":
            if self.head_dim % 2:
                raise ValueError(
                    f"{where}: head_dim={self.head_dim} is odd; rotary positions turn "
                    'pairs of features, so make it even or use positions="learned"'
                )
            if self.rope_theta <= 1:
                raise ValueError(
                    f"{where}: rope_theta={self.rope_theta!r} must exceed 1 "
                    "(GPT-NeoX and Llama 2 use 10000, Llama 3 uses 500000)"
                )
        elif self.rope_scaling is not None:
            raise ValueError(
                f"{where}: rope_scaling is set but positions={self.positions!r} has no "
                'rotations to scale; drop rope_scaling or use positions="rope"'
            )


def num_params(config: DecoderConfig) -> int:
    """Count the parameters of a decoder in closed form.

    A tied head is counted once, and every expert of a mixture.

    >>> from autoshard.models.registry import get
    >>> num_params(get("gpt2-124m"))
    124439808
    """
    c = config
    bias = int(c.use_bias)
    norm = c.embed * (2 if c.norm == "layer" and c.use_bias else 1)
    attention = 2 * c.embed * (c.heads + c.kv_heads) * c.head_dim
    attention += bias * ((c.heads + 2 * c.kv_heads) * c.head_dim + c.embed)
    inputs = 2 if c.activation == "swiglu" else 1
    mlp = (inputs + 1) * c.embed * c.mlp + bias * (inputs * c.mlp + c.embed)
    if c.experts is not None:
        mlp = c.experts.count * (mlp + c.embed)  # its column of the router, too
    tables = c.vocab * c.embed * (1 if c.tied_head else 2)
    if c.positions == "learned":
        tables += c.max_seq * c.embed
    return tables + c.layers * (2 * norm + attention + mlp) + norm


def _check_positive_int(where: str, field: str, value: object) -> None:
    # bool is an int in Python, and True would pass as a size of 1.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {field}={value!r} must be a positive int")


def _check_choice(where: str, field: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(
            f"{where}: {field}={value!r} is not known; choose one of "
            + ", ".join(map(repr, choices))
        )
