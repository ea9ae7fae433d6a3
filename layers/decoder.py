"""The pre-norm decoder block of the Qwen2 / Llama family, with room for a ParScale prefix."""

import functools

import jax
from flax import nnx

from hackle.layers.attention import attention
from hackle.layers.attention.masks import Mask
from hackle.layers.cache import KeyValueCache
from hackle.layers.linear import Linear
from hackle.layers.mlp import GatedMLP
from hackle.layers.norm import RMSNorm
from hackle.layers.parscale.prefix import StreamPrefix
from hackle.layers.rotary import rotary
from hackle.layers.sharding import constrain


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions on `[B, L, D]`, or on streams `[P, B, L, D]`.

    Args:
      width: D.
      heads, kv_heads, head_width: H, K, E.
      rope_theta: base of the rotary frequencies.
      bias: whether query, key and value projections have one (Qwen2: yes); the output has none.
      streams, prefix_length: with two or more streams, each has `prefix_length` learned keys and
        values, and the layer takes `[P, B, L, D]`.
      implementation: passed to `attention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        *,
        rope_theta: float = 10000.0,
        bias: bool = False,
        streams: int = 1,
        prefix_length: int = 0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        def projection(count: int, axis: str) -> Linear:
            axes = ("embed", axis, "head_width")
            return Linear((width,), (count, head_width), axes, bias=bias, rngs=rngs)

        self.query = projection(heads, "heads")
        self.key = projection(kv_heads, "kv_heads")
        self.value = projection(kv_heads, "kv_heads")
        self.output = Linear(
            (heads, head_width), (width,), ("heads", "head_width", "embed"), rngs=rngs
        )
        self.prefix = (
            StreamPrefix(streams, kv_heads, prefix_length, head_width, rngs=rngs)
            if streams > 1 and prefix_length > 0
            else None
        )
        self.rope_theta = rope_theta
        self.implementation = implementation

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of `x`; queries and keys rotated to `positions [B, L]`."""
        query = rotary(self.query(x), positions, self.rope_theta)
        key = rotary(self.key(x), positions, self.rope_theta)
        return query, key, self.value(x)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> jax.Array:
        """Attention, each stream on its own; then the output projection."""
        run = functools.partial(attention, mask=mask, implementation=self.implementation)
        if query.ndim == 5:
            run = jax.vmap(run)
        return self.output(run(query, key, value))

    def __call__(self, x: jax.Array, positions: jax.Array, mask: Mask) -> jax.Array:
        """Attends within `x`; positions int `[B, L]`, mask over L x L."""
        query, key, value = self.project(x, positions)
        if self.prefix is not None:
            key, value, mask = self.prefix.prepend(key, value, mask)
        return self.attend(query, key, value, mask)

    def extend(
        self, x: jax.Array, positions: jax.Array, cache: KeyValueCache, layer: jax.Array
    ) -> tuple[jax.Array, KeyValueCache]:
        """Stores the tokens of `x` in `cache` (which holds the prefix) and attends to all of it."""
        query, key, value = self.project(x, positions)
        cache = cache.write(layer, key, value)
        key, value = cache.read(layer)
        mask = cache.mask(positions)
        return self.attend(query, key.astype(x.dtype), value.astype(x.dtype), mask), cache


class DecoderBlock(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Keyword arguments beyond the two here are those of `SelfAttention`.
    """

    def __init__(
        self, width: int, mlp_width: int, *, norm_eps: float = 1e-6, rngs: nnx.Rngs, **attention
    ):
        self.attention_norm = RMSNorm(width, norm_eps, rngs=rngs)
        self.mlp_norm = RMSNorm(width, norm_eps, rngs=rngs)
        self.mlp = GatedMLP(width, mlp_width, rngs=rngs)
        # Last, and its prefix last of all: the trunk's first weights do not depend on streams.
        self.attention = SelfAttention(width, **attention, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, mask: Mask) -> jax.Array:
        """`[B, L, D]` (or `[P, B, L, D]`) to the same; see `SelfAttention`."""
        x = constrain_residual(x + self.attention(self.attention_norm(x), positions, mask))
        return constrain_residual(x + self.mlp(self.mlp_norm(x)))

    def extend(
        self, x: jax.Array, positions: jax.Array, cache: KeyValueCache, layer: jax.Array
    ) -> tuple[jax.Array, KeyValueCache]:
        """As `__call__`, for tokens that follow those in the cache."""
        out, cache = self.attention.extend(self.attention_norm(x), positions, cache, layer)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), cache


def constrain_residual(x: jax.Array) -> jax.Array:
    """Lays `[B, L, D]` or `[P, B, L, D]` over the mesh: streams, batch and length, never width."""
    axes = ("batch", "length", None)
    return constrain(x, *(("stream", *axes) if x.ndim == 4 else axes))
