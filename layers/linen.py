"""Linen faces of the layer classes, for projects that are written in `flax.linen`.

    from hackle.layers import linen

    class Mine(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.GatedMLP(64, 256)(linen.RMSNorm(64)(x))

Each takes the arguments of its NNX namesake except `rngs`, and a `name`. Parameters are boxed as
`nn.LogicallyPartitioned` with their logical axis names, so `nn.logical_axis_rules` shards them and
`nn.unbox` gives the plain arrays. A method other than `__call__` is called by its name, e.g.
`linen.StreamPrefix(...).prepend(key, value, mask)`.
"""

import functools
from collections.abc import Callable

from flax import linen as nn
from flax import nnx

from hackle import layers


def _boxed(v: nnx.Variable) -> nn.LogicallyPartitioned:
    return nn.LogicallyPartitioned(v.get_value(), names=v.get_metadata("axes"))


def _face(layer: type[nnx.Module]) -> Callable[..., nn.Module]:
    face = functools.partial(nnx.bridge.to_linen, layer, metadata_fn=_boxed)
    face.__doc__ = layer.__doc__
    return face


CausalConv = _face(layers.CausalConv)
DecoderBlock = _face(layers.DecoderBlock)
Embedding = _face(layers.Embedding)
GatedMLP = _face(layers.GatedMLP)
GatedRMSNorm = _face(layers.GatedRMSNorm)
Linear = _face(layers.Linear)
ParaGRU = _face(layers.recurrent.ParaGRU)
ParaLSTM = _face(layers.recurrent.ParaLSTM)
RMSNorm = _face(layers.RMSNorm)
SelfAttention = _face(layers.SelfAttention)
StreamAggregator = _face(layers.parscale.StreamAggregator)
StreamPrefix = _face(layers.parscale.StreamPrefix)
