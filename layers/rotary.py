"""Rotary position embedding (RoPE, arXiv 2104.09864), half-rotation form."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Frequencies stretched for longer texts than a model was first trained on, as in Llama 3.1.

    With `t` the turns that a frequency makes within `original_length` positions: it is kept where
    `t >= high_frequency`, divided by `factor` where `t <= low_frequency`, and between the two is
    mixed of both in proportion (arXiv 2407.21783 and the code released with it).

    Raises:
      ValueError: `factor` below 1, or not `0 < low_frequency < high_frequency`, or no length.
    """

    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low_frequency < self.high_frequency):
            raise ValueError(f"{self}: expected factor >= 1 and 0 < low_frequency < high_frequency")
        if self.original_length < 1:
            raise ValueError(f"{self}: expected original_length >= 1")

    def __call__(self, frequency: jax.Array) -> jax.Array:
        """Radians a position, `[E/2]`, to the stretched ones."""
        turns = self.original_length * frequency / (2 * math.pi)
        span = self.high_frequency - self.low_frequency
        kept = jnp.clip((turns - self.low_frequency) / span, 0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


def rotary(
    x: jax.Array,
    positions: jax.Array,
    theta: float = 10000.0,
    scaling: Llama3Scaling | None = None,
) -> jax.Array:
    """Rotates the pairs `(x[..., i], x[..., i + E/2])` by `position * theta^(-2i/E)`.

    Args:
      x: `[..., L, H, E]` queries or keys, E even.
      positions: int `[B, L]`, or anything that broadcasts to `[..., L]`. Position 0 is the
        identity.
      theta: base of the frequencies.
      scaling: what is done to the frequencies; None leaves them.

    Returns:
      `[..., L, H, E]` in the dtype of `x`; the angles are computed in float32.

    Raises:
      ValueError: E is odd.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"rotary needs an even head width, got {width}")
    # The order of operations that checkpoints were trained with: a frequency that differs in its
    # last bit turns by 0.01 more at position 100,000.
    frequency = 1 / theta ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if scaling is not None:
        frequency = scaling(frequency)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency  # [..., L, 1, E/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
