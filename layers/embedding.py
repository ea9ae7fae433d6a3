"""Token embedding, which can also serve as the output head (tied weights)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers.parameter import normal, parameter


class Embedding(nnx.Module):
    """A table `[V, D]`. Tie the head by calling `attend` on the same module."""

    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs):
        self.weight = parameter(rngs, (vocab_size, width), ("vocab", "embed"), normal())

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Int tokens `[...] -> [..., D]`. Ids outside `[0, V)` give NaN, never another row."""
        return jnp.take(self.weight[...], tokens, axis=0, mode="fill", fill_value=jnp.nan)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits float32 `[..., V]` of features `[..., D]`."""
        return project_to_vocabulary(x, self.weight[...].T)


def project_to_vocabulary(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`[..., D] x [D, V] -> [..., V]`, accumulated and returned in float32 (or wider)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(
        "...d,dv->...v", x, weight.astype(x.dtype), preferred_element_type=wide
    )
