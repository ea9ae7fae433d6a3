"""Root-mean-square normalisation (arXiv 1910.07467), plain and gated."""

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers.parameter import parameter


class RMSNorm(nnx.Module):
    """`y = scale * x / sqrt(mean(x^2) + eps)` over the last axis, in float32 or wider.

    `axis` is the logical name of that axis.
    """

    def __init__(self, width: int, eps: float = 1e-6, *, axis: str = "embed", rngs: nnx.Rngs):
        self.scale = parameter(rngs, (width,), (axis,), nnx.initializers.ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D] -> [..., D]` in the dtype of `x`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return _normalize(wide, self.scale[...], self.eps).astype(x.dtype)


class GatedRMSNorm(nnx.Module):
    """`RMSNorm(x * silu(gate))`, gated before it is normed as in Mamba-2 (arXiv 2405.21060)."""

    def __init__(self, width: int, eps: float = 1e-6, *, rngs: nnx.Rngs):
        self.scale = parameter(rngs, (width,), ("state",), nnx.initializers.ones)
        self.eps = eps

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """`[..., D]` twice to `[..., D]`, in the dtype of `x`."""
        kind = jnp.promote_types(x.dtype, jnp.float32)
        wide = x.astype(kind) * jax.nn.silu(gate.astype(kind))
        return _normalize(wide, self.scale[...], self.eps).astype(x.dtype)


def _normalize(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale
