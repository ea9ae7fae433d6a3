"""The functions under ParScale: split one input into streams, weigh them, join them."""

import jax
import jax.numpy as jnp


def split_streams(x: jax.Array, streams: int) -> jax.Array:
    """`[B, ...] -> [P, B, ...]`: every stream starts from the same input (parameter-free)."""
    return jnp.broadcast_to(x[None], (streams, *x.shape))


def stream_weights(scores: jax.Array, smoothing: float) -> jax.Array:
    """Aggregation weights of scores `[..., P]`, float32 or wider (paper Eq. 6 and 7).

    `w = softmax(scores)`, then `w <- (1 - smoothing) w + smoothing / P`: no stream's weight can
    fall under `smoothing / P`, which keeps all of them trained.
    """
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    weights = jax.nn.softmax(wide, axis=-1)
    return (1 - smoothing) * weights + smoothing / scores.shape[-1]


def join_streams(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`sum_p w_p x_p` (paper Eq. 2): `[P, B, L, D], [B, L, P] -> [B, L, D]`.

    Summed in the dtype of the weights, returned in that of `x`.
    """
    return jnp.einsum("pbld,blp->bld", x.astype(weights.dtype), weights).astype(x.dtype)
