"""Attention in plain XLA with memory linear in the number of keys: any device, any mask."""

import jax
import jax.numpy as jnp

from hackle.layers.attention.masks import Mask
from hackle.layers.attention.reference import attend_tile

# Entries of one tile of the score matrix, per batch row and head.
TILE = 2**20


def unsupported(query: jax.Array, key: jax.Array, mask: Mask | None) -> str | None:
    """Every mask and dtype is supported."""
    return None


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Maps over tiles of queries; the backward pass recomputes each tile's scores."""
    queries, keys = query.shape[1], key.shape[1]
    size = max(16, TILE // keys)
    key_index = jnp.arange(keys)

    def tile(query_tile, query_index):
        visible = None if mask is None else mask.visible(query_index, key_index)
        return attend_tile(query_tile, key, value, visible, scale)

    if queries <= size:
        return tile(query, jnp.arange(queries))

    count = -(-queries // size)
    # Tail queries repeat nothing: they are zeros that see what the last query sees, cut off below.
    padded = jnp.pad(query, ((0, 0), (0, count * size - queries), (0, 0), (0, 0)))
    tiles = jnp.moveaxis(padded.reshape(query.shape[0], count, size, *query.shape[2:]), 1, 0)
    index = jnp.minimum(jnp.arange(count * size), queries - 1).reshape(count, size)
    out, lse = jax.lax.map(lambda x: jax.checkpoint(tile)(*x), (tiles, index))

    def join(x):  # [count, B, size, ...] -> [B, L, ...]
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * size, *x.shape[3:])[:, :queries]

    return join(out), join(lse)
