"""The one idiom for parameters: shape, logical axes, initialiser and dtype stand together."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Initializer = Callable[[jax.Array, Sequence[int], DTypeLike], jax.Array]


def normal(stddev: float = 0.02) -> Initializer:
    """Initialiser N(0, stddev^2); 0.02 is Qwen2's `initializer_range`."""
    return jax.nn.initializers.normal(stddev)


def parameter(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str],
    init: Initializer,
    dtype: DTypeLike = jnp.float32,
) -> nnx.Param:
    """Makes an `nnx.Param` of `shape` that carries its logical axis names, one per dimension.

    The names are stored as the metadata `axes`, not as flax's `out_sharding`, so that importing
    hackle neither needs a mesh nor changes a global setting of flax. Anything that places the
    array (a preset, a loader) reads `param.get_metadata("axes")`.

    Raises:
      ValueError: the number of names is not the number of dimensions, or a size is not positive.
    """
    shape, axes = tuple(shape), tuple(axes)
    if len(shape) != len(axes):
        raise ValueError(f"parameter of shape {shape} needs {len(shape)} axis names, got {axes}")
    if any(size < 1 for size in shape):
        raise ValueError(f"parameter with axes {axes} has shape {shape}; every size must be >= 1")
    return nnx.Param(init(rngs.params(), shape, dtype), axes=axes)
