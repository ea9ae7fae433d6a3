"""Rotary position embedding (RoPE, arXiv 2104.09864), half-rotation form."""

import jax
import jax.numpy as jnp


def rotary(x: jax.Array, positions: jax.Array, theta: float = 10000.0) -> jax.Array:
    """Rotates the pairs `(x[..., i], x[..., i + E/2])` by `position * theta^(-2i/E)`.

    Args:
      x: `[..., L, H, E]` queries or keys, E even.
      positions: int `[B, L]`, or anything that broadcasts to `[..., L]`. Position 0 is the
        identity.
      theta: base of the frequencies.

    Returns:
      `[..., L, H, E]` in the dtype of `x`; the angles are computed in float32.

    Raises:
      ValueError: E is odd.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"rotary needs an even head width, got {width}")
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency  # [..., L, 1, E/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
