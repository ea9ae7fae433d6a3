"""Token embedding, which can also serve as the output head (tied weights)."""

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers.parameter import normal, parameter


class Embedding(nnx.Module):
    """A table `[V, D]`. Tie the head by calling `attend` on the same module.

    It starts as N(0, init_std^2). Narrow models with a tied head learn much faster with about
    1 / sqrt(D) than with the 0.02 of Qwen2.
    """

    def __init__(self, vocab_size: int, width: int, *, init_std: float = 0.02, rngs: nnx.Rngs):
        self.weight = parameter(rngs, (vocab_size, width), ("vocab", "embed"), normal(init_std))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Int tokens `[...] -> [..., D]`. Ids outside `[0, V)` give NaN, never another row."""
        tokens = jnp.where(tokens < 0, self.weight.shape[0], tokens)  # -1 is not the last row
        return _rows(self.weight[...], tokens)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits float32 `[..., V]` of features `[..., D]`."""
        return project_to_vocabulary(x, self.weight[...].T)


@jax.custom_vjp
def _rows(weight: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of `[V, D]`, NaN past the last; their gradients add up in float32 (or wider).

    A frequent token has thousands of gradients in a batch: a bfloat16 sum stands still long before
    the last. GPUs are slow to add bfloat16 in memory, too: with 192 rows and 65,536 tokens that was
    33 of the 78 ms of a training step on an H100, and is less than 1 now.
    """
    return jnp.take(weight, tokens, axis=0, mode="fill", fill_value=jnp.nan)


def _rows_forward(weight, tokens):
    return _rows(weight, tokens), (weight, tokens)


def _rows_backward(saved, gradient):
    weight, tokens = saved
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    total = jnp.zeros(weight.shape, wide).at[tokens].add(gradient.astype(wide), mode="drop")
    return total.astype(weight.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


@jax.custom_vjp
def project_to_vocabulary(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`[..., D] x [D, V] -> [..., V]`, accumulated and returned in float32 (or wider).

    The product takes its operands in the dtype of `x`, forward and backward; the gradient of
    `weight` is accumulated and returned in the dtype of `weight`.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...d,dv->...v", x, weight.astype(x.dtype), preferred_element_type=wide)


def _forward(x, weight):
    return project_to_vocabulary(x, weight), (x, weight)


def _backward(saved, gradient):
    # Without this, autodiff multiplies the float32 gradient of the logits by float32 copies of
    # its operands: at 150,000 entries that took a seventh of a training step on an H100.
    x, weight = saved
    gradient = gradient.astype(x.dtype)
    wide = jnp.promote_types(x.dtype, weight.dtype)

    def narrow_operands(x, gradient):
        return jnp.einsum("...d,...v->dv", x, gradient, preferred_element_type=wide)

    def wide_operands(x, gradient):
        # XLA's CPU back end refuses bfloat16 x bfloat16 = float32 once it has moved the transpose
        # of a tied table into the product.
        return narrow_operands(x.astype(wide), gradient.astype(wide))

    product = jax.lax.platform_dependent(x, gradient, cpu=wide_operands, default=narrow_operands)
    return (
        jnp.einsum("...v,dv->...d", gradient, weight.astype(x.dtype)),
        product.astype(weight.dtype),
    )


project_to_vocabulary.defvjp(_forward, _backward)
