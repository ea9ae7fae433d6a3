"""Short causal convolution over time, each channel on its own."""

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers.padding import cleared
from hackle.layers.parameter import parameter


class CausalConv(nnx.Module):
    """`y_t = sum_k w_k x_{t - k}` over the last `taps` inputs, no bias: `[B, T, D] -> [B, T, D]`.

    The weights `[taps, D]`, that of the newest input first, start as U(-1, 1) / sqrt(taps).

    Raises:
      ValueError: a size is not positive.
    """

    def __init__(self, width: int, taps: int = 4, *, rngs: nnx.Rngs):
        def init(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -1, 1) / taps**0.5

        self.weight = parameter(rngs, (taps, width), ("taps", "state"), init)
        self.width = width
        self.taps = taps

    def __call__(
        self,
        x: jax.Array,
        tail: jax.Array | None = None,
        *,
        reset: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Convolves `x [B, T, D]`, in float32 or wider, and returns it in the dtype of `x`.

        Args:
          tail: `[B, taps - 1, D]`, the inputs before `x`; None is zeros.
          reset: bool `[B, T]`; True starts anew: no output from there on sees inputs before it.
          lengths: int `[B]`, 0 to T: how many inputs of each row count; None is all. What follows
            them may be anything and is read as 0.

        Returns:
          `[B, T, D]`, and the tail `[B, taps - 1, D]` for what follows the inputs that count.

        Raises:
          ValueError: an array of another shape or dtype.
        """
        width, before = self.width, self.taps - 1
        x = jnp.asarray(x)
        if x.ndim != 3 or x.shape[2] != width or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"CausalConv: x must be floating-point [batch, time, {width}], "
                f"got {x.dtype} {x.shape}"
            )
        batch, length, _ = x.shape
        x, lengths = cleared("CausalConv", x, lengths)
        if tail is None:  # made of x, so that it lies over the same devices
            zero = jnp.zeros_like(jnp.sum(x, axis=1))
            tail = jnp.broadcast_to(zero[:, None], (batch, before, width))
        tail = jnp.asarray(tail)
        if tail.shape != (batch, before, width):
            raise ValueError(
                f"CausalConv: tail must be [batch, taps - 1, width] = {(batch, before, width)}, "
                f"got {tail.shape}"
            )
        reset = None if reset is None else jnp.asarray(reset)
        if reset is not None and (reset.shape != (batch, length) or reset.dtype != bool):
            raise ValueError(
                f"CausalConv: reset must be bool [batch, time] = {(batch, length)}, "
                f"got {reset.dtype} {reset.shape}"
            )
        inputs = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
        # How many times each input's row has started; inputs of another count are not seen.
        starts = None
        if reset is not None:
            starts = jnp.pad(jnp.cumsum(reset, axis=1, dtype=jnp.int32), ((0, 0), (before, 0)))
        weight = self.weight[...].astype(jnp.promote_types(x.dtype, jnp.float32))
        out = weight[0] * x
        for lag in range(1, self.taps):
            at = slice(before - lag, before - lag + length)
            part = weight[lag] * inputs[:, at]
            if starts is not None:
                part = jnp.where((starts[:, at] == starts[:, before:])[..., None], part, 0)
            out = out + part
        ends = length if lengths is None else jnp.clip(lengths, 0, length)
        ends = jnp.broadcast_to(ends, (batch,))[:, None]
        last = ends + jnp.arange(before)
        tail = jnp.take_along_axis(inputs, last[..., None], axis=1)
        if starts is not None:
            ahead = jnp.take_along_axis(starts, before - 1 + ends, axis=1)
            same = jnp.take_along_axis(starts, last, axis=1) == ahead
            tail = jnp.where(same[..., None], tail, 0)
        return out.astype(x.dtype), tail
