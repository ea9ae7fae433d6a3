"""Rows of unequal length in one array: which of their steps count."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def inside(lengths: jax.Array, time: int) -> jax.Array:
    """bool `[B, T]`: true at the first `lengths` (int `[B]`) of `time` steps."""
    return jnp.arange(time) < lengths[:, None]


def cleared(
    name: str, x: jax.Array, lengths: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None]:
    """`x [B, T, ...]` with zeros from the length of each row on, and the lengths in int32; `x` and
    None if there are none.

    Whatever lies there then reaches neither results nor gradients. A cotangent of zero alone would
    not keep it out: zero times NaN is NaN.

    Args:
      name: whose `lengths` they are, for the error.
      lengths: int `[B]`, 0 to T.

    Raises:
      ValueError: `lengths` of another shape or dtype, or numbers outside 0 to T that are known
        before the run.
    """
    if lengths is None:
        return x, None
    lengths, (batch, time) = jnp.asarray(lengths), x.shape[:2]
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"{name}: lengths must be integers [batch] = {(batch,)}, "
            f"got {lengths.dtype} {lengths.shape}"
        )
    lengths = lengths.astype(jnp.int32)  # T need not fit a shorter one
    if not isinstance(lengths, jax.core.Tracer):
        with jax.ensure_compile_time_eval():  # a constant of a jitted function has numbers too
            wrong = bool(jnp.any((lengths < 0) | (lengths > time)))
        if wrong:
            raise ValueError(f"{name}: lengths must be 0 to {time}, got {lengths.tolist()}")
    kept = inside(lengths, time).reshape(batch, time, *(1,) * (x.ndim - 2))
    return jnp.where(kept, x, 0), lengths
