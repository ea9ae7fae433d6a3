"""The join of the streams: a small MLP on all of them gives a weight to each."""

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers.parameter import normal, parameter
from hackle.layers.parscale.streams import join_streams, stream_weights
from hackle.layers.sharding import constrain


class StreamAggregator(nnx.Module):
    """Dynamic weighted sum of streams, `[P, B, L, D] -> [B, L, D]` (arXiv 2505.10475, Eq. 6-7).

    `w = softmax(W2 silu(W1 [x_1; ...; x_P] + b1) + b2)`, smoothed, and `y = sum_p w_p x_p`.
    W1 is kept as one `D x D` matrix per stream, so that its product with the concatenated streams
    is a sum over streams: sharding the streams costs one all-reduce, and nothing is concatenated.

    Args:
      streams: P.
      width: D.
      smoothing: share of the weight that is spread evenly; 0.1 in all released checkpoints.

    Raises:
      ValueError: fewer than two streams, or smoothing outside [0, 1]; when called, an input that
        is not floating-point `[P, B, L, D]`.
    """

    def __init__(self, streams: int, width: int, smoothing: float = 0.1, *, rngs: nnx.Rngs):
        if streams < 2:
            raise ValueError(f"StreamAggregator joins two or more streams, got {streams}")
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing must be in [0, 1], got {smoothing}")
        zeros = nnx.initializers.zeros
        self.hidden_weight = parameter(
            rngs, (streams, width, width), ("stream", "embed", "embed_out"), normal()
        )
        self.hidden_bias = parameter(rngs, (width,), ("embed_out",), zeros)
        self.output_weight = parameter(
            rngs, (width, streams), ("embed_out", "stream_score"), normal()
        )
        self.output_bias = parameter(rngs, (streams,), ("stream_score",), zeros)
        self.streams = streams
        self.smoothing = smoothing

    def weights(self, x: jax.Array) -> jax.Array:
        """The weights `[B, L, P]`, float32 or wider, of streams `x [P, B, L, D]`.

        Raises:
          ValueError: `x` has another rank, number of streams or width, or is not floating-point.
        """
        self._check(x)
        hidden = jnp.einsum("pbld,pde->ble", x, self.hidden_weight[...].astype(x.dtype))
        hidden = jax.nn.silu(hidden + self.hidden_bias[...].astype(x.dtype))
        scores = hidden @ self.output_weight[...].astype(x.dtype)
        scores = scores + self.output_bias[...].astype(x.dtype)
        # Whole on every device that holds a stream, or the softmax would have to communicate.
        scores = constrain(scores, "batch", "length", None)
        return constrain(stream_weights(scores, self.smoothing), "batch", "length", None)

    def _check(self, x: jax.Array) -> None:
        if x.ndim != 4:
            raise ValueError(
                f"StreamAggregator: x must be [streams, batch, length, width], got shape {x.shape}"
            )
        if x.shape[0] != self.streams:
            raise ValueError(
                f"StreamAggregator: expected {self.streams} streams on the leading axis, "
                f"got {x.shape[0]} in shape {x.shape}"
            )
        width = self.hidden_weight.shape[-1]
        if x.shape[3] != width:
            raise ValueError(
                f"StreamAggregator: expected width {width} on the last axis, "
                f"got {x.shape[3]} in shape {x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            # The weights would be cut to integers.
            raise ValueError(f"StreamAggregator: x must be floating-point, got {x.dtype}")

    def __call__(self, x: jax.Array) -> jax.Array:
        # Each device takes the weights of its own streams. Said here so that the backward pass
        # gathers the gradients of the weights [B, L, P] and not the streams [P, B, L, D].
        return join_streams(x, constrain(self.weights(x), "batch", "length", "stream"))
