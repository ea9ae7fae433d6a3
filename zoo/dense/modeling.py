"""Dense decoder of the Qwen2, Qwen2.5, Qwen3 and Llama families: the trunk of the others.

embedding -> depth x (norm, attention, norm, gated MLP) -> norm -> head. The families differ in
three fields: Qwen2 and Qwen2.5 have biases on query, key and value; Qwen3 has none, and norms every
head of query and key instead; Llama has neither, and stretches its rotary frequencies from 3.1 on.
"""

import dataclasses
from collections.abc import Mapping

from flax import nnx

from hackle.layers.causal_decoder import CausalDecoder
from hackle.layers.rotary import Llama3Scaling


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """What the model is; the last three fields say how it starts and runs.

    Attributes:
      max_length: the rotary range the model is meant for, in tokens.
      qkv_bias: query, key and value projections have a bias.
      qk_norm: every head of query and key is normed before it is rotated.
      rope_scaling: what is done to the rotary frequencies; None leaves them. A mapping of its
        fields, as JSON files hold it, becomes one.
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
    qk_norm: bool = False
    rope_scaling: Llama3Scaling | None = None
    embedding_std: float = dataclasses.field(default=0.02, compare=False)
    remat: str = "none"
    attention: str | None = None

    def __post_init__(self):
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", Llama3Scaling(**self.rope_scaling))

    def parameter_count(self, embedding: bool = True) -> int:
        """Exact number of parameters; `embedding=False` leaves out the table and the head."""
        d, e = self.width, self.head_width
        heads = self.heads + 2 * self.kv_heads
        attention = d * e * (heads + self.heads)
        attention += (e * heads if self.qkv_bias else 0) + (2 * e if self.qk_norm else 0)
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

    @classmethod
    def _qwen3(cls, width, mlp_width, depth, heads, tied, **changes) -> "DenseConfig":
        sizes = dict(width=width, mlp_width=mlp_width, depth=depth, heads=heads, kv_heads=8)
        kind = dict(head_width=128, qkv_bias=False, qk_norm=True, tie_embeddings=tied)
        common = dict(vocab_size=151936, max_length=40960, rope_theta=1e6)
        return cls(**{**sizes, **kind, **common, **changes})

    @classmethod
    def qwen3_0_6b(cls, **changes) -> "DenseConfig":
        return cls._qwen3(1024, 3072, 28, 16, True, **changes)

    @classmethod
    def qwen3_1_7b(cls, **changes) -> "DenseConfig":
        return cls._qwen3(2048, 6144, 28, 16, True, **changes)

    @classmethod
    def qwen3_4b(cls, **changes) -> "DenseConfig":
        return cls._qwen3(2560, 9728, 36, 32, True, **changes)

    @classmethod
    def qwen3_8b(cls, **changes) -> "DenseConfig":
        return cls._qwen3(4096, 12288, 36, 32, False, **changes)

    @classmethod
    def qwen3_14b(cls, **changes) -> "DenseConfig":
        return cls._qwen3(5120, 17408, 40, 40, False, **changes)

    @classmethod
    def qwen3_32b(cls, **changes) -> "DenseConfig":
        return cls._qwen3(5120, 25600, 64, 64, False, **changes)

    @classmethod
    def _llama3(cls, width, mlp_width, depth, heads, **changes) -> "DenseConfig":
        sizes = dict(width=width, mlp_width=mlp_width, depth=depth, heads=heads, kv_heads=8)
        kind = dict(head_width=width // heads, qkv_bias=False, tie_embeddings=False)
        common = dict(vocab_size=128256, max_length=8192, rope_theta=5e5, norm_eps=1e-5)
        return cls(**{**sizes, **kind, **common, **changes})

    @classmethod
    def llama3_8b(cls, **changes) -> "DenseConfig":
        return cls._llama3(4096, 14336, 32, 32, **changes)

    @classmethod
    def llama3_70b(cls, **changes) -> "DenseConfig":
        return cls._llama3(8192, 28672, 80, 64, **changes)

    @classmethod
    def llama3_1_8b(cls, **changes) -> "DenseConfig":
        return cls.llama3_8b(**{**_stretched(8), **changes})

    @classmethod
    def llama3_1_70b(cls, **changes) -> "DenseConfig":
        """Llama 3.3 70B, too."""
        return cls.llama3_70b(**{**_stretched(8), **changes})

    @classmethod
    def llama3_2_1b(cls, **changes) -> "DenseConfig":
        small = dict(tie_embeddings=True, **_stretched(32))
        return cls._llama3(2048, 8192, 16, 32, **{**small, **changes})

    @classmethod
    def llama3_2_3b(cls, **changes) -> "DenseConfig":
        small = dict(tie_embeddings=True, **_stretched(32))
        return cls._llama3(3072, 8192, 28, 24, **{**small, **changes})


def _stretched(factor: float) -> dict:
    return dict(max_length=131072, rope_scaling=Llama3Scaling(factor))


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
            qk_norm=config.qk_norm,
            rope_scaling=config.rope_scaling,
            embedding_std=config.embedding_std,
            remat=config.remat,
            attention=config.attention,
            rngs=rngs,
        )
        self.config = config
