"""Attention as the equation says it, with the whole L x S matrix: the oracle of the others."""

import jax
import jax.numpy as jnp

from hackle.layers.attention.masks import Mask


def unsupported(query: jax.Array, key: jax.Array, mask: Mask | None) -> str | None:
    """The reference supports everything."""
    return None


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None, scale: float
) -> tuple[jax.Array, jax.Array]:
    """`softmax(scale * q k^T) v` and its log-sum-exp; shapes as in `attention_with_lse`."""
    visible = None if mask is None else mask.dense(query.shape[1], key.shape[1])
    return attend_tile(query, key, value, visible, scale)


def attend_tile(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of a tile of queries to all keys, softmax in float32 or wider.

    `visible` is bool `[B or 1, L, S]`. A query that sees no key gets output 0 and log-sum-exp
    -inf, so that partial results can be merged.
    """
    batch, queries, heads, width = query.shape
    keys, kv_heads = key.shape[1:3]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    folded = (batch, kv_heads, heads // kv_heads * queries)
    # Query head g uses key head g // groups, so "m" is the place in the group, then the query.
    # Heads stand before length: XLA's products on a CPU take four times as long where they do not.
    query = jnp.moveaxis(query, 1, 2).reshape(*folded, width)
    key, value = (jnp.moveaxis(x, 1, 2) for x in (key, value))
    logits = scale * jnp.einsum("bkme,bkse->bkms", query, key, preferred_element_type=wide)
    logits = logits.reshape(batch, heads, queries, keys)
    if visible is not None:
        logits = jnp.where(visible[:, None], logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    weight = jnp.exp(logits - top)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    seen = total > 0
    safe = jnp.where(seen, total, 1)  # a query that sees nothing must not send NaN backwards
    weight = (weight / safe).astype(value.dtype).reshape(*folded, keys)
    out = jnp.einsum("bkms,bkse->bkme", weight, value, preferred_element_type=wide)
    out = jnp.moveaxis(out.reshape(batch, heads, queries, value.shape[-1]), 1, 2)
    lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)[..., 0]  # [B, H, L]
    return out.astype(value.dtype), jnp.moveaxis(lse, 1, 2)
