"""The recurrence on Hopper GPUs (Pallas, Mosaic GPU): states and gates never leave the chip.

Bytes per (batch, time, channel), with s bytes a number: forward GRU 4s, LSTM 5s; backward 8s and
9s. A step is a chain of four special functions, about as long whatever the batch, so:

- where B x D fills the chip, time is one segment;
- where it does not, time is cut into segments that run at once (`shooting.py`). Forward, a segment
  finds its entry state by running the `_BURN_IN` steps before it from zero, and is exact given
  that state. The passes that follow correct the entries by Newton's method, and run those segments
  again whose entry moves; a recurrence that forgets moves none. What still moves in the last pass
  is run step by step. The host never waits to know. Backward is linear: one pass gives what each
  segment does to what enters it, and a second one the gradients.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from hackle.layers import in_place
from hackle.layers.recurrent import affine
from hackle.layers.recurrent.cells import Arrays, Block, Cell, block_of
from hackle.layers.recurrent.fused_gpu_kernels import KEEP, LANES, Shape, backward, forward

_log = logging.getLogger("hackle")

_BURN_IN = 64  # steps
_FULL = 32 * 1024  # channels times batch times segments that fill the chip
_SHORTEST = 64  # steps of a segment worth a program
_CORRECTIONS = 2  # passes between the first and the last
_MULTIPROCESSORS = 132  # of most Hopper
_SHARED = 228 * 1024  # bytes of shared memory of a multiprocessor
ROWS = 16  # a segment has a multiple of so many steps


def unsupported(u: jax.Array) -> str | None:
    """Why the kernels cannot run on the default device, or None if they can."""
    if jax.__version_info__ < (0, 11):
        return f"the fused GPU kernel needs jax 0.11 or newer, this is {jax.__version__}"
    device = jax.devices()[0]
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return f"the fused GPU kernel needs an NVIDIA GPU, the default device is {device}"
    if str(device.compute_capability) != "9.0":  # of AMD's it is a name
        return (
            "the fused GPU kernel needs compute capability 9.0 (Hopper), "
            f"{device.device_kind} has {device.compute_capability}"
        )
    if u.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the fused GPU kernel stores float32 or bfloat16, got {u.dtype}"
    return None


def solve(
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    *,
    segments: int | None = None,
    interpret: Any = None,
) -> tuple[Arrays, Arrays]:
    """As `scan.solve`; u and states float32 or bfloat16, the rest float32.

    Args:
      segments: parts of time that run at once; None chooses from the shape.
      interpret: passed to the kernel, for tests without a GPU.

    Raises:
      NotImplementedError: several segments were asked for where writing in place is not safe.
    """
    states, final, _ = _solve(cell, u, weights, initial, reset, False, segments, interpret)
    return states, final


def march(
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    *,
    segments: int | None = None,
    interpret: Any = None,
) -> tuple[Arrays, Arrays, Block]:
    """As `scan.march`."""
    return _solve(cell, u, weights, initial, reset, True, segments, interpret)


def _solve(cell, u, weights, initial, reset, products: bool, segments, interpret):
    width, n = u.shape[-1], cell.states
    u, weights, wide = _padded(u, weights, initial)
    shape = _shape(u, reset is not None, segments)
    # Segments are corrected in place.
    if shape.segments > 1 and interpret is None and (reason := in_place.unsafe()) is not None:
        if segments is not None:
            raise NotImplementedError(f"fused recurrence in {segments} segments: {reason}")
        _say_once(reason)
        shape = _shape(u, reset is not None, 1)
    arrays = (u, weights, *wide, *_masks(reset, shape))
    run = functools.partial(forward, cell, shape, interpret=interpret)
    if shape.segments == 1:
        states, before = _split(run("first", products=products)(*arrays), n)
        final, total = before[n : 2 * n], before[2 * n :]
    else:
        first = run("first", burn_in=_BURN_IN, products=True)
        states, before = _split(first(*arrays), n)
        places = tuple(jax.new_ref(x) for x in states)
        for _ in range(_CORRECTIONS):
            before = run("again")(*arrays, *before, *places)
        final, total = _split(run("last", products=products)(*arrays, *before, *places), n)
        states = tuple(place[...] for place in places)
    cut = lambda x: x if x.shape[-1] == width else x[..., :width]
    total = tuple(cut(x[0]) for x in total)
    block = block_of(total, n) if products else ()
    return tuple(map(cut, states)), tuple(cut(x[0]) for x in final), block


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning(
        "fused recurrence: time is one segment, which is slow for few channels: %s", reason
    )


def _split(arrays, count: int) -> tuple[Arrays, Arrays]:
    return tuple(arrays[:count]), tuple(arrays[count:])


def adjoint(
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    states: Arrays,
    cotangents: tuple[jax.Array | None, ...],
    final_cotangents: Arrays,
    *,
    segments: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, Arrays]:
    """As `scan.adjoint`."""
    width, n = u.shape[-1], cell.states
    u, weights, wide = _padded(u, weights, initial)
    shape = _shape(u, reset is not None, segments, 3 + n + sum(x is not None for x in cotangents))
    given = tuple(_wide(x.astype(u.dtype)) for x in cotangents if x is not None)
    states = tuple(map(_wide, states))
    final = tuple(_wide(x.astype(jnp.float32)) for x in final_cotangents)
    which = tuple(x is not None for x in cotangents)
    arrays = (u, weights, *wide, *_masks(reset, shape), *states, *states, *given)
    entries = tuple(x[None] for x in final)
    if shape.segments > 1:
        nothing = jnp.zeros((shape.segments, *final[0].shape), jnp.float32)
        kernel = backward(cell, shape, which, write=False, interpret=interpret)
        sent, products = _split(kernel(*arrays, *(nothing,) * n), n)
        ahead = tuple(
            jnp.concatenate([x[1:], last[None]]) for x, last in zip(sent, final, strict=True)
        )
        entries = affine.solve_transposed(block_of(products, n), ahead, 0)
    kernel = backward(cell, shape, which, write=True, interpret=interpret)
    (du, dweights), sent = _split(kernel(*arrays, *entries), 2)
    return (
        du[..., :width],
        jnp.sum(dweights, axis=(0, 1))[:, :width],
        tuple(x[0, :, :width] for x in sent),
    )


def _wide(x: jax.Array) -> jax.Array:
    """Channels to a multiple of the lanes."""
    extra = -x.shape[-1] % LANES
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, extra),)) if extra else x


def _padded(u, weights, initial):
    """Whole tiles of channels."""
    initial = tuple(_wide(x.astype(jnp.float32)) for x in initial)
    return _wide(u), _wide(weights.astype(jnp.float32)), initial


def _masks(reset: jax.Array | None, shape: Shape) -> Arrays:
    """Resets, if any, as float masks `[B, tiles, KEEP]`, 0 where they are."""
    if reset is None:
        return ()
    batch, time = reset.shape
    keep = jnp.pad((~reset).astype(jnp.float32), ((0, 0), (0, -time % shape.rows)))
    keep = keep.reshape(batch, -1, shape.rows)
    return (jnp.pad(keep, ((0, 0), (0, 0), (0, KEEP - shape.rows))),)


def _shape(u: jax.Array, reset: bool, segments: int | None, arrays: int = 3) -> Shape:
    """How a kernel takes its work that reads so many arrays: forward 3, backward more."""
    batch, time, _, width = u.shape
    if segments is None:
        segments = max(1, min(_FULL // (batch * width), time // _SHORTEST))
    length = -(-time // segments)
    length = -(-length // ROWS) * ROWS
    segments = -(-time // length)
    rows, stages, tile, programs = _tiles(batch * width, width, segments, u.dtype, arrays)
    size = stages * rows * tile * arrays * u.dtype.itemsize
    # With what is kept unused, one program more does not fit.
    reserved = 0 if programs is None else max(0, _SHARED // (programs + 1) - size)
    return Shape(batch, time, width, segments, length, rows, stages, tile, reserved, u.dtype, reset)


def _tiles(
    channels: int, width: int, segments: int, dtype: Any, arrays: int
) -> tuple[int, int, int, int | None]:
    """Steps of a tile, stages, channels of a program, and how many programs may share a
    multiprocessor, None for as many as fit.

    Where B x D fills the chip, memory is fastest with about 48 KiB on their way to a
    multiprocessor, and up to 15 % slower with less or with more (H200, reports/LOG.md).
    """
    # Two channels a lane where there are programs enough.
    wide = width % (2 * LANES) == 0 and channels * segments >= _FULL
    tile = 2 * LANES if wide else LANES
    rows = 16 // dtype.itemsize
    if segments > 1 or channels <= _FULL // 2 or (channels < _FULL and arrays > 3):
        size = ROWS * tile * arrays * dtype.itemsize
        if 2 * size > _SHARED - 20 * 1024:  # with borders and barriers too much for one program
            tile, size = LANES, size // 2
        return ROWS, max(2, min(6, 104 * 1024 // size)), tile, None
    if channels < _FULL:
        return 2 * rows, 4, tile, 2
    # More programs than multiprocessors, but no more than three times as many: small ones, so that
    # none of twice the size is left to the end.
    some = _MULTIPROCESSORS * 2 * LANES < channels <= 3 * _MULTIPROCESSORS * LANES
    if arrays > 3:
        return (2 * rows, 3, LANES, 1) if some else (rows, 3, tile, None)
    if wide and channels <= _MULTIPROCESSORS * 2 * LANES:
        return rows, 4, tile, None
    # Others where D has no pairs of 128 channels.
    if some or not wide:
        return rows, 3, LANES, 3
    return rows // 2, 4, tile, 2
