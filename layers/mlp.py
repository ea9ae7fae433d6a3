"""Gated MLP (SwiGLU, arXiv 2002.05202)."""

import jax
from flax import nnx

from hackle.layers.linear import Linear


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, no biases: `[..., D] -> [..., F] -> [..., D]`."""

    def __init__(self, width: int, mlp_width: int, *, rngs: nnx.Rngs):
        self.gate = Linear((width,), (mlp_width,), ("embed", "mlp"), rngs=rngs)
        self.up = Linear((width,), (mlp_width,), ("embed", "mlp"), rngs=rngs)
        self.down = Linear((mlp_width,), (width,), ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
