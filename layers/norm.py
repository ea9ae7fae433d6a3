"""Root-mean-square normalisation (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers.parameter import parameter


class RMSNorm(nnx.Module):
    """`y = scale * x / sqrt(mean(x^2) + eps)` over the last axis, in float32 or wider."""

    def __init__(self, width: int, eps: float = 1e-6, *, rngs: nnx.Rngs):
        self.scale = parameter(rngs, (width,), ("embed",), nnx.initializers.ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]` in the dtype of `x`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * self.scale[...]).astype(x.dtype)
