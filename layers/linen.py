"""Linen faces of the layer classes, for projects that are written in `flax.linen`.

    from hackle.layers import linen

    class Mine(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.GatedMLP(64, 256)(linen.RMSNorm(64)(x))

Each takes the arguments of its NNX namesake except `rngs`, and a `name`. Parameters are boxed as
`nn.LogicallyPartitioned` with their logical axis names, so `nn.logical_axis_rules` shards them and
`nn.unbox` gives the plain arrays.

An unnamed layer is called `ToLinen_0`, `ToLinen_1`, ... in the order of construction, whatever its
class: with `name="mlp"` the names of parameters outlive a change of the code.

A method other than `__call__` is named to `init` and `apply` by `nnx_method`; flax's own `method`
does not find it. A bound module has it as its own:

    gru = linen.ParaGRU(8, 16, heads=2)
    variables = gru.init(jax.random.key(0), x)  # x [B, T, 8]
    y, state = gru.apply(variables, x[:, 0], state, nnx_method="step")
    y, state = gru.bind(variables).step(x[:, 0], state)  # the same

So is one that is made in another module's `@nn.compact` method or `setup`.

The faces are functions, no classes: `nn.remat`, `nn.scan` and the like do not take them. They take
a module of yours that has a face inside, such as `nn.remat(Mine)()`. What adds an axis to the
parameters, as `nn.scan` and `nn.vmap` do, needs its name, too:
`metadata_params={nn.PARTITION_NAME: "layers"}`.
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
