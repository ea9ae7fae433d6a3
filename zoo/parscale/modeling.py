"""ParScale language model (arXiv 2505.10475): P streams through one dense trunk.

    x_p    = embedding(tokens)                        the same input for every stream p
    f_p    = trunk(x_p; prefix_p)                     learned prefix keys/values in every layer
    y      = sum_p w_p f_p,  w = smooth(softmax(MLP([f_1; ...; f_P])))       Eq. 2, 6, 7
    logits = head(y)

With P = 1 there is neither prefix nor aggregator: names and numbers are those of Qwen2.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from hackle.layers.causal_decoder import CausalDecoder
from hackle.layers.parscale import StreamAggregator, split_streams


@dataclasses.dataclass(frozen=True)
class ParScaleConfig:
    """What the model is; the last three fields say how it starts and runs.

    Attributes:
      streams: P.
      prefix_length: T, learned keys a layer and stream; ignored when P = 1.
      smoothing: share of the aggregation weight that is spread evenly over the streams.
      max_length: the rotary range the model is meant for, in tokens; prefixes take none of it.
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
    streams: int
    prefix_length: int = 48
    smoothing: float = 0.1
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    embedding_std: float = dataclasses.field(default=0.02, compare=False)
    remat: str = "none"
    attention: str | None = None

    def parameter_count(self, embedding: bool = True) -> int:
        """Exact number of parameters; `embedding=False` leaves out the table and the head."""
        d, p, kv = self.width, self.streams, self.kv_heads * self.head_width
        q = self.heads * self.head_width
        attention = d * (q + 2 * kv) + (q + 2 * kv) + q * d
        count = self.depth * (attention + 3 * d * self.mlp_width + 2 * d) + d
        if p > 1:
            count += self.depth * p * self.prefix_length * 2 * kv + p * d * d + d + d * p + p
        tables = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return count + (tables if embedding else 0)

    @classmethod
    def tiny(cls, streams: int = 4, **changes) -> "ParScaleConfig":
        """Small enough to learn something on a laptop within minutes."""
        sizes = dict(vocab_size=4096, width=128, mlp_width=384, depth=4, heads=4, kv_heads=2)
        rest = dict(head_width=32, max_length=512, prefix_length=48, embedding_std=0.08)
        return cls(**{**sizes, **rest, "streams": streams, **changes})

    @classmethod
    def _released(cls, width: int, mlp_width: int, streams: int, **changes) -> "ParScaleConfig":
        """36 layers, 16 query and 2 key heads, Qwen2.5's vocabulary, 2048 tokens (appendix)."""
        sizes = dict(width=width, mlp_width=mlp_width, head_width=width // 16, streams=streams)
        common = dict(vocab_size=151936, depth=36, heads=16, kv_heads=2, max_length=2048)
        return cls(**{**sizes, **common, **changes})

    @classmethod
    def parscale_0_7b(cls, streams: int = 1, **changes) -> "ParScaleConfig":
        return cls._released(896, 4864, streams, **changes)

    @classmethod
    def parscale_0_9b(cls, streams: int = 1, **changes) -> "ParScaleConfig":
        return cls._released(1024, 5504, streams, **changes)

    @classmethod
    def parscale_1_3b(cls, streams: int = 1, **changes) -> "ParScaleConfig":
        return cls._released(1280, 6912, streams, **changes)

    @classmethod
    def parscale_1_8b(cls, streams: int = 1, **changes) -> "ParScaleConfig":
        return cls._released(1536, 8320, streams, **changes)

    @classmethod
    def parscale_3b(cls, streams: int = 1, **changes) -> "ParScaleConfig":
        return cls._released(2048, 11008, streams, **changes)

    @classmethod
    def parscale_4_7b(cls, streams: int = 1, **changes) -> "ParScaleConfig":
        return cls._released(2560, 13824, streams, **changes)

    @classmethod
    def qwen_3b(cls, streams: int = 1, **changes) -> "ParScaleConfig":
        """The models started from Qwen2.5-3B: as `parscale_3b`, with its rotary base."""
        return cls._released(2048, 11008, streams, **{"rope_theta": 1e6, **changes})


class ParScaleLM(CausalDecoder):
    """Causal language model `tokens [B, L] -> logits [B, L, V]`; see `CausalDecoder`.

    Arrays of the trunk are `[P, B, L, D]` when P > 1. Parameters are float32 until cast.

    Raises:
      ValueError: `streams`, `prefix_length` or `smoothing` out of range.
    """

    def __init__(self, config: ParScaleConfig, *, rngs: nnx.Rngs):
        if config.streams < 1:
            raise ValueError(f"streams must be >= 1, got {config.streams}")
        if config.prefix_length < 0:
            raise ValueError(f"prefix_length must be >= 0, got {config.prefix_length}")
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
            qkv_bias=True,
            streams=config.streams,
            prefix_length=config.prefix_length,
            embedding_std=config.embedding_std,
            remat=config.remat,
            attention=config.attention,
            rngs=rngs,
        )
        self.config = config
        self.aggregator = (
            StreamAggregator(config.streams, config.width, config.smoothing, rngs=rngs)
            if config.streams > 1
            else None
        )

    def split(self, x: jax.Array) -> jax.Array:
        """`[B, L, D] -> [P, B, L, D]`; nothing when P = 1."""
        return x if self.aggregator is None else split_streams(x, self.streams)

    def join(self, x: jax.Array) -> jax.Array:
        """`[P, B, L, D] -> [B, L, D]`; nothing when P = 1."""
        return x if self.aggregator is None else self.aggregator(x)


def is_stream_parameter(path: tuple) -> bool:
    """Whether a state path names a prefix or the aggregator: what retrofitting adds."""
    return "prefix" in path or "aggregator" in path


def retrofit(
    trunk: CausalDecoder,
    streams: int,
    *,
    prefix_length: int = 48,
    smoothing: float = 0.1,
    rngs: nnx.Rngs,
    **changes: Any,
) -> ParScaleLM:
    """A ParScale model of P streams around a trained P=1 model (two-stage training, section 4).

    The new parameters are N(0, 0.02^2), biases 0; all others are the trunk's own arrays, shared
    and not copied. `trunk` is a `ParScaleLM` with one stream or a dense model with biases on
    query, key and value. `changes` are other fields of the new config, e.g. `remat`.

    Raises:
      ValueError: the trunk has streams already, or cannot be a ParScale trunk.
    """
    config = trunk.config
    if not isinstance(trunk, CausalDecoder):
        raise ValueError(
            f"a ParScale trunk attends to what it reads; {type(trunk).__name__} does not"
        )
    fields = {field.name for field in dataclasses.fields(ParScaleConfig)}
    known = {k: v for k, v in dataclasses.asdict(config).items() if k in fields}
    if known.get("streams", 1) != 1:
        raise ValueError(f"the trunk has {known['streams']} streams already; expected 1")
    if not getattr(config, "qkv_bias", True):
        raise ValueError("a ParScale trunk has biases on query, key and value; this one has none")
    for name in ("qk_norm", "rope_scaling"):
        if value := getattr(config, name, None):
            raise ValueError(f"a ParScale trunk has no {name}; this one has {value}")
    known |= {"streams": streams, "prefix_length": prefix_length, "smoothing": smoothing}
    known |= changes
    model = ParScaleLM(ParScaleConfig(**known), rngs=rngs)
    trained = nnx.to_flat_state(nnx.state(trunk, nnx.Param))
    nnx.update(model, nnx.from_flat_state(trained))
    return model
