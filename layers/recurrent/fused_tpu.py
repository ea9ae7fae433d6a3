"""The recurrence on TPUs (Pallas, Mosaic): states and gates never leave the chip.

Bytes per (batch, time, channel), s = bytes a number: forward GRU 4s, LSTM 5s; backward 8s and 9s.

The kernels read u as `[B,3,T,D]`, since three gates as second-last axis would fill three rows of a
tile of eight. A projection whose einsum gives `[B,T,3,D]` writes that order by itself: to XLA,
exchanging axes is a choice of layout. Only a u that already exists in another layout is copied. Any
time and any number of channels are read as they are: what a tile reads beyond the array is masked,
and what it writes there is dropped.

Forward, a step is a chain of special functions. Where B x D does not fill the registers that a
program advances side by side, time is cut into segments that do (not measured on a chip; time that
segments do not divide is padded, a copy of u). A segment finds its entry state by running the
`_BURN_IN` steps before it from zero, and Newton's method corrects the entries (`shooting.py`): one
pass where the recurrence forgets within those steps. Where the entries of the last pass still move,
time is run as one segment. Backward, the chain is one product a step, and time is one segment.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from hackle.layers.recurrent import affine, shooting
from hackle.layers.recurrent.cells import Arrays, Block, Cell
from hackle.layers.recurrent.fused_tpu_kernels import FORWARD, backward, forward
from hackle.layers.recurrent.fused_tpu_tiles import LANES, SUBLANES, Tiles, tile_rows
from hackle.layers.recurrent.newton import Progress

adjoint = backward

_BURN_IN = 64  # steps
_SHORTEST = 4 * _BURN_IN  # steps of a segment worth a burn-in
_PASSES = 5  # where the cell forgets slowly, entries are off by about 1, 1e-1, 1e-2, 1e-4, 1e-8


def unsupported(u: jax.Array) -> str | None:
    """Why the kernels cannot run on the default device, or None if they can."""
    device = jax.devices()[0]
    if device.platform != "tpu":
        return f"the fused TPU kernel needs a TPU, the default device is {device}"
    if u.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the fused TPU kernel stores float32 or bfloat16, got {u.dtype}"
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
    """States `[B,T,D]` in u's dtype and final states `[B,D]` float32; see `scan.solve`.

    Args:
      segments: parts of time that run at once, at most; None chooses from the shape.
      interpret: passed to the kernel, for tests without a TPU.
    """
    return _solve(cell, u, weights, initial, reset, False, segments, interpret)[:2]


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


def _solve(cell, u, weights, initial: Arrays, reset, products: bool, segments, interpret):
    time = u.shape[1]
    segments, length = _segments(u, segments)

    def whole() -> tuple[Arrays, Arrays, Block]:
        return forward(cell, u, weights, initial, reset, products=products, interpret=interpret)

    if segments == 1:
        return whole()

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, segments * length - time), *((0, 0),) * (x.ndim - 2)))

    rows, resets = padded(u), None if reset is None else padded(reset)

    def run(entries: Arrays) -> shooting.Pass:
        """All segments, each from its entry, `[S,B,D]`."""
        how = {"segments": segments, "time": time, "products": True, "interpret": interpret}
        states, ends, block = forward(cell, rows, weights, _swapped(entries), resets, **how)
        progress = Progress(jnp.int32(1), jnp.array(True))
        return shooting.Pass(states, _swapped(ends), entries, _swapped(block), progress)

    guess = _burned_in(cell, rows, weights, initial, resets, segments, interpret)
    passed = shooting.shoot(run(guess), run, initial, max_passes=_PASSES)

    states = tuple(x[:, :time] for x in passed.states)
    block = affine.product(passed.products, 0) if products else ()
    found = states, tuple(x[-1] for x in passed.ends), block
    # A loop that turns once or never: a branch would copy the states.
    again = lambda carry: ~carry[0]
    once = lambda _: (jnp.array(True), whole())
    return lax.while_loop(again, once, (passed.progress.converged, found))[1]


def _segments(u: jax.Array, most: int | None) -> tuple[int, int]:
    """How many segments, and their steps: whole rows of a tile in memory, if there are several."""
    batch, time, _, width = u.shape
    if most is None:
        # As many as fill the registers of a program, which takes those of one batch row then.
        most = min(FORWARD * SUBLANES // pl.cdiv(width, LANES), time // _SHORTEST)
        whole = Tiles.of(batch, 1, time, width, u.dtype, 3 + 1, FORWARD)
        programs = whole.grid[1] * whole.grid[2]
        if most * programs < 2 * batch:  # twice as fast, but for the burn-in
            most = 1
    rows = tile_rows(u.dtype)
    length = pl.cdiv(pl.cdiv(time, most), rows) * rows
    segments = pl.cdiv(time, length)
    return segments, length if segments > 1 else time


def _burned_in(cell: Cell, u, weights, initial: Arrays, reset, segments: int, interpret) -> Arrays:
    """A first guess of the states before each segment, `[S,B,D]` each."""
    batch, whole, _, width = u.shape
    length = whole // segments
    steps = min(_BURN_IN, length)

    def tails(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, segments, length, *x.shape[2:])[:, :-1, -steps:]
        return x.reshape(batch, -1, *x.shape[3:])

    zero = jnp.zeros((batch, segments - 1, width), jnp.float32)
    zero = zero if segments > 2 else zero[:, 0]
    _, ends, _ = forward(
        cell,
        tails(u),
        weights,
        (zero,) * cell.states,
        None if reset is None else tails(reset),
        segments=segments - 1,
        interpret=interpret,
    )
    ends = tuple(x.reshape(batch, -1, width) for x in ends)
    return _swapped(
        tuple(jnp.concatenate([h[:, None], x], axis=1) for h, x in zip(initial, ends, strict=True))
    )


def _swapped(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
