"""Flash attention for Hopper GPUs (Pallas, Mosaic GPU): every mask of `masks.py`, no L x S array.

Masks reach the kernels as integers per token, and as lists of the tiles to visit (`tile_mask.py`).
Backward, scores are made again from queries, keys and the log-sum-exp. Products are of bfloat16 or
float16 operands with float32 sums; softmax is float32. Gradients of queries add up in float32 in
an order that is not fixed, so that their last bits may differ from run to run.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hackle.layers import in_place
from hackle.layers.attention import pallas_gpu_backward as narrow
from hackle.layers.attention import pallas_gpu_backward_wide as wide
from hackle.layers.attention import tile_mask
from hackle.layers.attention.folding import folded
from hackle.layers.attention.masks import Mask
from hackle.layers.attention.pallas_gpu_forward import forward
from hackle.layers.attention.pallas_gpu_tensor_core import COMPUTE, ROWS, Shape

WIDEST = 256


class _Tiles(NamedTuple):
    queries: int
    keys: int
    stages: int


# By padded head width; what fits into 227 KiB of shared memory.
_FORWARD = {64: _Tiles(128, 128, 3), 128: _Tiles(128, 128, 2), 256: _Tiles(128, 64, 2)}
_BACKWARD = {64: _Tiles(128, 128, 2), 128: _Tiles(64, 128, 2), 256: _Tiles(64, 64, 2)}
_ALIGNED = COMPUTE * ROWS  # lengths are padded to this


def unsupported(query: jax.Array, key: jax.Array, mask: Mask | None) -> str | None:
    """Why the kernels cannot do this on the default device, or None if they can."""
    if jax.__version_info__ < (0, 11):
        return f"the kernels need jax 0.11 or newer, this is {jax.__version__}"
    device = jax.devices()[0]
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return f"the kernels need an NVIDIA GPU, the default device is {device.device_kind}"
    if str(device.compute_capability) != "9.0":  # of AMD's it is a name
        return (
            "the kernels need compute capability 9.0 (Hopper), "
            f"{device.device_kind} has {device.compute_capability}"
        )
    if (reason := in_place.unsafe()) is not None:  # gradients of queries add up in place
        return reason
    if query.dtype not in (jnp.bfloat16, jnp.float16) or key.dtype != query.dtype:
        return f"the kernels take bfloat16 or float16, got {query.dtype} and {key.dtype}"
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
    """As `reference.attend`; `interpret` is passed to the kernels, for tests without a GPU."""
    if scale <= 0:  # backward, the log-sum-exp is divided by it
        query, scale = (-query, -scale) if scale else (0 * query, 1.0)
    batch, queries, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    padded = _up(queries, _ALIGNED), _up(keys, _ALIGNED)
    room = next(w for w in sorted(_FORWARD) if w >= width)
    lowered = tile_mask.lower(mask, queries, keys, padded=padded)
    group = heads // key_heads
    shape = Shape(batch, *padded, heads, group, room, 0, 0, 0, query.dtype, lowered.program)
    fit = lambda x, length: jnp.pad(
        x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, room - width))
    )
    out, lse = _attend(
        shape,
        queries,
        scale,
        interpret,
        fit(query, padded[0]),
        fit(key, padded[1]),
        fit(value, padded[1]),
        lowered.query,
        lowered.key,
    )
    return out[:, :queries, :, :width], jnp.swapaxes(lse[..., :queries], 1, 2)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _states(shape: Shape, integers: tuple[jax.Array, jax.Array]) -> jax.Array:
    mask = tile_mask.TileMask(shape.program, *integers)
    return tile_mask.tile_states(mask, shape.queries, shape.keys)


def _plan(states: jax.Array) -> tile_mask.Plan:
    return tile_mask.longest_first(tile_mask.plan(states))


def _sized(shape: Shape, tiles: _Tiles) -> Shape:
    return shape._replace(queries=tiles.queries, keys=tiles.keys, stages=tiles.stages)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(shape, queries, scale, interpret, query, key, value, query_ints, key_ints):
    """`[B,L,H,E] -> ([B,L,H,E], [B,H,L])`, lengths and widths padded."""
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
    shape = _sized(shape, _FORWARD[shape.width])
    plan = _plan(_states(shape, (query_ints, key_ints)))
    kernel = forward(shape, scale, interpret=interpret)
    return tuple(kernel(query, key, value, *plan, query_ints, key_ints))


def _backward(
    queries, scale, interpret, shape, query, key, value, out, lse, dout, dlse, query_ints, key_ints
):
    shape = _sized(shape, _BACKWARD[shape.width])
    plan = _plan(jnp.swapaxes(_states(shape, (query_ints, key_ints)), 1, 2))
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # never TF32
    delta = jnp.swapaxes(delta, 1, 2) - dlse
    # A query that is not there, or sees nothing, has no probabilities: e^(s - inf) = 0.
    there = (jnp.arange(shape.query_length) < queries) & (lse > -jnp.inf)
    shift = jnp.where(there, -lse / scale, -jnp.inf)
    drop = jnp.where(there, -delta, 0.0)
    dquery = jax.new_ref(jnp.zeros(query.shape, jnp.float32))
    kernel = (wide if shape.width > 128 else narrow).backward(shape, scale, interpret=interpret)
    dkey, dvalue = kernel(query, key, value, dout, shift, drop, *plan, query_ints, key_ints, dquery)
    return (scale * dquery[...]).astype(query.dtype), dkey, dvalue


_attend.defvjp(_attend_forward, _attend_backward)
