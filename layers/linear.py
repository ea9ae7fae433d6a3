"""Linear map between groups of axes, e.g. width -> (heads, head width)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers.parameter import Initializer, normal, parameter


class Linear(nnx.Module):
    """`y = x W + b` with `W` of shape `[*inputs, *outputs]` and `b` of shape `[*outputs]`.

    Computes in the dtype of `x`. `axes` are the logical names of the dimensions of `W`.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        bias: bool = False,
        init: Initializer = normal(),
        rngs: nnx.Rngs,
    ):
        self.weight = parameter(rngs, (*inputs, *outputs), axes, init)
        self.bias = (
            parameter(rngs, outputs, axes[len(inputs) :], nnx.initializers.zeros) if bias else None
        )
        self.contracted = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., *inputs] -> [..., *outputs]`."""
        y = jnp.tensordot(x, self.weight[...].astype(x.dtype), axes=self.contracted)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y
