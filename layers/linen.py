"""Linen faces of the layer classes, for projects that are written in `flax.linen`.

    from hackle.layers import linen
    y = linen.RMSNorm(width=64).apply(variables, x)

Each has the arguments of its NNX namesake but `rngs`, and the same parameters.
"""

from flax.nnx import bridge

from hackle import layers

RMSNorm = bridge.to_linen_class(layers.RMSNorm)
