"""The pre-norm decoder block of the Qwen and Llama families, with room for a ParScale prefix."""

import functools

import jax
from flax import nnx

from hackle.layers.attention import attention
from hackle.layers.attention.dispatch import check_implementation
from hackle.layers.attention.masks import Mask
from hackle.layers.cache import KeyValueCache
from hackle.layers.linear import Linear
from hackle.layers.mlp import GatedMLP
from hackle.layers.norm import RMSNorm
from hackle.layers.parscale.prefix import StreamPrefix
from hackle.layers.rotary import Llama3Scaling, rotary
from hackle.layers.sharding import constrain


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions on `[B, L, D]`, or on streams `[P, B, L, D]`.

    Args:
      width: D.
      heads, kv_heads, head_width: H, K, E.
      rope_theta, rope_scaling: base of the rotary frequencies, and what is done to them.
      bias: whether query, key and value projections have one (Qwen2: yes); the output has none.
      qk_norm: whether every head of query and key is normed before it is rotated (Qwen3: yes).
      norm_eps: of these norms.
      streams, prefix_length: with two or more streams, each has `prefix_length` learned keys and
        values, and the layer takes `[P, B, L, D]`.
      implementation: passed to `attention`.

    Raises:
      ValueError: no implementation has this name.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        *,
        rope_theta: float = 10000.0,
        rope_scaling: Llama3Scaling | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        streams: int = 1,
        prefix_length: int = 0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_implementation(implementation)

        def projection(count: int, axis: str) -> Linear:
            axes = ("embed", axis, "head_width")
            return Linear((width,), (count, head_width), axes, bias=bias, rngs=rngs)

        def head_norm() -> RMSNorm | None:
            return RMSNorm(head_width, norm_eps, axis="head_width", rngs=rngs) if qk_norm else None

        self.query = projection(heads, "heads")
        self.key = projection(kv_heads, "kv_heads")
        self.value = projection(kv_heads, "kv_heads")
        self.output = Linear(
            (heads, head_width), (width,), ("heads", "head_width", "embed"), rngs=rngs
        )
        self.query_norm, self.key_norm = head_norm(), head_norm()
        self.prefix = (
            StreamPrefix(streams, kv_heads, prefix_length, head_width, rngs=rngs)
            if streams > 1 and prefix_length > 0
            else None
        )
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.implementation = implementation

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of `x`; queries and keys rotated to `positions [B, L]`."""
        query, key = self.query(x), self.key(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotary(query, positions, self.rope_theta, self.rope_scaling)
        key = rotary(key, positions, self.rope_theta, self.rope_scaling)
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
        self, x: jax.Array, positions: jax.Array, mask: Mask, cache: KeyValueCache, layer: jax.Array
    ) -> tuple[jax.Array, KeyValueCache]:
        """Stores the tokens of `x` in `cache` (which holds the prefix) and attends to its slots;
        mask over L x S."""
        query, key, value = self.project(x, positions)
        cache = cache.write(layer, key, value)
        key, value = cache.read(layer)
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
        self.attention = SelfAttention(width, norm_eps=norm_eps, **attention, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, mask: Mask) -> jax.Array:
        """`[B, L, D]` (or `[P, B, L, D]`) to the same; see `SelfAttention`."""
        x = constrain_residual(x + self.attention(self.attention_norm(x), positions, mask))
        return constrain_residual(x + self.mlp(self.mlp_norm(x)))

    def extend(
        self, x: jax.Array, positions: jax.Array, mask: Mask, cache: KeyValueCache, layer: jax.Array
    ) -> tuple[jax.Array, KeyValueCache]:
        """As `__call__`, for tokens that follow those in the cache; mask over its slots."""
        normed = self.attention_norm(x)
        out, cache = self.attention.extend(normed, positions, mask, cache, layer)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), cache


def constrain_residual(x: jax.Array) -> jax.Array:
    """Lays `[B, L, D]` or `[P, B, L, D]` over the mesh: streams, batch and length, never width."""
    axes = ("batch", "length", None)
    return constrain(x, *(("stream", *axes) if x.ndim == 4 else axes))
