"""Flash attention for TPUs (Pallas, Mosaic): every mask of `masks.py`, no L x S array.

Masks reach the kernels as integers per token, and as lists of the tiles to visit (`tile_mask.py`).
JAX's own splash attention does not do: its masks are numpy objects or functions of two indices,
known when the program is compiled, or else a whole array of queries by keys, of which it stores
every block; with a batch it can be given segment ids alone, and they are compared in every tile.
Branches, positions and padding come with every batch.

Products are of the dtype that is given, with float32 sums; softmax is float32. A program takes up
to eight query heads of one key head, so that keys are fetched once for all of them. Gradients are
the same from run to run.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from hackle.layers.attention import tile_mask
from hackle.layers.attention.folding import folded
from hackle.layers.attention.masks import Mask
from hackle.layers.attention.pallas_tpu_kernels import (
    LANES,
    LOG2E,
    Shape,
    backward_keys,
    backward_queries,
    forward,
)

WIDEST = 256
_HEADS = 8  # of a program, at most
_ROWS = 1024  # of its queries, all heads together, where there are as many
_KEYS = 512


def unsupported(query: jax.Array, key: jax.Array, mask: Mask | None) -> str | None:
    """Why the kernels cannot do this on the default device, or None if they can."""
    device = jax.devices()[0]
    if device.platform != "tpu":
        return f"the kernels need a TPU, the default device is {device.device_kind}"
    if query.dtype not in (jnp.bfloat16, jnp.float32) or key.dtype != query.dtype:
        return f"the kernels take bfloat16 or float32, got {query.dtype} and {key.dtype}"
    if query.shape[-1] > WIDEST:
        return f"the kernels take head widths up to {WIDEST}, got {query.shape[-1]}"
    return None


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | None,
    scale: float,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`; `interpret` is passed to the kernels, for tests without a TPU."""
    if scale < 0:
        query, scale = -query, -scale
    batch, queries, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    group = heads // key_heads
    part = max(n for n in range(1, _HEADS + 1) if group % n == 0)
    size = min(_up(queries), max(LANES, min(_KEYS, _ROWS // part) // LANES * LANES))
    sizes = size, min(_up(keys), _KEYS)
    padded = _up(queries, sizes[0]), _up(keys, sizes[1])
    lowered = tile_mask.lower(mask, queries, keys, padded=padded)
    shape = Shape(
        batch,
        *padded,
        heads,
        key_heads,
        part,
        _up(width),
        *sizes,
        0,
        query.dtype,
        lowered.program,
    )
    fit = lambda x, length: jnp.pad(
        x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, shape.width - width))
    )
    given = (fit(query, padded[0]), fit(key, padded[1]), fit(value, padded[1]))
    out, lse = _attend(shape, queries, scale, interpret, *given, lowered.query, lowered.key)
    return out[:, :queries, :, :width], lse[:, :queries]


def _up(size: int, unit: int = LANES) -> int:
    return -(-size // unit) * unit


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(shape, queries, scale, interpret, query, key, value, query_ints, key_ints):
    """`[B,L,H,E] -> ([B,L,H,E], [B,L,H])`, lengths and widths padded."""
    run = functools.partial(_forward, scale, interpret)
    return folded(run, shape, (query, key, value), (query_ints, key_ints))


def _attend_forward(shape, queries, scale, interpret, *arrays):
    out, lse = _attend(shape, queries, scale, interpret, *arrays)
    return (out, lse), (*arrays, out, lse)


def _attend_backward(shape, queries, scale, interpret, saved, cotangents):
    query, key, value, query_ints, key_ints, out, lse = saved
    run = functools.partial(_backward, queries, scale, interpret)
    arrays = (query, key, value, out, lse, *cotangents)
    return *folded(run, shape, arrays, (query_ints, key_ints)), None, None


def _forward(scale, interpret, shape, query, key, value, query_ints, key_ints):
    shape = shape._replace(mask_rows=query_ints.shape[0])
    plan = _plan(_states(shape, query_ints, key_ints))
    out, lse = forward(shape, scale, interpret=interpret)(
        *plan,
        _tiled_ints(shape, query_ints, shape.queries),
        _heads_first(shape, query),
        _keys_first(key),
        _keys_first(value),
        _tiled_ints(shape, key_ints, shape.keys),
    )
    return _heads_last(shape, out), _from_rows(shape, lse)


def _backward(
    queries, scale, interpret, shape, query, key, value, out, lse, dout, dlse, query_ints, key_ints
):
    shape = shape._replace(mask_rows=query_ints.shape[0])
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - dlse
    # A query that is not there, or sees nothing, has no probabilities: 2^(s - inf) = 0.
    there = (jnp.arange(shape.query_length) < queries)[:, None] & (lse > -jnp.inf)
    lse = _to_rows(shape, jnp.where(there, lse * LOG2E, jnp.inf))
    delta = _to_rows(shape, jnp.where(there, delta, 0.0))
    query, dout = _heads_first(shape, query), _heads_first(shape, dout)
    key, value = _keys_first(key), _keys_first(value)
    states = _states(shape, query_ints, key_ints)
    query_ints = _tiled_ints(shape, query_ints, shape.queries)
    key_ints = _tiled_ints(shape, key_ints, shape.keys)
    of_queries = backward_queries(shape, scale, interpret=interpret)
    dquery = of_queries(*_plan(states), query_ints, query, dout, lse, delta, key, value, key_ints)
    of_keys = backward_keys(shape, scale, interpret=interpret)
    plan = _plan(jnp.swapaxes(states, 1, 2))
    dkey, dvalue = of_keys(*plan, key_ints, key, value, query, dout, lse, delta, query_ints)
    return _heads_last(shape, dquery), _keys_first(dkey), _keys_first(dvalue)


_attend.defvjp(_attend_forward, _attend_backward)


# --- how arrays lie ------------------------------------------------------------------------------


def _states(shape: Shape, query_ints: jax.Array, key_ints: jax.Array) -> jax.Array:
    mask = tile_mask.TileMask(shape.program, query_ints, key_ints)
    return tile_mask.tile_states(mask, shape.queries, shape.keys)


def _plan(states: jax.Array) -> list[jax.Array]:
    """Order and counts, a row of scalar memory for each tile."""
    return [x[:, :, None] for x in tile_mask.plan(states)]


def _tiled_ints(shape: Shape, ints: jax.Array, size: int) -> jax.Array:
    """`[rows,integers,L] -> [rows,tiles,integers,size]`, filled up to whole sublanes."""
    rows, count, length = ints.shape
    ints = jnp.pad(ints, ((0, 0), (0, shape.integers - count), (0, 0)))
    return jnp.swapaxes(ints.reshape(rows, shape.integers, length // size, size), 1, 2)


def _heads_first(shape: Shape, x: jax.Array) -> jax.Array:
    """`[B,L,H,E] -> [B,parts,part,L,E]`."""
    x = x.reshape(*x.shape[:2], shape.parts, shape.part, x.shape[-1])
    return x.transpose(0, 2, 3, 1, 4)


def _heads_last(shape: Shape, x: jax.Array) -> jax.Array:
    x = x.transpose(0, 3, 1, 2, 4)
    return x.reshape(*x.shape[:2], shape.heads, x.shape[-1])


def _keys_first(x: jax.Array) -> jax.Array:
    """`[B,S,K,E] <-> [B,K,S,E]`."""
    return jnp.swapaxes(x, 1, 2)


def _to_rows(shape: Shape, x: jax.Array) -> jax.Array:
    """`[B,L,H] -> [B,parts,tiles,1,rows]`: a row for each program, head after head."""
    x = x.reshape(shape.batch, shape.query_tiles, shape.queries, shape.parts, shape.part)
    x = x.transpose(0, 3, 1, 4, 2)
    return x.reshape(*x.shape[:3], 1, shape.rows)


def _from_rows(shape: Shape, x: jax.Array) -> jax.Array:
    x = x.reshape(shape.batch, shape.parts, shape.query_tiles, shape.part, shape.queries)
    return x.transpose(0, 2, 4, 1, 3).reshape(shape.batch, shape.query_length, shape.heads)
