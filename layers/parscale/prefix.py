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

        Each stream then attends on its own. `attention` takes no axis of streams, so map over it;
        the mask is the same for all of them and stays outside:

            key, value, mask = prefix.prepend(key, value, masks.Causal())
            run = jax.vmap(lambda q, k, v: attention(q, k, v, mask=mask))
            out = run(query, key, value)  # query and out [P, B, L, H, E]

        Args:
          mask: over the L x L tokens, without the prefix; None hides nothing.

        Returns:
          Keys and values `[P, B, length + L, K, E]`, and the mask in which every query sees the
          whole prefix.

        Raises:
          ValueError: key or value has another rank, number of streams or heads, or head width, or
            is not floating-point; or their shapes differ.
        """
        self._check("key", key)
        self._check("value", value)
        if key.shape != value.shape:
            raise ValueError(
                f"StreamPrefix: key {key.shape} and value {value.shape} differ in shape"
            )

        def join(prefix: nnx.Param, tokens: jax.Array) -> jax.Array:
            first = jnp.swapaxes(prefix[...], 1, 2).astype(tokens.dtype)  # [P, length, K, E]
            shape = (*tokens.shape[:2], *first.shape[1:])
            return jnp.concatenate([jnp.broadcast_to(first[:, None], shape), tokens], axis=2)

        return join(self.key, key), join(self.value, value), Prefix(self.length, mask)

    def __call__(
        self, key: jax.Array, value: jax.Array, mask: Mask | None
    ) -> tuple[jax.Array, jax.Array, Mask]:
        """As `prepend`; Linen's `init` and `apply` call this."""
        return self.prepend(key, value, mask)

    def _check(self, name: str, tokens: jax.Array) -> None:
        streams, heads, _, width = self.key.shape
        if tokens.ndim != 5:
            raise ValueError(
                f"StreamPrefix: {name} must be [streams, batch, length, kv_heads, head_width], "
                f"got shape {tokens.shape}"
            )
        expected = (("streams", 0, streams), ("kv_heads", 3, heads), ("head_width", 4, width))
        for what, axis, size in expected:
            if tokens.shape[axis] != size:
                raise ValueError(
                    f"StreamPrefix: {name} must have {what} {size} on axis {axis}, "
                    f"got {tokens.shape[axis]} in shape {tokens.shape}"
                )
        if not jnp.issubdtype(tokens.dtype, jnp.floating):
            # The prefix would be cut to integers.
            raise ValueError(f"StreamPrefix: {name} must be floating-point, got {tokens.dtype}")
