"""A decoder given by its numbers: what one of its layers computes and holds.

This is what a published configuration says of a model, and what a search needs of one
before it traces it. A layer is attention and an MLP, dense or with experts; norms,
biases and rotary tables hold less than a thousandth of the parameters and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoshard.ir.errors import InputError


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a decoder-only transformer.

    Attributes:
        layers: Transformer layers.
        embed: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        mlp: Hidden width of the MLP; of one expert, where there are experts.
        vocab: Rows of the embedding.
        gated: Whether the MLP has a gate (three matrices rather than two).
        tied: Whether the output projection is the embedding.
        experts: Experts of a mixture layer; 0 for a dense model.
        top_k: Experts that a token goes to.
        dense_layers: Layers with a dense MLP in a model with experts.
        dense_mlp: Hidden width of that MLP.
        shared_mlp: Hidden width of experts that every token goes to.
        attention_params: Parameters of one layer's projections where they are not
            those of plain attention (a latent one); 0 for plain attention.

    Raises:
        InputError: A size is not positive, or sizes contradict each other.

    >>> Decoder(32, 4096, 32, 8, 128, 14336, 128256).params / 1e9
    8.029995008
    """

    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    gated: bool = True
    tied: bool = False
    experts: int = 0
    top_k: int = 0
    dense_layers: int = 0
    dense_mlp: int = 0
    shared_mlp: int = 0
    attention_params: int = 0

    def __post_init__(self) -> None:
        """Checks the sizes."""
        for name in (
            "layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab"
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise InputError(
                    f"a decoder has {name} = {getattr(self, name)}; it must be positive"
                )
        if self.experts and not 0 < self.top_k <= self.experts:
            raise InputError(
                f"a decoder of {self.experts} experts has top_k = {self.top_k}; it "
                "must be from 1 to the number of experts"
            )
        if self.dense_layers > self.layers:
            raise InputError(
                f"a decoder of {self.layers} layers has {self.dense_layers} dense ones"
            )

    @property
    def matrices(self) -> int:
        """Matrices of an MLP."""
        return 3 if self.gated else 2

    @property
    def attention_matmul_params(self) -> int:
        """Parameters of one layer's attention projections."""
        if self.attention_params:
            return self.attention_params
        return self.embed * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def expert_params(self) -> int:
        """Parameters of all experts of one mixture layer."""
        return self.experts * self.matrices * self.embed * self.mlp

    @property
    def plain_params(self) -> float:
        """Parameters of an average layer that are not experts': every token's."""
        moe = self.moe_share
        dense = self.dense_mlp if self.experts else self.mlp
        width = (1 - moe) * dense + moe * self.shared_mlp
        router = moe * self.experts * self.embed
        mlp = self.matrices * self.embed * width
        return self.attention_matmul_params + mlp + router

    @property
    def moe_share(self) -> float:
        """Share of the layers that have experts."""
        return (self.layers - self.dense_layers) / self.layers if self.experts else 0.0

    @property
    def layer_params(self) -> float:
        """Parameters of an average layer."""
        return self.plain_params + self.moe_share * self.expert_params

    @property
    def active_layer_params(self) -> float:
        """Parameters of an average layer that one token is multiplied with."""
        used = self.top_k / self.experts if self.experts else 0.0
        return self.plain_params + self.moe_share * self.expert_params * used

    @property
    def vocab_params(self) -> int:
        """Parameters of the embedding and, where it is another, the output matrix."""
        return self.vocab * self.embed * (1 if self.tied else 2)

    @property
    def params(self) -> float:
        """All parameters."""
        return self.layers * self.layer_params + self.vocab_params

    def model_flops_per_token(self, seq: int) -> float:
        """FLOPs of forward and backward of one token, nothing recomputed.

        Six for each parameter that the token is multiplied with, and those of causal
        attention, where a token sees half of the sequence on average (Chowdhery et al.
        2022, arXiv:2204.02311, appendix B, halved for the mask).
        """
        matmul = self.layers * self.active_layer_params + self.vocab * self.embed
        return 6 * matmul + 6 * self.layers * self.heads * self.head_dim * seq
