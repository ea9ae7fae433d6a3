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
    groups = heads // key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # Query head g uses key head g // groups: "k" is the key head, "g" its place in the group.
    query = query.reshape(batch, queries, key.shape[2], groups, width)
    logits = scale * jnp.einsum("blkge,bske->bkgls", query, key, preferred_element_type=wide)
    if visible is not None:
        visible = visible[:, None, None]
        logits = jnp.where(visible, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    weight = jnp.exp(logits - top)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    seen = total > 0
    safe = jnp.where(seen, total, 1)  # a query that sees nothing must not send NaN backwards
    out = jnp.einsum(
        "bkgls,bske->blkge", (weight / safe).astype(value.dtype), value, preferred_element_type=wide
    )
    lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)[..., 0]  # [B, K, G, L]
    lse = jnp.moveaxis(lse.reshape(batch, heads, queries), 1, 2)
    return out.reshape(batch, queries, heads, value.shape[-1]).astype(value.dtype), lse
