"""The transform that makes streams differ: learned keys and values before those of the tokens."""

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers.attention.masks import Mask, Prefix
from hackle.layers.parameter import normal, parameter


class StreamPrefix(nnx.Module):
    """Keys and values `[P, K, length, E]` that stream p sees before its tokens, in one layer.

    They are used as they are stored: no rotary embedding, as if all stood at position 0
    (arXiv 2505.10475, section 3.1). They start as N(0, 0.02^2).

    Raises:
      ValueError: a size is not positive.
    """

    def __init__(
        self, streams: int, kv_heads: int, length: int, head_width: int, *, rngs: nnx.Rngs
    ):
        shape = (streams, kv_heads, length, head_width)
        axes = ("stream", "kv_heads", "prefix", "head_width")
        self.key = parameter(rngs, shape, axes, normal(0.02))
        self.value = parameter(rngs, shape, axes, normal(0.02))
        self.length = length

    def prepend(
        self, key: jax.Array, value: jax.Array, mask: Mask | None
    ) -> tuple[jax.Array, jax.Array, Mask]:
        """Puts the prefix before keys and values `[P, B, L, K, E]`.

        Returns:
          Keys and values `[P, B, length + L, K, E]`, and the mask in which every query sees the
          whole prefix.
        """

        def join(prefix: nnx.Param, tokens: jax.Array) -> jax.Array:
            first = jnp.swapaxes(prefix[...], 1, 2).astype(tokens.dtype)  # [P, length, K, E]
            shape = (*tokens.shape[:2], *first.shape[1:])
            return jnp.concatenate([jnp.broadcast_to(first[:, None], shape), tokens], axis=2)

        return join(self.key, key), join(self.value, value), Prefix(self.length, mask)
