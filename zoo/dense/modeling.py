"""Dense decoder of the Qwen2 / Qwen2.5 family: the P=1 trunk of ParScale.

embedding -> depth x (norm, attention, norm, gated MLP) -> norm -> head.
"""

import dataclasses

from flax import nnx

from hackle.layers.causal_decoder import CausalDecoder


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """What the model is; the last three fields say how it starts and runs.

    Attributes:
      max_length: the rotary range the model is meant for, in tokens.
      embedding_std: standard deviation of the embedding's first entries; two configs that differ
        in it alone are equal, and published files do not hold it.
      remat: what the backward pass recomputes, one of `layers.REMAT_POLICIES`.
      attention: implementation passed to `layers.attention`; None chooses.
    """

    vocab_size: int
    width: int
    mlp_width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    max_length: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = True
    embedding_std: float = dataclasses.field(default=0.02, compare=False)
    remat: str = "none"
    attention: str | None = None

    def parameter_count(self, embedding: bool = True) -> int:
        """Exact number of parameters; `embedding=False` leaves out the table and the head."""
        d, e = self.width, self.head_width
        heads = self.heads + 2 * self.kv_heads
        attention = d * e * (heads + self.heads) + (e * heads if self.qkv_bias else 0)
        count = self.depth * (attention + 3 * d * self.mlp_width + 2 * d) + d
        tables = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return count + (tables if embedding else 0)

    @classmethod
    def tiny(cls, **changes) -> "DenseConfig":
        """Small enough to learn something on a laptop within minutes."""
        sizes = dict(vocab_size=4096, width=128, mlp_width=384, depth=4, heads=4, kv_heads=2)
        rest = dict(head_width=32, max_length=512, embedding_std=0.08)
        return cls(**{**sizes, **rest, **changes})

    @classmethod
    def _qwen2_5(cls, width, mlp_width, depth, heads, kv_heads, **changes) -> "DenseConfig":
        sizes = dict(width=width, mlp_width=mlp_width, depth=depth, heads=heads, kv_heads=kv_heads)
        common = dict(vocab_size=152064, max_length=32768, rope_theta=1e6, tie_embeddings=False)
        return cls(**{**sizes, "head_width": width // heads, **common, **changes})

    @classmethod
    def qwen2_5_0_5b(cls, **changes) -> "DenseConfig":
        small = dict(vocab_size=151936, tie_embeddings=True)
        return cls._qwen2_5(896, 4864, 24, 14, 2, **{**small, **changes})

    @classmethod
    def qwen2_5_1_5b(cls, **changes) -> "DenseConfig":
        small = dict(vocab_size=151936, tie_embeddings=True)
        return cls._qwen2_5(1536, 8960, 28, 12, 2, **{**small, **changes})

    @classmethod
    def qwen2_5_3b(cls, **changes) -> "DenseConfig":
        small = dict(vocab_size=151936, tie_embeddings=True)
        return cls._qwen2_5(2048, 11008, 36, 16, 2, **{**small, **changes})

    @classmethod
    def qwen2_5_7b(cls, **changes) -> "DenseConfig":
        large = dict(max_length=131072)
        return cls._qwen2_5(3584, 18944, 28, 28, 4, **{**large, **changes})

    @classmethod
    def qwen2_5_14b(cls, **changes) -> "DenseConfig":
        large = dict(max_length=131072, norm_eps=1e-5)
        return cls._qwen2_5(5120, 13824, 48, 40, 8, **{**large, **changes})

    @classmethod
    def qwen2_5_32b(cls, **changes) -> "DenseConfig":
        large = dict(max_length=131072, norm_eps=1e-5)
        return cls._qwen2_5(5120, 27648, 64, 40, 8, **{**large, **changes})

    @classmethod
    def qwen2_5_72b(cls, **changes) -> "DenseConfig":
        large = dict(max_length=131072, norm_eps=1e-5)
        return cls._qwen2_5(8192, 29568, 80, 64, 8, **{**large, **changes})


class DenseLM(CausalDecoder):
    """Causal language model `tokens [B, L] -> logits [B, L, V]`; see `CausalDecoder`.

    Parameters are float32 until cast.
    """

    def __init__(self, config: DenseConfig, *, rngs: nnx.Rngs):
        super().__init__(
            vocab_size=config.vocab_size,
            width=config.width,
            mlp_width=config.mlp_width,
            depth=config.depth,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            rope_theta=config.rope_theta,
            norm_eps=config.norm_eps,
            tie_embeddings=config.tie_embeddings,
            qkv_bias=config.qkv_bias,
            embedding_std=config.embedding_std,
            remat=config.remat,
            attention=config.attention,
            rngs=rngs,
        )
        self.config = config
